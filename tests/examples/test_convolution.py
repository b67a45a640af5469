"""The convolution's own rule for CPUs against JAX's, for all strides, kernels and odd sizes, and on other platforms."""

from functools import partial
from itertools import product

import convolution
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

RANDOM = np.random.default_rng(0)


def reference(x, kernel, stride):
    return lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def pullback(function, x, kernel, dy):
    y, pull = jax.vjp(function, x, kernel)
    return y, *pull(dy)


@pytest.mark.parametrize("window", [(1, 1), (3, 3), (2, 3), (3, 4), (5, 1)])
def test_value_and_gradients(window):
    """Of all strides, sizes and numbers of outputs, in one program for each of the two."""
    cases, operands = [], []
    for stride, (size, outputs) in product((1, 2, 3), (((6, 8), 4), ((7, 5), 4), ((6, 8), 17))):
        shapes = (2, *size, 3), (*window, 3, outputs), (2, *(-(-length // stride) for length in size), outputs)
        cases.append((stride, size, outputs))
        operands.append([RANDOM.standard_normal(shape).astype(np.float32) for shape in shapes])

    def all_of(function):
        def pullbacks(operands):
            return [
                pullback(partial(function, stride=case[0]), *each) for case, each in zip(cases, operands, strict=True)
            ]

        return jax.jit(pullbacks)(operands)

    for case, *both in zip(cases, all_of(convolution.convolve), all_of(reference), strict=True):
        for got, wanted in zip(*both, strict=True):
            # sums of up to 112 products of float32, in another order
            close = {"rtol": 1e-5, "atol": 1e-5 * np.abs(wanted).max()}
            np.testing.assert_allclose(got, wanted, **close, err_msg=f"stride, size, outputs: {case}")


@pytest.mark.parametrize(("window", "stride"), [((3, 3), 1), ((1, 3), 1), ((5, 1), 1), ((2, 2), 1), ((3, 3), 2)])
def test_bfloat16_by_tiles(monkeypatch, window, stride):
    """Against the same numbers in float32: six images in tiles of two, or none where windows or strides are others."""
    monkeypatch.setattr(convolution, "TILE", 2 * 2 * 7 * 8 * 3 * np.prod(window))
    shapes = (6, 7, 8, 3), (*window, 3, 4), (6, -(-7 // stride), -(-8 // stride), 4)
    narrow = [jnp.asarray(RANDOM.standard_normal(shape), jnp.bfloat16) for shape in shapes]
    got = jax.jit(partial(pullback, partial(convolution.convolve, stride=stride)))
    wanted = pullback(partial(reference, stride=stride), *(each.astype(jnp.float32) for each in narrow))
    for each, exact in zip(got(*narrow), wanted, strict=True):
        assert each.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float32(each), exact, atol=2**-7 * np.abs(exact).max())
    tiled = all(size % 2 for size in window) and stride == 1
    assert (" while(" in got.lower(*narrow).compile().as_text()) == tiled


def test_under_vmap():
    x, kernel = jnp.ones((3, 2, 4, 4, 2)), jnp.asarray(RANDOM.standard_normal((3, 3, 2, 4)), jnp.float32)
    dy = jnp.asarray(RANDOM.standard_normal((3, 2, 4, 4, 4)), jnp.float32)
    for dtype, error in ((jnp.float32, 1e-5), (jnp.bfloat16, 0.02)):
        operands = [each.astype(dtype) for each in (x, kernel, dy)]
        got, expected = (
            jax.vmap(partial(pullback, partial(function, stride=1)), (0, None, 0))(*operands)
            for function in (convolution.convolve, reference)
        )
        for each, wanted in zip(got, expected, strict=True):
            np.testing.assert_allclose(np.float32(each), np.float32(wanted), rtol=error, atol=error * 16)


def test_a_gradient_that_is_not_finite_stays_so():
    x, kernel = jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 4))
    gradient = pullback(partial(convolution.convolve, stride=1), x, kernel, jnp.full((1, 4, 4, 4), jnp.nan))[2]
    assert np.isnan(gradient).all()


def test_other_platforms_have_the_derivative_of_jax(monkeypatch):
    monkeypatch.setattr(lax, "platform_dependent", lambda *operands, cpu, default: default(*operands))
    x, kernel, dy = jnp.ones((2, 4, 6, 2)), jnp.ones((3, 3, 2, 4)), jnp.ones((2, 2, 3, 4))
    got, expected = (
        jax.jit(partial(pullback, partial(function, stride=2))).lower(x, kernel, dy).compile()
        for function in (convolution.convolve, reference)
    )
    jax.tree.map(np.testing.assert_array_equal, got(x, kernel, dy), expected(x, kernel, dy))
    assert " conditional(" not in got.as_text()


def test_the_compiler_leaves_the_conditional_around_the_exchange():
    x, kernel, dy = jnp.ones((2, 4, 4, 2)), jnp.ones((3, 3, 2, 4)), jnp.ones((2, 4, 4, 4))
    compiled = jax.jit(partial(pullback, partial(convolution.convolve, stride=1))).lower(x, kernel, dy).compile()
    assert compiled.as_text().count(" conditional(") == 1
