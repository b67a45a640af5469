"""The compiled steps of training, evaluation and recalibration, data parallel over a mesh with the axis "data"."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from convolution import CPU_OPTIONS
from jax import lax
from jax.sharding import PartitionSpec

AXIS = "data"
REPLICATED, SHARDED = PartitionSpec(), PartitionSpec(AXIS)


class Carry(NamedTuple):
    """All that training changes, and so all that a checkpoint holds."""

    params: optax.Params
    state: dict
    optimizer: optax.OptState
    step: jax.Array  # [], int32
    average: optax.OptState = optax.EmptyState()  # the sum that `averaged` makes params of

    def averaged(self, decay: float) -> "Carry":
        """The same with averaged params in the place of those of the last step; the average starts without bias."""
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


class Batch(NamedTuple):
    """Images of one step, shared among the devices of a mesh."""

    pixels: jax.Array  # [batch, 32, 32, 3], uint8
    labels: jax.Array  # [batch], int32


def place(pixels: np.ndarray, labels: np.ndarray, rows: np.ndarray, mesh: jax.sharding.Mesh) -> Batch:
    """The images of `rows` [batch] on the devices of `mesh`; each process reads those of its own devices."""
    sharding = jax.NamedSharding(mesh, SHARDED)

    def share(values):
        def of_device(index) -> np.ndarray:
            return values[rows[index[0]]]

        return jax.make_array_from_callback((len(rows), *values.shape[1:]), sharding, of_device)

    return Batch(share(pixels), share(labels))


def channel_statistics(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation [3] of the channels of uint8 images [count, height, width, 3]."""
    levels = np.arange(256)
    counts = np.stack([np.bincount(images[..., channel].ravel(), minlength=256) for channel in range(3)])
    mean = counts @ levels / counts.sum(1)
    std = np.sqrt(counts @ levels**2 / counts.sum(1) - mean**2)
    return mean.astype(np.float32), std.astype(np.float32)


def make_optimizer(peak: float, steps: int, *, momentum: float, weight_decay: float) -> optax.GradientTransformation:
    """SGD with Nesterov momentum on a one-cycle schedule; weight decay on the kernels only, not on scale and bias."""

    def kernels(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1] == jax.tree_util.DictKey("kernel"), params)

    schedule = optax.cosine_onecycle_schedule(steps, peak, pct_start=0.25)
    return optax.chain(
        optax.add_decayed_weights(weight_decay, mask=kernels), optax.sgd(schedule, momentum=momentum, nesterov=True)
    )


def augment(key: jax.Array, image: jax.Array) -> jax.Array:
    """A random crop of `image` [32, 32, 3] padded by 4 on every side, flipped half of the time."""
    crop_key, flip_key = jax.random.split(key)
    top, left = jax.random.randint(crop_key, (2,), 0, 9)
    crop = lax.dynamic_slice(jnp.pad(image, ((4, 4), (4, 4), (0, 0))), (top, left, 0), image.shape)
    return jnp.where(jax.random.bernoulli(flip_key), crop[:, ::-1], crop)


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
    averager: optax.GradientTransformation | None = None,
) -> tuple[Callable, Callable]:
    """The two compiled steps, `train` and `evaluate`, for `apply(params, state, images, train=, axis_name=)`.

    train(carry, totals, batch, key) gives back carry and totals; evaluate(carry, totals, batch, count) adds the first
    `count` images of the batch. `mean` and `std` [3] are those of the pixels. `averager` takes the params after every
    step. `carry` and `totals` are donated in training, `totals` in evaluation.
    """
    share = batch // mesh.size
    averager = averager or optax.identity()

    def positions():
        return lax.axis_index(AXIS) * share + jnp.arange(share)

    def train(carry, totals, images, key):
        # Every image has a key of its own, so the batch is the same however many devices share it.
        keys = jax.vmap(partial(jax.random.fold_in, jax.random.fold_in(key, carry.step)))(positions())
        inputs = jax.vmap(augment)(keys, (images.pixels - mean) / std).astype(dtype)
        labels = images.labels

        def loss(params):
            logits, state = apply(params, carry.state, inputs, train=True, axis_name=AXIS)
            targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
            return jnp.sum(optax.softmax_cross_entropy(logits, targets)) / batch, (logits, state)

        # check_vma is on: gradients of the replicated params arrive summed over the devices.
        (value, (logits, state)), gradients = jax.value_and_grad(loss, has_aux=True)(carry.params)
        updates, optimizer_state = optimizer.update(gradients, carry.optimizer, carry.params)
        params = optax.apply_updates(carry.params, updates)
        _, average = averager.update(params, carry.average)
        carry = Carry(params, state, optimizer_state, carry.step + 1, average)
        return carry, add(totals, value * batch, logits, labels, jnp.ones(labels.shape, bool))

    def evaluate(carry, totals, images, count):
        valid = positions() < count
        inputs = ((images.pixels - mean) / std).astype(dtype)
        logits, _ = apply(carry.params, carry.state, inputs, train=False)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, images.labels)
        return add(totals, jnp.sum(jnp.where(valid, losses, 0.0)), logits, images.labels, valid)

    def add(totals, loss, logits, labels, valid):
        correct = jnp.sum(valid & (jnp.argmax(logits, -1) == labels))
        return jax.tree.map(jnp.add, totals, lax.psum(Totals(loss, correct, jnp.sum(valid)), AXIS))

    def compile_on_mesh(step, donated):
        specs = (REPLICATED, REPLICATED, SHARDED, REPLICATED)
        everywhere = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=REPLICATED)
        options = CPU_OPTIONS if mesh.devices.flat[0].platform == "cpu" else None
        return jax.jit(everywhere, donate_argnums=donated, compiler_options=options)

    return compile_on_mesh(train, (0, 1)), compile_on_mesh(evaluate, (1,))


def make_measure(apply: Callable, mesh: jax.sharding.Mesh, *, mean: np.ndarray, std: np.ndarray, dtype: jnp.dtype):
    """What `jbn.recalibrate` and `jbn.drift` apply, `measure(params, states, batch)`: images as in evaluation."""

    def measure(params, states, images):
        inputs = ((images.pixels - mean) / std).astype(dtype)
        _, states = apply(params, states, inputs, train=True, axis_name=AXIS)
        return None, states

    return jax.shard_map(measure, mesh=mesh, in_specs=(REPLICATED, REPLICATED, SHARDED), out_specs=REPLICATED)
