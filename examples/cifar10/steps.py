"""The compiled steps of training, evaluation and recalibration, data parallel over a mesh with the axis "data"."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import PartitionSpec

AXIS = "data"
REPLICATED, SHARDED = PartitionSpec(), PartitionSpec(AXIS)
# For jax.checkpoint: the convolutions' outputs and the measured moments are kept, all else is made again.
REMAT_POLICY = jax.checkpoint_policies.save_only_these_names("convolution", "jbn.moments")
NO_STEP = np.iinfo(np.uint32).max  # of what is drawn once in a training


class Carry(NamedTuple):
    """All that training changes, and so all that a checkpoint holds."""

    params: optax.Params
    state: dict
    optimizer: optax.OptState
    step: jax.Array  # [], int32
    average: Any = optax.EmptyState()  # what `after_step` of `make_steps` averages

    def averaged(self, decay: float) -> "Carry":
        """The same with the params averaged by `averaging` in the place of those of the last step, without bias."""
        average = cast(optax.EmaState, self.average)
        return self._replace(params=optax.tree.bias_correction(average.ema, decay, average.count))


class Totals(NamedTuple):
    """Sums over the images seen since they were last zero."""

    loss: jax.Array  # [], float32
    correct: jax.Array  # [], int32
    count: jax.Array  # [], int32  # pyright: ignore[reportIncompatibleMethodOverride]

    @classmethod
    def zero(cls):
        return cls(jnp.zeros(()), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))

    def means(self, part: str) -> dict[str, float | None]:
        """Loss and accuracy of `part` as numbers; None where nothing was seen."""
        count = int(self.count)
        loss, accuracy = (float(self.loss) / count, int(self.correct) / count) if count else (None, None)
        return {f"{part}_loss": loss, f"{part}_accuracy": accuracy}


class Images(NamedTuple):
    """Images of one step, or a whole set of them, shared among the devices of a mesh."""

    pixels: jax.Array  # [images, 32, 32, 3], uint8
    labels: jax.Array  # [images], int32


def place(pixels: np.ndarray, labels: np.ndarray, rows: np.ndarray, mesh: jax.sharding.Mesh) -> Images:
    """The images of `rows` [images] on the devices of `mesh`; each process reads those of its own devices."""
    sharding = jax.NamedSharding(mesh, SHARDED)

    def share(values):
        def of_device(index) -> np.ndarray:
            return values[rows[index[0]]]

        return jax.make_array_from_callback((len(rows), *values.shape[1:]), sharding, of_device)

    return Images(share(pixels), share(labels))


def place_all(pixels: np.ndarray, labels: np.ndarray, mesh: jax.sharding.Mesh) -> Images:
    """A whole set, the last image repeated until every device has as many."""
    count = -(-len(labels) // mesh.size) * mesh.size
    return place(pixels, labels, np.minimum(np.arange(count), len(labels) - 1), mesh)


def take(images: Images, rows: jax.Array) -> Images:
    """This device's share of `rows` [batch] of a whole set: each device sends what it holds of them where it goes."""
    held = len(images.labels)
    own = rows - lax.axis_index(AXIS) * held

    def share(values):
        here = jnp.expand_dims((own >= 0) & (own < held), range(1, values.ndim))
        found = jnp.where(here, values[jnp.clip(own, 0, held - 1)], jnp.zeros((), values.dtype))
        return lax.psum_scatter(found, AXIS, tiled=True)

    return jax.tree.map(share, images)


def channel_statistics(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation [3] of the channels of uint8 images [count, height, width, 3]."""
    levels = np.arange(256)
    counts = np.stack([np.bincount(images[..., channel].ravel(), minlength=256) for channel in range(3)])
    mean = counts @ levels / counts.sum(1)
    std = np.sqrt(counts @ levels**2 / counts.sum(1) - mean**2)
    return mean.astype(np.float32), std.astype(np.float32)


def averaging(decay: float) -> tuple[Callable, Callable]:
    """To start the average of the params and, as `after_step` of `make_steps`, to go on with it."""
    averager = optax.ema(decay)

    def after_step(carry: Carry) -> Carry:
        return carry._replace(average=averager.update(carry.params, carry.average)[1])

    return averager.init, after_step


def window(key: jax.Array, padded: jax.Array) -> jax.Array:
    """A window [32, 32, channels], anywhere in the square image `padded`."""
    count = len(padded) - 31
    for axis, start in enumerate(jax.random.randint(key, (2,), 0, count)):
        # Of all windows, rather than by dynamic_slice: of that the compiler for TPU makes a loop over the images.
        windows = [lax.slice_in_dim(padded, first, first + 32, axis=axis) for first in range(count)]
        padded = jnp.select([start == first for first in range(count)], windows)
    return padded


def cut_out(key: jax.Array, image: jax.Array, side: int) -> jax.Array:
    """`image` [32, 32, channels] with 0 in a square of `side` pixels around any pixel, in part outside near the edges.

    DeVries & Taylor 2017, "Improved Regularization of Convolutional Neural Networks with Cutout".
    """
    if side == 0:
        return image
    offsets = [jnp.arange(32) - middle + side // 2 for middle in jax.random.randint(key, (2,), 0, 32)]
    rows, columns = ((offset >= 0) & (offset < side) for offset in offsets)
    return jnp.where((rows[:, None] & columns)[..., None], 0, image)


def views(images: jax.Array, count: int) -> tuple[jax.Array, np.ndarray]:
    """Views [count, batch, 32, 32, 3] of the same images and the weights [count] of their logits.

    1: the images; 2: and their mirror images; 6: and both moved by a pixel, to the one corner and to the other.
    """
    if count == 6:
        padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
        images, weights = jnp.stack([images, padded[:, :-2, :-2], padded[:, 2:, 2:]]), np.array([1 / 2, 1 / 4, 1 / 4])
    else:
        images, weights = images[None], np.ones(1)
    if count > 1:
        images, weights = jnp.concatenate([images, images[..., ::-1, :]]), np.tile(weights, 2) / 2
    return images, weights.astype(np.float32)


def make_steps(
    apply: Callable,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    *,
    batch: int,
    mean: np.ndarray,
    std: np.ndarray,
    smoothing: float,
    dtype: jnp.dtype,
    augment: Callable,
    after_step: Callable[[Carry], Carry] = lambda carry: carry,
    view_count: int = 1,
    remat: bool = False,
) -> tuple[Callable, Callable]:
    """The two compiled programs, `train` and `evaluate`, for `apply(params, state, images, train=, axis_name=)`.

    train(carry, totals, images, order, key, count) makes `count` steps, several in a loop and compiled for each count,
    on the next images of a whole set in the `order` [images] of this epoch; it gives back carry and totals.
    evaluate(carry, totals, images, first, end) adds the next batch from image `first` on, up to `end`. `mean` and `std`
    [3] are those of the pixels. `augment(key, image, times_seen)` makes an input of an image, which was seen in so many
    epochs before; half of the images, drawn by `key`, are one ahead. `after_step` is the last of a step.
    Logits in evaluation are the mean of those of so many `views`. With `remat` only what convolutions give and the
    measured moments are kept for the backward pass. `carry` and `totals` are donated in training, `totals` in
    evaluation.
    """
    share = batch // mesh.size
    forward = partial(apply, train=True, axis_name=AXIS)
    if remat:
        forward = jax.checkpoint(forward, policy=REMAT_POLICY)

    def on_mesh(step, others):
        specs = (REPLICATED, REPLICATED, SHARDED, *[REPLICATED] * others)
        return jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=REPLICATED)

    def positions():
        return lax.axis_index(AXIS) * share + jnp.arange(share)

    def train_one(carry, totals, images, order, key):
        epoch, index = jnp.divmod(carry.step, len(order) // batch)
        rows = lax.dynamic_slice(order, (index * batch,), (batch,))
        pixels, labels = take(images, rows)
        # Every image has a key of its own, so the batch is the same however many devices share it.
        keys = jax.vmap(partial(jax.random.fold_in, jax.random.fold_in(key, carry.step)))(positions())
        ahead = jax.random.bernoulli(jax.random.fold_in(key, NO_STEP), shape=order.shape)[rows[positions()]]
        inputs = jax.vmap(augment)(keys, (pixels - mean) / std, epoch + ahead).astype(dtype)

        def loss(params):
            logits, state = forward(params, carry.state, inputs)
            targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
            return jnp.sum(optax.softmax_cross_entropy(logits, targets)) / batch, (logits, state)

        # check_vma is on: gradients of the replicated params arrive summed over the devices.
        (value, (logits, state)), gradients = jax.value_and_grad(loss, has_aux=True)(carry.params)
        updates, optimizer_state = optimizer.update(gradients, carry.optimizer, carry.params)
        params = optax.apply_updates(carry.params, updates)
        carry = after_step(Carry(params, state, optimizer_state, carry.step + 1, carry.average))
        return carry, add(totals, value * batch, logits, labels, jnp.ones(labels.shape, bool))

    @partial(jax.jit, static_argnums=5, donate_argnums=(0, 1))
    def train(carry, totals, images, order, key, count):
        def several(carry, totals, images, order, key):
            def one(moving, _):
                return train_one(*moving, images, order, key), None  # pyright: ignore[reportCallIssue]

            if count == 1:
                return train_one(carry, totals, images, order, key)
            return lax.scan(one, (carry, totals), None, length=count)[0]

        return on_mesh(several, 2)(carry, totals, images, order, key)

    @partial(jax.jit, donate_argnums=1)
    @partial(on_mesh, others=2)
    def evaluate(carry, totals, images, first, end):
        valid = first + positions() < end
        pixels, labels = take(images, jnp.minimum(first + jnp.arange(batch), end - 1))
        inputs = ((pixels - mean) / std).astype(dtype)
        inputs, weights = views(inputs, view_count)
        logits = lax.map(lambda view: apply(carry.params, carry.state, view, train=False)[0], inputs)
        logits = jnp.tensordot(weights, logits, 1)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return add(totals, jnp.sum(jnp.where(valid, losses, 0.0)), logits, labels, valid)

    def add(totals, loss, logits, labels, valid):
        correct = jnp.sum(valid & (jnp.argmax(logits, -1) == labels))
        return jax.tree.map(jnp.add, totals, lax.psum(Totals(loss, correct, jnp.sum(valid)), AXIS))

    return train, evaluate


def make_measure(apply: Callable, mesh: jax.sharding.Mesh, *, mean: np.ndarray, std: np.ndarray, dtype: jnp.dtype):
    """What `jbn.recalibrate` and `jbn.drift` apply, `measure(params, states, batch)`: images as in evaluation."""

    def measure(params, states, images):
        inputs = ((images.pixels - mean) / std).astype(dtype)
        _, states = apply(params, states, inputs, train=True, axis_name=AXIS)
        return None, states

    return jax.shard_map(measure, mesh=mesh, in_specs=(REPLICATED, REPLICATED, SHARDED), out_specs=REPLICATED)
