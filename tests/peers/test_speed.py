"""What of the recipe for speed matters, tiny: it is computed, kept, drawn and told; all changes can be trained."""

import importlib
import json
import runpy
from pathlib import Path

import airbench_peer
import claim
import compiling
import pytest
import tables

ROOT = Path(__file__).parents[2]
speed = runpy.run_path(str(ROOT / "benchmarks" / "speed"), run_name="speed")


@pytest.fixture(scope="module", autouse=True)
def _compiled_quickly():
    compiling.quickly(True)


@pytest.mark.parametrize("name", ["left_out", "norms"])
def test_tiny(name, tmp_path, capsys):
    config = speed["Config"](folder=tmp_path, claims=(name,), tiny=True)
    speed["main"](config)
    told = capsys.readouterr().out
    assert "| --- |" in told and "embedded shapes" in told
    assert (tmp_path / f"{name}.png").stat().st_size > 5000
    jobs = claim.read(tmp_path / f"{name}.json")
    assert jobs and all(f"{name}: {job}," in told for job in jobs)
    speed["main"](config)  # as after an interruption
    assert f"{name}: " not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["left_out", "norms"])
def test_the_page_holds_the_tables_of_the_record(name):
    """What the page says is what `--markdown` prints, and `--pages` writes."""
    path, page = ROOT / "docs" / "speed" / f"{name}.json", (ROOT / "docs" / "speed.md").read_text()
    told = importlib.import_module(name).tell(claim.read(path))
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    assert page.split(start)[1].split(end)[0].strip().splitlines() == told
    assert json.loads(path.read_text())["facts"]["size"] == importlib.import_module("changes").FULL._asdict()
    assert f"](speed/{name}.png)" in page


def test_the_page_holds_the_table_of_the_peers():
    """What it says is what `airbench_peer.py --markdown` prints."""
    record = json.loads((ROOT / "docs" / "airbench_peer.json").read_text())
    assert tables.markdown(airbench_peer.table_of(record)) in (ROOT / "docs" / "speed.md").read_text()
