"""Evaluation as part of the linear map before it: for inference, where running statistics do not move any more."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jbn._core.affine import Standardize
from jbn._core.batch import features_of
from jbn._door.batch import reduced_axes
from jbn._door.fields import check_fields
from jbn._door.numbers import as_floating, check_epsilon
from jbn._types import Moments, Params, State, statistics_dtype


def fold(params: Params, state: State, *, epsilon: float | jax.Array = 1e-5) -> tuple[jax.Array, jax.Array]:
    """Evaluation as slope and shift: `normalize_running(x, params, state)` is `x * slope + shift`, but for rounding.

        slope = scale / sqrt(var + epsilon),  shift = bias - mean * slope

    Far from 0 the two terms cancel: with mean/std of 1e4, digits are lost that `normalize_running` keeps.

    Args:
      params: fields of shape `[*features]`; a scale or bias of `None` is 1 or 0.
      state: fields of shape `[*features]`. It is used as it stands, whatever its evidence.
      epsilon: that of the network.

    Returns:
      slope and shift `[*features]`, float32 (float64 where the state is).

    Raises:
      TypeError, ValueError: as `normalize_running`.

    Examples:
      >>> params = jbn.Params(jnp.array([3.0]), jnp.array([1.0]))
      >>> slope, shift = jbn.fold(params, jbn.State(jnp.array([2.0]), jnp.array([4.0])), epsilon=0.0)
      >>> slope.tolist(), shift.tolist()
      ([1.5], [-2.0])
    """
    state = check_fields("state", state, State)
    mean, slope, bias = _map(params, state, features_of(state.mean), epsilon)
    return slope, bias - mean * slope


def fold_into(
    kernel: ArrayLike,
    bias: ArrayLike | None,
    params: Params,
    state: State,
    *,
    epsilon: float | jax.Array = 1e-5,
    output_axis: int | Sequence[int] = -1,
) -> tuple[jax.Array, jax.Array]:
    """Fold evaluation into the linear map that it follows: a dense layer or a convolution of any kind and layout.

        kernel' = kernel * slope,  bias' = (bias - mean) * slope + params.bias,  slope = scale / sqrt(var + epsilon)

    Exact, but for rounding, for a norm right *after* the map, however that is padded, strided, dilated or grouped. A
    norm *before* a convolution that pads with 0 cannot be folded: the shift would not reach what is padded.

    Args:
      kernel: [..., outputs]: [inputs, outputs], [height, width, inputs, outputs], [outputs, inputs, height, width] with
        `output_axis=0`, of a depthwise convolution [height, width, 1, outputs] and so on.
      bias: `[*features]`, or `None`.
      params: fields of shape `[*features]`, as in `fold`.
      state: fields of shape `[*features]`, as in `fold`.
      epsilon: that of the network.
      output_axis: the axis or axes of the kernel along which the features of its output lie: -1 for JAX's HWIO, also
        depthwise and transposed; 0 for PyTorch's OIHW, and 1 for its transposed convolutions in one group.

    Returns:
      The kernel in its shape and dtype, and a bias `[*features]` in that of `bias`; without one in float32 (float64
      where the kernel, params or state are), whatever the kernel: a feature that hardly varies, far from 0, has one
      that float16 cannot hold. Computed in float32 or wider, and cast after.

    Raises:
      TypeError: `kernel` or `bias` is not floating-point, or `params` or `state` is something else.
      ValueError: a shape does not fit `output_axis`, or `epsilon` is negative.

    Source: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference", section 3.2.

    Examples:
      >>> params, state = jbn.Params(jnp.array([3.0]), None), jbn.State(jnp.array([2.0]), jnp.array([4.0]))
      >>> kernel, bias = jbn.fold_into(jnp.array([[10.0]]), None, params, state, epsilon=0.0)
      >>> kernel.tolist(), bias.tolist()
      ([[15.0]], [-3.0])
    """
    kernel = as_floating("kernel", kernel)
    given = None if bias is None else as_floating("bias", bias)
    for name, array in (("kernel", kernel), ("bias", given)):
        if array is not None and not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name} is {array.dtype}; expected a floating-point type.")
    axes = reduced_axes("kernel", kernel, "output_axis", output_axis)
    features = features_of(kernel, axes)._replace(name="kernel", option="output_axis")
    state = check_fields("state", state, State, features)
    if given is not None and given.shape not in ((), features.shape):
        raise ValueError(f"bias has shape {list(given.shape)}; expected {list(features.shape)}, one for each output.")
    mean, slope, shift = _map(params, state, features, epsilon)
    wide = statistics_dtype(kernel.dtype, slope.dtype)
    before, dtype = (jnp.zeros_like(mean), wide) if given is None else (given.astype(mean.dtype), given.dtype)
    folded = kernel.astype(wide) * jnp.expand_dims(slope.astype(wide), axes)
    return folded.astype(kernel.dtype), ((before - mean) * slope + shift).astype(dtype)


def _map(params: Params, state: State, features, epsilon):
    """Mean, slope and bias of y = (x - mean) * slope + bias."""
    params = check_fields("params", params, Params, features)
    dtype = statistics_dtype(*(leaf.dtype for leaf in jax.tree.leaves((params, state))))
    mean, var = state.mean.astype(dtype), state.var.astype(dtype)
    given = Moments(jnp.ones(()), mean, var, jnp.zeros_like(mean), jnp.ones(()))
    _, _, slope, bias = Standardize(params, check_epsilon(epsilon, dtype))(given)
    return mean, slope, bias
