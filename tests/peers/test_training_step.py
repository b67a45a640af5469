"""The benchmark of the training step runs all its networks, those of a GPU too, and refuses one that computes else."""

import jax
import pytest
import training_step

SMALL = training_step.Config(depth=8, batch=2, rounds=1)


@pytest.fixture(scope="module")
def measured():
    """With what a GPU adds, on the CPU."""
    torch = pytest.importorskip("torch")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_step.jax, "default_backend", lambda: "gpu")
        patch.setattr(torch, "compile", lambda network: network)
        return training_step.measure(SMALL)


def test_all_networks_are_timed(measured, tmp_path):
    times, memory = measured
    assert set(times) == {*training_step.NETWORKS, "torch", "torch compiled"}
    assert set(memory) == set(training_step.NETWORKS)
    assert training_step.table_of(times, memory, SMALL).row_count == len(times)
    training_step.figure_of(times, SMALL, "title", tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_a_wrong_network_is_not_timed(monkeypatch):
    def wrong(config):
        apply, params, state = training_step.with_jbn(config)
        return apply, jax.tree.map(lambda leaf: leaf + 0.1, params), state

    monkeypatch.setattr(training_step, "NETWORKS", {"jbn": training_step.with_jbn, "flax": wrong})
    with pytest.raises(AssertionError, match="flax"):
        training_step.measure(SMALL)
