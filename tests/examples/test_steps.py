"""The compiled steps of the CIFAR-10 example: augmentation, optimizer, one answer on any number of devices."""

from functools import partial

import jax
import jax.numpy as jnp
import model
import numpy as np
import optax
import pytest
import steps

import jbn

BATCH, DEPTH = 16, 8
AVERAGER = optax.ema(0.5)


def mesh_of(count):
    return jax.make_mesh(
        (count,), (steps.AXIS,), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:count]
    )


@pytest.fixture(scope="module")
def images():
    random = np.random.default_rng(0)
    pixels, labels = random.integers(256, size=(43, 32, 32, 3)), random.integers(10, size=43)
    pixels = pixels.astype(np.uint8)
    return pixels, labels.astype(np.int32), *steps.channel_statistics(pixels)


@pytest.fixture(scope="module")
def trained(images):
    """Carry, totals of training and evaluation after two steps, and params after each, on 1 and on 8 devices."""
    pixels, labels, mean, std = images
    optimizer = steps.make_optimizer(0.1, 10, momentum=0.9, weight_decay=5e-4)
    params, state = model.init(jax.random.key(0), DEPTH)
    results = {}
    for count in (1, 8):
        mesh = mesh_of(count)
        put = partial(jax.device_put, device=jax.NamedSharding(mesh, steps.REPLICATED))
        train, evaluate = steps.make_steps(
            partial(model.apply, depth=DEPTH),
            optimizer,
            mesh,
            batch=BATCH,
            mean=mean,
            std=std,
            smoothing=0.1,
            dtype=jnp.dtype("float32"),
            averager=AVERAGER,
        )
        carry = steps.Carry(params, state, optimizer.init(params), jnp.zeros((), jnp.int32), AVERAGER.init(params))
        # copies: the steps give the memory of what they are passed to their results
        carry, totals, measured = put(jax.tree.map(jnp.copy, (carry, steps.Totals.zero(), steps.Totals.zero())))
        key, seen = put(jax.random.key(3)), []
        for step in range(2):
            rows = np.arange(43)[::-1][step * BATCH : (step + 1) * BATCH]
            carry, totals = train(carry, totals, steps.place(pixels, labels, rows, mesh), key)
            seen.append(jax.device_get(carry.params))
        assert train._cache_size() == 1  # nothing that a step gives back makes the next one compile again
        for start in range(0, 43, BATCH):
            rows = np.minimum(start + np.arange(BATCH), 42)
            measured = evaluate(carry, measured, steps.place(pixels, labels, rows, mesh), 43 - start)
        results[count] = *jax.device_get((carry, totals, measured)), seen
    return results


def test_one_and_eight_devices_train_the_same_model(trained):
    one, eight = trained[1], trained[8]
    assert one[1].correct == eight[1].correct and one[1].count == eight[1].count == 2 * BATCH
    # two steps of float32 sums in another order
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-3, atol=2e-4), one[0], eight[0])


@pytest.mark.parametrize("devices", [1, 8])
def test_evaluation_counts_every_image_once(trained, images, devices):
    carry, _, measured, _ = trained[devices]
    pixels, labels, mean, std = images
    inputs = (pixels - mean) / std
    logits, _ = jax.jit(partial(model.apply, depth=DEPTH, train=False))(carry.params, carry.state, inputs)
    assert measured.count == 43
    assert measured.correct == np.sum(np.argmax(logits, -1) == labels)
    losses = np.log(np.exp(np.float64(logits)).sum(-1)) - np.take_along_axis(logits, labels[:, None], -1)[:, 0]
    np.testing.assert_allclose(measured.loss, losses.sum(), rtol=1e-4)  # float32


def test_averaged_params_are_those_after_each_step(trained):
    carry, _, _, seen = trained[8]
    wanted = jax.tree.map(lambda first, second: (0.25 * first + 0.5 * second) / 0.75, *seen)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), carry.averaged(0.5).params, wanted)


def test_recalibration_measures_the_images_of_evaluation(trained, images):
    (carry, *_), (pixels, labels, mean, std) = trained[8], images
    inputs, mesh = {"mean": mean, "std": std, "dtype": jnp.dtype("float32")}, mesh_of(8)
    measure = steps.make_measure(partial(model.apply, depth=DEPTH), mesh, **inputs)
    batches = [steps.place(pixels, labels, rows, mesh) for rows in np.arange(32).reshape(2, BATCH)]
    put = partial(jax.device_put, device=jax.NamedSharding(mesh, steps.REPLICATED))
    states = jbn.recalibrate(measure, put(carry.params), put(carry.state), batches, passes=1)
    stem = jax.lax.conv_general_dilated(
        (pixels[:32] - mean) / std,
        carry.params["stem"]["kernel"],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    found = np.float64(stem).reshape(-1, stem.shape[-1])
    np.testing.assert_allclose(states["stem"].mean, found.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(states["stem"].var, found.var(0, ddof=1), rtol=1e-5)


def test_nothing_seen_has_no_mean():
    assert steps.Totals.zero().means("test") == {"test_loss": None, "test_accuracy": None}


def test_a_crop_is_a_window_of_the_padded_image_flipped_or_not():
    image = jnp.arange(1.0, 32 * 32 * 3 + 1).reshape(32, 32, 3)
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (32, 32, 3))[:, :, 0]
    seen = set()
    for crop in jax.vmap(steps.augment, (0, None))(jax.random.split(jax.random.key(0), 500), image):
        for flipped in (False, True):
            same = np.all(windows == np.asarray(crop[:, ::-1] if flipped else crop), axis=(2, 3, 4))
            seen.update((int(top), int(left), flipped) for top, left in np.argwhere(same))
    assert len(seen) > 140 and len({where[:2] for where in seen}) > 78  # of 162 and 81


def test_channel_statistics(images):
    pixels, _, mean, std = images
    np.testing.assert_allclose(mean, pixels.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(std, pixels.std((0, 1, 2)), rtol=1e-6)


def test_weight_decay_touches_kernels_only():
    shapes, _ = jax.eval_shape(partial(model.init, depth=DEPTH), jax.random.key(0))
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), shapes)
    optimizer = steps.make_optimizer(0.1, 10, momentum=0.9, weight_decay=0.5)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    moved = {
        jax.tree_util.keystr(path[-1:]) for path, leaf in jax.tree_util.tree_leaves_with_path(updates) if jnp.any(leaf)
    }
    assert moved == {"['kernel']"}
