"""Folded into the linear map before it: the same as the map and then evaluation, in every layout."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from numpy.testing import assert_allclose

import jbn

OUTPUTS = 6
RANDOM = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RANDOM.standard_normal(shape), jnp.float32)


PARAMS = jbn.Params(normal(OUTPUTS), normal(OUTPUTS))
STATE = jbn.State(normal(OUTPUTS), jnp.exp(normal(OUTPUTS)), jnp.ones(OUTPUTS))
IMAGES = normal(2, 7, 8, 4)
WIDE = normal(2, 7, 8, OUTPUTS)


def convolve(x, kernel, *, layout=("NHWC", "HWIO", "NHWC"), **options):
    return lax.conv_general_dilated(x, kernel, dimension_numbers=layout, **{"window_strides": (1, 1), **options})


first = ("NCHW", "OIHW", "NCHW")
MAPS = {  # x, kernel, the map, output_axis, feature_axis of its output
    "dense": (normal(5, 4), normal(4, OUTPUTS), jnp.matmul, -1, -1),
    "convolution, padded": (IMAGES, normal(3, 3, 4, OUTPUTS), partial(convolve, padding="SAME"), -1, -1),
    "convolution, strided": (
        IMAGES,
        normal(3, 2, 4, OUTPUTS),
        partial(convolve, padding=((2, 1), (0, 3)), window_strides=(2, 3), rhs_dilation=(2, 1)),
        3,
        -1,
    ),
    "channels first": (
        IMAGES.transpose(0, 3, 1, 2),
        normal(OUTPUTS, 4, 3, 3),
        partial(convolve, layout=first, padding="SAME"),
        0,
        1,
    ),
    "depthwise": (
        normal(2, 7, 8, 3),
        normal(3, 3, 1, OUTPUTS),
        partial(convolve, padding="SAME", feature_group_count=3),
        -1,
        -1,
    ),
    "grouped": (WIDE, normal(3, 3, 2, OUTPUTS), partial(convolve, padding="SAME", feature_group_count=3), -1, -1),
    "transposed": (
        IMAGES,
        normal(3, 3, 4, OUTPUTS),
        lambda x, kernel: lax.conv_transpose(x, kernel, (2, 2), "SAME"),
        -1,
        -1,
    ),
    "one dimension": (
        normal(2, 9, 4),
        normal(3, 4, OUTPUTS),
        partial(convolve, layout=("NWC", "WIO", "NWC"), padding="SAME", window_strides=(1,)),
        -1,
        -1,
    ),
    "heads": (
        normal(5, 4),
        normal(4, 2, 3),
        lambda x, kernel: jnp.einsum("bi,ihd->bhd", x, kernel),
        [1, 2],
        [1, 2],
    ),
}


def evaluated(x, kernel, bias, linear, params, state, feature_axis, **options):
    """The map, its bias, and the norm, apart."""
    y = linear(x, kernel)
    return jbn.normalize_running(plus(y, bias, feature_axis), params, state, feature_axis=feature_axis, **options)


def plus(y, bias, feature_axis):
    kept = {axis % y.ndim for axis in np.atleast_1d(feature_axis)}
    return y if bias is None else y + jnp.expand_dims(bias, [axis for axis in range(y.ndim) if axis not in kept])


@pytest.mark.parametrize(("x", "kernel", "linear", "output_axis", "feature_axis"), MAPS.values(), ids=MAPS)
@pytest.mark.parametrize("biased", [False, True])
def test_every_map(x, kernel, linear, output_axis, feature_axis, biased):
    features = tuple(kernel.shape[axis] for axis in np.atleast_1d(output_axis))
    params, state = jax.tree.map(lambda a: a.reshape(features), (PARAMS, STATE))
    bias = normal(*features) if biased else None
    folded, new_bias = jbn.fold_into(kernel, bias, params, state, epsilon=1e-3, output_axis=output_axis)
    assert folded.shape == kernel.shape
    assert new_bias.shape == features
    got = plus(linear(x, folded), new_bias, feature_axis)
    wanted = evaluated(x, kernel, bias, linear, params, state, feature_axis, epsilon=1e-3)
    assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)  # float32 sums of tens of products


@pytest.mark.parametrize(
    "params", [PARAMS, PARAMS._replace(scale=None), PARAMS._replace(bias=None), jbn.Params(None, None)]
)
@pytest.mark.parametrize("state", [STATE, jbn.init(OUTPUTS)[1], STATE._replace(var=STATE.var.at[0].set(0.0))])
@pytest.mark.parametrize("epsilon", [1e-5, 0.0])
def test_slope_and_shift(params, state, epsilon):
    """Of params that are None, states without evidence, and features that are constant."""
    x = normal(9, OUTPUTS)
    slope, shift = jax.jit(jbn.fold)(params, state, epsilon=epsilon)
    wanted = jbn.normalize_running(x, params, state, epsilon=epsilon)
    assert_allclose(x * slope[None] + shift[None], wanted, rtol=1e-5, atol=1e-4)
    kernel = normal(4, OUTPUTS)
    folded, bias = jbn.fold_into(kernel, None, params, state, epsilon=epsilon)
    assert_allclose(folded, kernel * slope[None], rtol=1e-6)
    assert_allclose(bias, shift, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_kernels_are_rounded_once(dtype):
    kernel, bias = normal(4, OUTPUTS).astype(dtype), normal(OUTPUTS).astype(dtype)
    folded, new_bias = jbn.fold_into(kernel, bias, PARAMS, STATE)
    assert folded.dtype == new_bias.dtype == dtype
    wide, wide_bias = jbn.fold_into(kernel.astype(jnp.float32), bias.astype(jnp.float32), PARAMS, STATE)
    np.testing.assert_array_equal(folded, wide.astype(dtype))
    np.testing.assert_array_equal(new_bias, wide_bias.astype(dtype))
    assert jbn.fold_into(kernel, bias.astype(jnp.float32), PARAMS, STATE)[1].dtype == jnp.float32


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64])
@pytest.mark.parametrize("statistics", [jnp.float32, jnp.float64])
def test_a_bias_where_there_was_none(dtype, statistics):
    """A feature that hardly varies, far from 0: 250 / sqrt(1e-9 + 1e-5) is more than float16 holds, 65,504."""
    with jax.enable_x64(jnp.float64 in (dtype, statistics)):
        kernel, (params, _) = jnp.eye(3, dtype=dtype), jbn.init(3)
        state = jbn.State(jnp.full(3, 250.0, statistics), jnp.full(3, 1e-9, statistics))
        folded, bias = jbn.fold_into(kernel, None, params, state)
        assert folded.dtype == dtype
        assert bias.dtype == (jnp.float64 if jnp.float64 in (dtype, statistics) else jnp.float32)
        # Rounded to float32 once or twice, or not at all.
        assert_allclose(bias, -250 / np.sqrt(1e-9 + 1e-5), rtol=1e-6)
        given = jnp.zeros(3, dtype)
        assert jbn.fold_into(kernel, given, params, state)[1].dtype == dtype


def test_float64():
    with jax.enable_x64(True):
        params, state = jax.tree.map(lambda a: np.float64(a), (PARAMS, STATE))
        slope, shift = jbn.fold(params, state)
        assert slope.dtype == shift.dtype == jnp.float64
        assert_allclose(slope, params.scale / np.sqrt(state.var + 1e-5), rtol=1e-12)
        assert_allclose(shift, params.bias - state.mean * slope, rtol=1e-12)


def test_before_a_padded_convolution_it_is_not_exact():
    """What the docstring warns of: the shift does not reach the zeros around."""
    kernel, (x, params, state) = normal(3, 3, OUTPUTS, 2), (WIDE, PARAMS, STATE)
    slope, shift = jbn.fold(params, state)
    apart = convolve(jbn.normalize_running(x, params, state), kernel, padding="SAME")
    together = (
        convolve(x, kernel * slope[None, None, :, None], padding="SAME")
        + jnp.einsum("hwio,i->o", kernel, shift)[None, None, None]
    )
    assert_allclose(together[:, 1:-1, 1:-1], apart[:, 1:-1, 1:-1], rtol=1e-3, atol=1e-3)
    assert np.abs(together - apart).max() > 0.1


def test_refusals():
    kernel = normal(3, 3, 4, OUTPUTS)
    with pytest.raises(
        ValueError,
        match=r"state.mean has shape \[6\]; expected \[4\], the features of kernel \[3, 3, 4, 6\].*output_axis=3",
    ):
        jbn.fold_into(kernel, np.ones(6), PARAMS, STATE, output_axis=2)
    with pytest.raises(
        ValueError, match=r"output_axis is 4 and kernel has shape \[3, 3, 4, 6\]; name at least one axis"
    ):
        jbn.fold_into(kernel, None, PARAMS, STATE, output_axis=4)
    with pytest.raises(ValueError, match=r"bias has shape \[5\]; expected \[6\], one for each output"):
        jbn.fold_into(kernel, jnp.ones(5), PARAMS, STATE)
    with pytest.raises(TypeError, match=r"kernel is int8; expected a floating-point type"):
        jbn.fold_into(jnp.ones((4, OUTPUTS), jnp.int8), None, PARAMS, STATE)
    with pytest.raises(TypeError, match=r"state is a Params; expected a jbn.State. Is the order right"):
        jbn.fold_into(kernel, None, STATE, PARAMS)
    with pytest.raises(ValueError, match=r"epsilon is -1; expected a number that is not negative"):
        jbn.fold(PARAMS, STATE, epsilon=-1)
