"""The CIFAR ResNet of He et al. 2015 (section 4.2) as plain functions over two pytrees: params and batch-norm state.

And how it is trained: the optimizer, and what is done to an image.
"""

from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import optax
import steps
from convolution import convolve
from jax.ad_checkpoint import checkpoint_name

import jbn

Depth = Literal[8, 14, 20, 32, 44, 56, 110]  # 6 n + 2: three stages of n blocks of two convolutions, a stem and a head
DEPTHS: tuple[int, ...] = get_args(Depth)


def init(
    key: jax.Array, depth: int = 20, width: int = 16, *, classes: int = 10, zero_last_scale: bool = False
) -> tuple[dict, dict]:
    """Params and state. Kernels are He-initialized; `zero_last_scale` starts every block as its shortcut.

    `width` is that of the first stage, 16 in the paper.
    """
    keys = iter(jax.random.split(key, 3 * depth))
    params, state = {}, {}

    def unit(name, size, inputs, outputs, scale=1.0):
        kernel = jax.nn.initializers.he_normal()(next(keys), (size, size, inputs, outputs))
        norm, state[name] = jbn.init(outputs)
        params[name] = {"kernel": kernel, "norm": norm._replace(scale=jnp.full(outputs, scale, jnp.float32))}

    unit("stem", 3, 3, width)
    for name, inputs, outputs, _ in blocks(depth, width):
        unit(f"{name}/conv1", 3, inputs, outputs)
        unit(f"{name}/conv2", 3, outputs, outputs, scale=0.0 if zero_last_scale else 1.0)
        if inputs != outputs:
            unit(f"{name}/shortcut", 1, inputs, outputs)
    kernel = jax.nn.initializers.he_normal()(next(keys), (4 * width, classes))
    params["head"] = {"kernel": kernel, "bias": jnp.zeros(classes)}
    return params, state


def blocks(depth: int, width: int = 16) -> list[tuple[str, int, int, int]]:
    """Name, input width, output width and stride of every residual block."""
    per_stage, inputs, found = (depth - 2) // 6, width, []
    for stage, outputs in enumerate((width, 2 * width, 4 * width)):
        for index in range(per_stage):
            found.append((f"stage{stage}/block{index}", inputs, outputs, 2 if stage and not index else 1))
            inputs = outputs
    return found


def apply(
    params: dict,
    state: dict,
    images: jax.Array,
    *,
    depth: int,
    train: bool,
    decay: float = 0.9,
    axis_name: str | None = None,
    normalize: Callable = jbn.batch_norm,
    convolve: Callable = convolve,
) -> tuple[jax.Array, dict]:
    """Logits [batch, classes] in float32 for images [batch, 32, 32, 3], and the new state.

    Computes in the dtype of the images. With `axis_name`, statistics are pooled over that axis; `decay` is that of the
    running statistics. `normalize` and `convolve` may be others than these, with the same arguments.
    """
    new_state = {}

    def unit(x, name, stride=1, activation=jax.nn.relu):
        x = checkpoint_name(convolve(x, params[name]["kernel"].astype(x.dtype), stride), "convolution")
        options = {"train": train, "decay": decay, "axis_name": axis_name, "activation": activation}
        x, new_state[name] = normalize(x, params[name]["norm"], state[name], **options)
        return x

    x = unit(images, "stem")
    for name, inputs, outputs, stride in blocks(depth, width=x.shape[-1]):
        shortcut = x if inputs == outputs else unit(x, f"{name}/shortcut", stride, activation=None)
        x = unit(x, f"{name}/conv1", stride)
        x = jax.nn.relu(unit(x, f"{name}/conv2", activation=None) + shortcut)
    x = jnp.mean(x, (1, 2), dtype=jnp.float32)
    return x @ params["head"]["kernel"] + params["head"]["bias"], new_state


def make_optimizer(peak: float, total: int, *, momentum: float, weight_decay: float) -> optax.GradientTransformation:
    """SGD with Nesterov momentum on a one-cycle schedule; weight decay on the kernels only, not on scale and bias."""

    def kernels(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1] == jax.tree_util.DictKey("kernel"), params)

    schedule = optax.cosine_onecycle_schedule(total, peak, pct_start=0.25)
    return optax.chain(
        optax.add_decayed_weights(weight_decay, mask=kernels), optax.sgd(schedule, momentum=momentum, nesterov=True)
    )


def augment(
    key: jax.Array, image: jax.Array, times_seen: jax.Array | int = 0, *, moves: int = 4, cutout: int = 0
) -> jax.Array:
    """A random crop of `image` [32, 32, 3] padded on every side, flipped half of the time, however often seen.

    Padded by `moves`; then `steps.cut_out` of `cutout`.
    """
    crop_key, flip_key = jax.random.split(key)
    crop = steps.window(crop_key, jnp.pad(image, ((moves, moves), (moves, moves), (0, 0))))
    crop = steps.cut_out(jax.random.fold_in(key, 2), crop, cutout)
    return jnp.where(jax.random.bernoulli(flip_key), crop[:, ::-1], crop)
