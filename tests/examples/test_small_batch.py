"""The experiment on small batches: its normalizations, its record, and a tiny one."""

import dataclasses
import json
import re
from functools import partial
from pathlib import Path

import data
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import remedies
import small_batch
from small_batch_record import LINES, STAGES, Network, Record

import jbn

pytestmark = pytest.mark.usefixtures("small")
ROOT = Path(__file__).parents[2]
RANDOM = np.random.default_rng(0)
SIZE = 2
X = jnp.asarray(RANDOM.normal(1, 2, (6, 3, 3, 16)), jnp.float32)
PARAMS = jbn.Params(jnp.linspace(0.5, 2, 16), jnp.linspace(-1, 1, 16))
STATE = jbn.State(jnp.linspace(0, 2, 16), jnp.linspace(1, 9, 16), jnp.array(0.7))
WORKERS = np.split(np.asarray(X), 3)


def by_own_statistics(x):
    _, mean, var = reference.moments(x)
    return reference.normalize(x, mean, var, *PARAMS)


def in_groups(x):
    """Group norm of one image, as it is written: statistics over places and neighbouring features."""
    parts = np.asarray(x, np.float64).reshape(9, 8, 2)
    mean, var = parts.mean((0, 2), keepdims=True), parts.var((0, 2), keepdims=True)
    return ((parts - mean) / np.sqrt(var + 1e-5)).reshape(x.shape) * np.asarray(PARAMS.scale) + np.asarray(PARAMS.bias)


EXPECTED = {
    "batch_norm": [by_own_statistics(part) for part in WORKERS],
    "synchronized": by_own_statistics(X),
    "renormalized": [reference.renormalize(part, PARAMS, STATE, 1.5, 0.2)[0] for part in WORKERS],
    "group_norm": [in_groups(image) for image in X],
    "scale_and_bias": np.asarray(X) * np.asarray(PARAMS.scale) + np.asarray(PARAMS.bias),
}


@pytest.mark.parametrize("name", remedies.RUNNING)
def test_what_each_normalizes_by_and_keeps(name):
    states = dict.fromkeys(remedies.RUNNING[name], STATE)
    y, after = jax.jit(getattr(remedies, name), static_argnums=3)(X, PARAMS, states, SIZE, (1.5, 0.2))
    np.testing.assert_allclose(y, np.reshape(EXPECTED[name], X.shape), atol=2e-5)  # float32, one pass
    assert set(after) == set(states)
    for whose, images in {"one worker": WORKERS[0], "all workers": X}.items():
        if whose in after:
            expected = reference.update(STATE, reference.moments(images))
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), after[whose], jbn.State(*expected))


FACTS = {"hardware": "one", "dataset": "two", "settings": {"sizes": [2, 8], "batch": 8, "seeds": 2}}


def found(accuracy):
    return {stage: {line.statistics: accuracy for line in LINES} for stage in STAGES}


def test_a_record_tells_mean_and_standard_deviation_over_the_seeds(tmp_path):
    record = Record(tmp_path / "folder" / "record.json", FACTS)
    for seed, accuracy in enumerate((0.5, 0.52)):
        record.add(Network("batch_norm", 2, seed), found(accuracy), 1.0)
        record.add(Network("batch_norm", 8, seed), found(accuracy + 0.2), 1.0)
        record.add(Network("scale_and_bias", 8, seed), found(accuracy / 2), 1.0)
    again = Record(record.path, FACTS)
    assert again.rows == record.rows
    rows = again.markdown("end").splitlines()
    assert rows[0] == "| images of a worker | 2 | 8 |"
    assert "| batch norm, recalibrated | 51.0 ± 1.4 | 71.0 ± 1.4 |" in rows
    assert "| scale and bias alone | 25.5 ± 0.7 | 25.5 ± 0.7 |" in rows  # the size is nothing to it
    assert "| group norm |  |  |" in rows
    assert again.noise("end").startswith("nan points")  # nothing to compare with
    for seed, accuracy in enumerate((0.5, 0.52)):
        again.add(Network("synchronized", 2, seed), found(accuracy + 0.21), 1.0)
    # 70 and 71 %, 72 and 73 %
    assert again.noise("end") == "0.7 points with running statistics, 0.7 with recalibrated ones"
    again.draw(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_a_record_goes_on_only_with_what_it_was_begun_with(tmp_path):
    Record(tmp_path / "record.json", FACTS).add(Network("batch_norm", 2, 0), found(0.5), 1.0)
    with pytest.raises(ValueError, match=r"begun with dataset two, not three; take another --name"):
        Record(tmp_path / "record.json", FACTS | {"dataset": "three"})


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"networks": [{}]}'])
def test_what_is_no_record_is_not_gone_on_with(tmp_path, content):
    path = tmp_path / "record.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"record.json is no record of this program .*; take another --name"):
        Record(path, FACTS)
    assert path.read_text() == content


@pytest.mark.parametrize(
    ("name", "stages", "networks"), [("small_batch", STAGES, 57), ("small_batch_rate_0.2", ["end"], 21)]
)
def test_the_page_shows_what_was_recorded(name, stages, networks):
    path = ROOT / "docs" / f"{name}.json"
    content = json.loads(path.read_text())
    facts = {name: value for name, value in content.items() if name != "networks"}
    record, page = Record(path, facts), (ROOT / "docs" / "developers" / "small-batch.md").read_text()
    assert content["settings"]["seeds"] == 3 and len(record.rows) == networks
    for stage in stages:
        assert record.markdown(stage) in page
        assert name != "small_batch" or record.noise(stage) in page


def test_what_users_read_is_of_the_record():
    short, whole = ((ROOT / "docs" / page).read_text() for page in ("small-batch.md", "developers/small-batch.md"))
    rows = {"batch norm": "batch norm with `groups`, running", "renormalized": "renormalized, running"}
    rows |= {"synchronized over devices": "synchronized, running", "group norm": "group norm"}
    for name, line in rows.items():
        (shown,), (found, *_) = (
            re.findall(rf"^\| {text} \| (.*) \|$", page, re.MULTILINE) for text, page in ((name, short), (line, whole))
        )
        cells = found.split(" | ")
        assert shown.split(" | ")[:2] == [cells[0], cells[2]]  # of 2 and 8 images


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A few images."""
    monkeypatch.setattr(data, "embedded", partial(data.embedded, train=16, test=50))
    return small_batch.Config(folder=tmp_path, sizes=(2,), batch=4, images=16, epochs=2, seeds=1)


def test_a_tiny_one_trains_and_evaluates_all(tiny, capsys):
    small_batch.main(tiny)
    rows = json.loads((tiny.folder / "small_batch.json").read_text())["networks"]
    assert [row["network"][0] for row in rows] == [
        "batch_norm",
        "renormalized",
        "synchronized",
        "group_norm",
        "scale_and_bias",
    ]
    accuracies = {row["network"][0]: row["accuracy"] for row in rows}
    for line in LINES:
        assert all(0 <= accuracies[line.remedy][stage][line.statistics] <= 1 for stage in STAGES)
    assert "| batch norm, recalibrated |" in capsys.readouterr().out
    assert (tiny.folder / "small_batch.png").stat().st_size > 1000


def test_stopped_it_goes_on_after_the_last_that_was_finished(tiny, monkeypatch, capsys):
    trained = []

    def experiment(config, dataset):
        def run(network, after_step):
            if len(trained) == 2:
                trained.append("stopped")
                raise KeyboardInterrupt
            trained.append(network)
            return found(0.5)

        return run

    monkeypatch.setattr(small_batch, "experiment", experiment)
    with pytest.raises(SystemExit, match="130"):
        small_batch.main(tiny)
    assert "Stopped after 2 networks. The same command trains the others." in capsys.readouterr().err
    for _ in range(2):  # the second time all is there
        small_batch.main(tiny)
        assert [network for network in trained if network != "stopped"] == small_batch.networks(tiny)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sizes": (3,)}, "sizes has 3; expected divisors of the batch of 4"),
        ({"sizes": (2, 2)}, r"sizes is \(2, 2\); expected each size once"),
        ({"seeds": 0}, "seeds is 0; expected at least 1"),
        ({"epochs": 1}, "epochs is 1 and images 16: 4 steps; expected at least 5"),
        ({"data": Path("nowhere")}, "nowhere is not all of CIFAR-10: data_batch_1.bin, .* missing"),
    ],
)
def test_refusals_say_what_to_do(tiny, change, message):
    with pytest.raises(SystemExit, match=message):
        small_batch.main(dataclasses.replace(tiny, **change))
