"""What moving data do, tiny: every claim is computed, kept, drawn and told; what is there is not computed again."""

import runpy
from pathlib import Path

import claim
import pytest

ROOT = Path(__file__).parents[2]
moved = runpy.run_path(str(ROOT / "benchmarks" / "moved"), run_name="moved")


@pytest.mark.parametrize("name", moved["CLAIMS"])
def test_a_tiny_claim(name, tmp_path_factory, capsys):
    shared = tmp_path_factory.getbasetemp()
    config = moved["Config"](folder=shared / "moved", runs=shared / "runs", claims=(name,), tiny=True)
    moved["main"](config)
    told = capsys.readouterr().out
    assert "| --- |" in told and "embedded shapes" in told
    assert all(figure.stat().st_size > 5000 for figure in config.folder.glob(f"{name}*.png"))
    jobs = claim.read(config.folder / f"{name}.json")
    assert jobs and all(f"{name}: {job}," in told for job in jobs)
    moved["main"](config)  # as after an interruption
    assert f"{name}: " not in capsys.readouterr().out
