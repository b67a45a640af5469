"""Six layers of 3x3 convolution, batch norm and activation, forward and backward: what a norm costs."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from resnet50 import AXIS, Norm

LAYERS = 6
WIDTH = 64


def init(key: jax.Array, norm: Norm) -> tuple[list, list]:
    """Params and state, in float32."""
    learned, state = norm.init(WIDTH)
    kernels = jax.nn.initializers.he_normal()
    params = [{"kernel": kernels(k, (3, 3, WIDTH, WIDTH)), "norm": learned} for k in jax.random.split(key, LAYERS)]
    return params, [state] * LAYERS


def apply(params, state, x, norm: Norm, axis_name=None, activation=jax.nn.relu) -> tuple[jax.Array, list]:
    """The last layer's output for `x` [batch, height, width, WIDTH], and the new state."""
    new_state = []
    for layer, moving in zip(params, state, strict=True):
        kernel = layer["kernel"].astype(x.dtype)
        x = lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x, moving = norm.apply(x, layer["norm"], moving, axis_name, activation)
        new_state.append(moving)
    return x, new_state


def make_step(norm: Norm, mesh: Mesh, mode: str, activation=jax.nn.relu):
    """A jitted `step(params, state, x)`, data parallel over `mesh`; gives gradients, new state and the mean output.

    `mode`: as for ResNet-50.
    """
    named = mode == "shard_map"

    def mean(params, state, x):
        y, state = apply(params, state, x, norm, AXIS if named else None, activation)
        return jnp.mean(y, dtype=jnp.float32) / (mesh.size if named else 1), state

    def step(params, state, x):
        (value, state), gradients = jax.value_and_grad(mean, has_aux=True)(params, state, x)
        return gradients, state, lax.psum(value, AXIS) if named else value

    if named:
        step = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(), P(AXIS)), out_specs=P())
    return jax.jit(step, out_shardings=NamedSharding(mesh, P()))


def inputs(norm: Norm, mesh: Mesh, batch: int, size: int) -> tuple:
    """The shapes and shardings of the step's arguments, for `batch` images a device."""

    def array(spec, shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    variables = jax.eval_shape(lambda: init(jax.random.key(0), norm))
    params, state = jax.tree.map(lambda leaf: array(P(), leaf.shape, leaf.dtype), variables)
    return params, state, array(P(AXIS), (batch * mesh.size, size, size, WIDTH), jnp.bfloat16)
