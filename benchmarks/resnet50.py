"""A training step of ResNet-50 (v1.5: strides in the 3x3 convolutions) as plain functions, with any batch norm."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jbn

AXIS = "data"
STAGES = (3, 4, 6, 3)
WIDTH = 64
optimizer = optax.sgd(0.1, momentum=0.9)


class Norm(NamedTuple):
    """`init(features)` gives params and state; `apply` gives y and the new state."""

    init: Callable
    apply: Callable  # (x, params, state, axis_name, activation)


def apply_jbn(x, params, state, axis_name, activation):
    return jbn.batch_norm(x, params, state, train=True, axis_name=axis_name, activation=activation)


def init_flax(features):
    from flax import linen as nn

    variables = nn.BatchNorm(use_running_average=False).init(jax.random.key(0), jnp.zeros((1, features)))
    return variables["params"], variables["batch_stats"]


def apply_flax(x, params, state, axis_name, *, fast):
    from flax import linen as nn

    layer = nn.BatchNorm(
        use_running_average=False, momentum=0.9, dtype=x.dtype, axis_name=axis_name, use_fast_variance=fast
    )
    y, updated = layer.apply({"params": params, "batch_stats": state}, x, mutable=["batch_stats"])
    return y, updated["batch_stats"]


def behind(apply: Callable) -> Callable:
    """With the activation behind `apply`, which takes none."""

    def both(x, params, state, axis_name, activation):
        y, state = apply(x, params, state, axis_name)
        return y if activation is None else activation(y), state

    return both


def scale_and_bias(x, params, state, axis_name):
    """Nothing is measured: what a network costs besides."""
    del axis_name
    return x * params.scale.astype(x.dtype) + params.bias.astype(x.dtype), state


NORMS = {
    "jbn": Norm(jbn.init, apply_jbn),
    "jbn, relu behind": Norm(jbn.init, behind(partial(apply_jbn, activation=None))),
    "scale and bias": Norm(jbn.init, behind(scale_and_bias)),
    "flax fast": Norm(init_flax, behind(partial(apply_flax, fast=True))),
    "flax two-pass": Norm(init_flax, behind(partial(apply_flax, fast=False))),
}


def blocks(stages, width) -> list[tuple[str, int, int, int]]:
    """Name, input width, inner width and stride of every bottleneck block; its output is 4 times the inner width."""
    inputs, found = width, []
    for stage, count in enumerate(stages):
        inner = width << stage
        for index in range(count):
            found.append((f"stage{stage}/block{index}", inputs, inner, 2 if stage and not index else 1))
            inputs = 4 * inner
    return found


def init(key: jax.Array, norm: Norm, stages=STAGES, width=WIDTH, classes=1000) -> tuple[dict, dict]:
    """Params and state, in float32."""
    keys = iter(jax.random.split(key, 3 * sum(stages) + len(stages) + 2))
    params, state = {}, {}

    def unit(name, size, inputs, outputs):
        learned, state[name] = norm.init(outputs)
        kernel = jax.nn.initializers.he_normal()(next(keys), (size, size, inputs, outputs))
        params[name] = {"kernel": kernel, "norm": learned}

    unit("stem", 7, 3, width)
    for name, inputs, inner, _ in blocks(stages, width):
        unit(f"{name}/conv1", 1, inputs, inner)
        unit(f"{name}/conv2", 3, inner, inner)
        unit(f"{name}/conv3", 1, inner, 4 * inner)
        if inputs != 4 * inner:
            unit(f"{name}/shortcut", 1, inputs, 4 * inner)
    features = 4 * width << len(stages) - 1
    kernel = jax.nn.initializers.he_normal()(next(keys), (features, classes))
    params["head"] = {"kernel": kernel, "bias": jnp.zeros(classes)}
    return params, state


def apply(params, state, images, norm: Norm, stages=STAGES, width=WIDTH, axis_name=None) -> tuple[jax.Array, dict]:
    """Logits [batch, classes] in float32 for images [batch, height, width, 3], and the new state."""
    new_state = {}

    def unit(x, name, stride=1, activation=jax.nn.relu):
        kernel = params[name]["kernel"].astype(x.dtype)
        x = lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = checkpoint_name(x, "convolution")
        x, new_state[name] = norm.apply(x, params[name]["norm"], state[name], axis_name, activation)
        return x

    x = unit(images, "stem", 2)
    x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")
    for name, inputs, inner, stride in blocks(stages, width):
        shortcut = x if inputs == 4 * inner else unit(x, f"{name}/shortcut", stride, activation=None)
        x = unit(unit(x, f"{name}/conv1"), f"{name}/conv2", stride)
        x = jax.nn.relu(unit(x, f"{name}/conv3", activation=None) + shortcut)
    x = jnp.mean(x, (1, 2), dtype=jnp.float32)
    return x @ params["head"]["kernel"] + params["head"]["bias"], new_state


class Carry(NamedTuple):
    params: optax.Params
    state: dict
    optimizer: optax.OptState


def make_step(norm: Norm, mesh: Mesh, mode: str, stages=STAGES, width=WIDTH, remat=False):
    """A jitted `step(carry, images, labels)`, data parallel over `mesh`; gives the new carry and the loss.

    `mode`: "jit" leaves the splitting to the compiler, "shard_map" writes it out. With `remat` only what convolutions
    give and jbn's moments are kept for the backward pass.
    """
    named = mode == "shard_map"
    forward = partial(apply, norm=norm, stages=stages, width=width, axis_name=AXIS if named else None)
    if remat:
        policy = jax.checkpoint_policies.save_only_these_names("convolution", "jbn.moments")
        forward = jax.checkpoint(forward, policy=policy)

    def loss(params, state, images, labels):
        logits, state = forward(params, state, images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.sum(losses) / (losses.size * (mesh.size if named else 1)), state

    def step(carry, images, labels):
        (value, state), gradients = jax.value_and_grad(loss, has_aux=True)(carry.params, carry.state, images, labels)
        updates, moved = optimizer.update(gradients, carry.optimizer)
        carry = Carry(optax.apply_updates(carry.params, updates), state, moved)
        return carry, lax.psum(value, AXIS) if named else value

    if named:
        step = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(AXIS), P(AXIS)), out_specs=P())
    return jax.jit(step, donate_argnums=0, out_shardings=NamedSharding(mesh, P()))


def inputs(norm: Norm, mesh: Mesh, batch: int, size=224, stages=STAGES, width=WIDTH) -> tuple:
    """The shapes and shardings of the step's arguments, for `batch` images a device."""

    def start():
        params, state = init(jax.random.key(0), norm, stages, width)
        return Carry(params, state, optimizer.init(params))

    def array(spec, shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    carry = jax.tree.map(lambda leaf: array(P(), leaf.shape, leaf.dtype), jax.eval_shape(start))
    images = array(P(AXIS), (batch * mesh.size, size, size, 3), jnp.bfloat16)
    return carry, images, array(P(AXIS), (batch * mesh.size,), jnp.int32)
