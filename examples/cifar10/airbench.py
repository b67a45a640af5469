"""94 % on CIFAR-10 in a few passes over it: Jordan 2024, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU".

    python examples/cifar10/train.py --network airbench --data FOLDER

91.45 % of the test images of a JPEG copy of CIFAR-10, in 58 minutes on two cores of an AMD EPYC (Zen 4), jax 0.12.0.1,
in twenty passes; docs/records has it all. The 94 % are of the original images, which nobody has shown it yet.

A network of six wide convolutions behind a first one that is never trained, and all that its few passes need. It lives
from batch norm: activations inside the norms, scales frozen at 1, running statistics that forget within three steps.
This file is all of it that is not ResNet's too, from the pixels to the last step; steps.py runs it.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import steps
from convolution import convolve, plain
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from pooling import max_pool

import jbn

WIDTH = 64  # of the first stage; the others are four times as wide
WHITENING = 24  # features of the first layer: 2 x 2 pixels of 3 channels, and their negatives
DECAY, EPSILON = 0.6, 1e-12  # of the norms
BIAS_RATE = 64  # biases of the norms learn that much faster
SYNCHRONIZE, PULL = 5, 0.95**5  # every so many steps params and statistics go back to their average, by PULL at the end


def whitening(pixels: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """Kernel [2, 2, 3, 24]: behind it the uint8 `pixels` [images, 32, 32, 3] are uncorrelated, of variance 1.

    The eigenvectors of their covariance, each over the root of its eigenvalue (plus 5e-4), and the same negated.
    """
    images = ((pixels[:5000] - mean) / std).astype(np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(images, (2, 2), (1, 2)).transpose(0, 1, 2, 4, 5, 3)
    rows = windows.reshape(-1, 12)
    values, vectors = np.linalg.eigh(rows.T @ rows / len(rows))
    kernel = vectors / np.sqrt(values + 5e-4)
    return np.concatenate([kernel, -kernel], 1).reshape(2, 2, 3, WHITENING).astype(np.float32)


def layers(width: int) -> list[tuple[str, int, int]]:
    """Name, inputs and outputs of the convolutions that are trained."""
    widths = (WHITENING, width, 4 * width, 4 * width)
    return [
        (f"stage{stage}/conv{number}", widths[stage + number], widths[stage + 1])
        for stage in range(3)
        for number in (0, 1)
    ]


def init(key: jax.Array, kernel: np.ndarray, width: int = WIDTH, *, classes: int = 10) -> tuple[dict, dict]:
    """Params and state. `kernel` is that of `whitening`.

    Each convolution passes its inputs on as its first outputs; the others start uniform, in +-1 / sqrt(weights of one).
    """
    keys = iter(jax.random.split(key, 7))
    params: dict = {"whitening": {"kernel": jnp.asarray(kernel)}}
    state = {}
    for name, inputs, outputs in layers(width):
        norm, state[name] = jbn.init(outputs, scale=False)
        drawn, passed = _uniform(next(keys), (3, 3, inputs, outputs), weights=9 * inputs), min(inputs, outputs)
        same = jnp.zeros((3, 3, inputs, passed)).at[1, 1].set(jnp.eye(inputs, passed))
        params[name] = {"kernel": drawn.at[..., :passed].set(same), "norm": norm}
    params["head"] = {"kernel": _uniform(next(keys), (4 * width, classes), weights=4 * width)}
    return params, state


def _uniform(key: jax.Array, shape: tuple[int, ...], weights: int) -> jax.Array:
    return jax.random.uniform(key, shape, minval=-1, maxval=1) / math.sqrt(weights)


def apply(
    params: dict,
    state: dict,
    images: jax.Array,
    *,
    train: bool,
    axis_name: str | None = None,
    normalize: Callable = jbn.batch_norm,
    convolve: Callable = convolve,
) -> tuple[jax.Array, dict]:
    """Logits [batch, classes] in float32 for images [batch, 32, 32, 3], and the new state.

    Computes in the dtype of the images. With `axis_name`, statistics are pooled over that axis. `normalize` and
    `convolve` may be others than these, with the same arguments.
    """
    new_state = {}
    options = {"train": train, "decay": DECAY, "epsilon": EPSILON, "axis_name": axis_name, "activation": jax.nn.gelu}
    x = jax.nn.gelu(
        plain(images, lax.stop_gradient(params["whitening"]["kernel"]).astype(images.dtype), padding="VALID")
    )
    for name in state:
        x = checkpoint_name(convolve(x, params[name]["kernel"].astype(x.dtype)), "convolution")
        if name.endswith("conv0"):
            x = max_pool(x, 2)
        x, new_state[name] = normalize(x, params[name]["norm"], state[name], **options)
    x = max_pool(x, 3).reshape(len(x), -1).astype(jnp.float32)
    return x @ params["head"]["kernel"] / 9, new_state


def make_optimizer(peak: float, total: int, *, momentum: float, weight_decay: float) -> optax.GradientTransformation:
    """SGD with Nesterov momentum. In 23 % of all steps its rate rises from 0.2 of `peak` to it, then it falls to 0.07.

    Norms' biases have `BIAS_RATE` times the rate, and as much weight decay a step as all else.
    """

    def sgd(factor):
        highest, up = factor * peak, max(1, round(0.23 * total))
        schedule = optax.join_schedules(
            [
                optax.linear_schedule(0.2 * highest, highest, up),
                optax.linear_schedule(highest, 0.07 * highest, max(1, total - up)),
            ],
            [up],
        )
        return optax.chain(
            optax.add_decayed_weights(weight_decay / factor), optax.sgd(schedule, momentum=momentum, nesterov=True)
        )

    def kinds(params):
        return {
            name: "fixed" if name == "whitening" else {part: "bias" if part == "norm" else "kernel" for part in layer}
            for name, layer in params.items()
        }

    return optax.partition({"kernel": sgd(1), "bias": sgd(BIAS_RATE), "fixed": optax.set_to_zero()}, kinds)


def augment(key: jax.Array, image: jax.Array, times_seen: jax.Array, *, moves: int = 2, cutout: int = 0) -> jax.Array:
    """`image` [32, 32, 3] moved by up to so many pixels, its mirror image at the edges, and flipped every second time.

    Of two passes each image is flipped in exactly one. Then `steps.cut_out` of `cutout`.
    """
    moved = jnp.pad(image, ((moves, moves), (moves, moves), (0, 0)), mode="reflect")
    moved = steps.cut_out(jax.random.fold_in(key, 2), steps.window(key, moved), cutout)
    return jnp.where(times_seen % 2 == 1, moved[:, ::-1], moved)


def lookahead(carry: steps.Carry, total: int) -> steps.Carry:
    """Every few of the `total` steps, move to the slowly moving average of params and statistics; end on it.

    Zhang et al. 2019, "Lookahead Optimizer: k steps forward, 1 step back", with a pull that grows as the cube of time.
    """
    averages = carry.step % SYNCHRONIZE == 0
    now = averages | (carry.step == total)
    decay = PULL * (carry.step / total) ** 3

    def average(slow, fast):
        return jnp.where(averages, fast + decay * (slow - fast), slow)

    fast = carry.params, carry.state
    slow = jax.tree.map(average, carry.average, fast)
    params, state = jax.tree.map(lambda slow, fast: jnp.where(now, slow, fast), slow, fast)
    return carry._replace(params=params, state=state, average=slow)
