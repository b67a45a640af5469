"""Whatever the axes of x and of its weights: moments, training and evaluation against float64 NumPy."""

from functools import partial
from itertools import cycle

import cases
import jax
import numpy as np
import pytest
import reference
from numpy.testing import assert_allclose

import jbn

CASES = dict(zip(cases.LAYOUTS, cycle(cases.WEIGHTS[1:]), strict=False))  # without weights, and of one kind in turn


@pytest.mark.parametrize(("layout", "kind"), CASES.items())
def test_every_layout(layout, kind):
    shape, feature_axis = cases.LAYOUTS[layout]
    x, params, state = cases.batch(shape, feature_axis)
    axes = {"feature_axis": feature_axis}

    @jax.jit
    def everything(given):
        trained = [jbn.batch_norm(x, params, state, train=True, weights=weights, **axes) for x, weights in given]
        evaluated, _ = jbn.batch_norm(given[0][0], params, state, train=False, **axes)
        return evaluated, [jbn.moments(x, weights=weights, **axes) for x, weights in given], trained

    given = [(x, cases.weights(kind, shape, feature_axis)) for kind in ("none", kind)]
    full = [reference.full_weights(x, weights, feature_axis) for _, weights in given]
    holes = [np.where(weights > 0, x, np.float32(np.nan)) for weights in full]
    evaluated, *results = everything([(x, weights) for x, (_, weights) in zip(holes, given, strict=True)])
    exact = reference.normalize(x, state.mean, state.var, *params, feature_axis=feature_axis)
    assert_allclose(evaluated, exact, rtol=1e-5, atol=1e-5)
    for x, weights, measured, (y, after) in zip(holes, full, *results, strict=True):
        count, mean, var = reference.moments(x, weights, feature_axis)
        # Rounding of sums of at most 36 values, and of squares about the mean and about the running one.
        apart = 1 + np.max((mean - state.mean) ** 2 / var)
        close = partial(assert_allclose, rtol=64 * 2**-24 * apart, atol=64 * 2**-24 * apart)
        close(measured.count, count)
        close(measured.mean, mean)
        close(measured.var, var)
        close(y, np.where(weights > 0, reference.normalize(x, mean, var, *params, feature_axis=feature_axis), 0))
        fields = [np.float64(field) for field in state]
        number = count if kind == "repeats" else reference.number(weights, shape, feature_axis)
        moved = reference.update(fields, (number, mean, var))
        for got, wanted in zip(after, moved, strict=True):
            close(got, wanted)


def test_a_transposed_or_strided_array_is_no_other():
    x, params, state = cases.batch((6, 8, 3))
    same = np.asfortranarray(x), x[:, ::-1][:, ::-1], np.ascontiguousarray(x.transpose(2, 0, 1)).transpose(1, 2, 0)
    wanted = jbn.batch_norm(x, params, state, train=True)
    for other in same:
        jax.tree.map(np.testing.assert_array_equal, jbn.batch_norm(other, params, state, train=True), wanted)
