"""Parity of `recalibrate` with PyTorch's `update_bn`, which averages what each batch gives."""

import differences
import numpy as np
import pytest

import jbn

pytest.importorskip("torch")

BATCHES, ROWS, WIDTHS = 4, 16, (3, 8, 5)
RANDOM = np.random.default_rng(0)
DATA = RANDOM.normal(1, 2, (BATCHES, ROWS, WIDTHS[0])).astype(np.float32)
DATA += np.arange(BATCHES, dtype=np.float32)[:, None, None]  # the batches differ
KERNELS = [RANDOM.normal(0, 0.5, shape).astype(np.float32) for shape in (WIDTHS[:2], WIDTHS[1:])]


def both(batches):
    """States by one pass of jbn, and means and variances by PyTorch, of two layers."""
    states = [jbn.init(width)[1] for width in WIDTHS[1:]]
    states = jbn.recalibrate(differences.layers, KERNELS, states, batches, passes=1)
    return states, differences.updated_by_torch(KERNELS, batches)


def test_one_batch_is_the_same():
    states, found = both(DATA.reshape(1, -1, WIDTHS[0]))
    for state, (mean, var) in zip(states, found, strict=True):
        np.testing.assert_allclose(state.mean, mean, rtol=1e-5, atol=1e-6)  # float32
        np.testing.assert_allclose(state.var, var, rtol=1e-5)


def test_of_several_batches_the_means_are_the_same_and_the_variance_between_them_is_not_lost():
    states, found = both(DATA)
    for state, (mean, _) in zip(states, found, strict=True):
        np.testing.assert_allclose(state.mean, mean, rtol=1e-5, atol=1e-6)
    first = np.float64(DATA) @ KERNELS[0]
    np.testing.assert_allclose(found[0][1], first.var(1, ddof=1).mean(0), rtol=1e-5)
    np.testing.assert_allclose(states[0].var, first.reshape(-1, WIDTHS[1]).var(0, ddof=1), rtol=1e-5)
