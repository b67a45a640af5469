"""The benchmark of one normalization times functions that compute the same, and refuses one that does not."""

import dataclasses

import competitors
import numpy as np
import operation
import pytest

PEERS = [*competitors.JAX_PEERS, *(["torch"] if operation.installed("torch") else [])]


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(operation, "SHAPES", ((8, 4, 4, 6),))
    return operation.Config(rounds=2, chain=2, shapes=(0,))


@pytest.mark.parametrize("axis", [-1, 1])
def test_every_peer_is_timed_both_ways(small, axis, monkeypatch, tmp_path):
    found = operation.measure(dataclasses.replace(small, axis=axis), PEERS)
    alone, chained = found["alone"]["8x4x4x6"], found["chained"]["8x4x4x6"]
    assert set(alone) == {*PEERS, "floor"} and set(chained) == {*competitors.JAX_PEERS, "floor"}
    assert all(len(times) == 2 for times in (*alone.values(), *chained.values()))
    times = {"a": {"jbn": [2.0], "floor": [1.0]}, "b": {"jbn": [8.0], "floor": [1.0]}}
    assert operation.mean_ratio(times, "jbn", "floor") == pytest.approx(4)  # the geometric mean of 2 and 8
    operation.figure_of({"alone": times, "chained": times}, "title", tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000
    rows = 3 + ("torch" in PEERS)  # one shape, and the ratios to Flax, the floor and PyTorch
    assert operation.table_of("alone", found["alone"]).row_count == rows


def test_a_wrong_answer_is_not_timed(small, monkeypatch):
    def wrong(*options):
        right = competitors.with_flax_linen(*options)
        return lambda *operands: (1.01 * right(*operands)[0], *right(*operands)[1:])

    monkeypatch.setitem(competitors.JAX_PEERS, "flax linen", wrong)
    with pytest.raises(AssertionError, match="flax linen"):
        operation.prepare(small, operation.SHAPES[0], ["jbn", "flax linen"])


@pytest.mark.parametrize("what", operation.PASSES)
def test_all_that_peers_are_asked_for(small, what):
    """Values and gradients of all peers are compared before any is timed."""
    peers = [name for name in PEERS if what != "masked" or name in competitors.MASKED]
    prepared = operation.prepare(dataclasses.replace(small, what=what), operation.SHAPES[0], peers)
    assert set(prepared["alone"]) == {*peers, "floor"}
    for function in prepared["chained"].values():
        function()


def test_what_a_gpu_adds(small, monkeypatch):
    """The shapes of ResNet-50, PyTorch compiled, and copies by JAX, all on the CPU."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(operation.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(operation, "RESNET_50", ((4, 3, 3, 5),))
    monkeypatch.setattr(torch, "compile", lambda function: function)
    assert operation.installed(operation.COMPILED_TORCH)
    found = operation.measure(dataclasses.replace(small, dtype="bfloat16"), [*PEERS, "torch compiled"])
    assert set(found["alone"]["4x3x3x5"]) == {*PEERS, "torch compiled", "floor"}


def test_the_floor_is_copies():
    x = np.ones((64, 64), np.float32)
    assert len(operation.copies_of(x, 8)()) == 4 and len(operation.copies_of(x, 3)()) == 2


def test_a_record_has_one_row_a_case_way_and_peer():
    times = {"8x2": {"jbn": [2.0], "flax linen": [4.0], "floor": [1.0]}}
    rows = operation.markdown({"cases": {"training": {"alone": times}}}).splitlines()
    assert rows[2] == "| training | alone | jbn | 0.50 | 2.00 |" and len(rows) == 4
