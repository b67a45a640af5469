"""The compiled steps of the CIFAR-10 example: augmentation, optimizer, one answer on any number of devices."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import model
import numpy as np
import pytest
import steps
from jax.ad_checkpoint import checkpoint_name

import jbn

pytestmark = pytest.mark.usefixtures("small")
BATCH, DEPTH, WIDTH = 16, 8, 4
AVERAGE, AFTER_STEP = steps.averaging(0.5)


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
def trained(small, images):
    """Carry, totals of training and evaluation after two steps, and params after each, on 1 and on 8 devices."""
    pixels, labels, mean, std = images
    optimizer = model.make_optimizer(0.1, 10, momentum=0.9, weight_decay=5e-4)
    params, state = model.init(jax.random.key(0), DEPTH, WIDTH)
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
            augment=model.augment,
            after_step=AFTER_STEP,
        )
        carry = steps.Carry(params, state, optimizer.init(params), jnp.zeros((), jnp.int32), AVERAGE(params))
        # copies: the steps give the memory of what they are passed to their results
        carry, totals, measured = put(jax.tree.map(jnp.copy, (carry, steps.Totals.zero(), steps.Totals.zero())))
        key, seen = put(jax.random.key(3)), []
        whole, order = steps.place_all(pixels, labels, mesh), put(jnp.arange(43)[::-1])
        for _ in range(2):
            carry, totals = train(carry, totals, whole, order, key, 1)
            seen.append(jax.device_get(carry.params))
        assert train._cache_size() == 1  # nothing that a step gives back makes the next one compile again
        for first in range(0, 43, BATCH):
            measured = evaluate(carry, measured, whole, first, 43)
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


@pytest.mark.parametrize("devices", [1, 8])
def test_every_device_takes_its_share_of_the_rows(images, devices):
    """Of 43 images, which 8 devices cannot share evenly, in any order and more than once."""
    pixels, labels, *_ = images
    mesh, rows = mesh_of(devices), np.random.default_rng(1).integers(43, size=BATCH)
    whole = steps.place_all(pixels, labels, mesh)
    assert {shard.data.shape[0] for shard in whole.pixels.addressable_shards} == {-(-43 // devices)}
    specs = {"in_specs": (steps.SHARDED, steps.REPLICATED), "out_specs": steps.SHARDED}
    taken = jax.jit(jax.shard_map(steps.take, mesh=mesh, **specs))(whole, rows)
    np.testing.assert_array_equal(taken.pixels, pixels[rows])
    np.testing.assert_array_equal(taken.labels, labels[rows])


@pytest.fixture(scope="module")
def small_steps(images):
    """What `make_steps` gives for a network of one layer, made once, a carry, and the operands behind the totals."""
    mesh, made = mesh_of(8), cache(partial(make_small_steps, images))

    def fresh(**options):
        programs, carry, rest = made(mesh, **options)
        return programs, jax.tree.map(jnp.copy, carry), rest  # the steps give the memory of what they are passed away

    return fresh


def make_small_steps(images, mesh, **options):
    pixels, labels, mean, std = images
    optimizer = model.make_optimizer(0.1, 10, momentum=0.9, weight_decay=5e-4)

    def apply(params, state, x, *, train, axis_name=None):
        y = checkpoint_name(jnp.mean(x, (1, 2)) @ params["kernel"] + x[:, 3, 5], "convolution")
        y, state = jbn.batch_norm(y, params["norm"], state, train=train, axis_name=axis_name, activation=jax.nn.relu)
        return y @ params["kernel"], state

    settings = {"batch": BATCH, "mean": mean, "std": std, "smoothing": 0.1, "dtype": jnp.dtype("float32")}
    params, state = jbn.init(3)
    params = {"kernel": jnp.eye(3), "norm": params}
    carry = steps.Carry(params, state, optimizer.init(params), jnp.zeros((), jnp.int32))
    put = partial(jax.device_put, device=jax.NamedSharding(mesh, steps.REPLICATED))
    rest = steps.place_all(pixels, labels % 3, mesh), put(jnp.arange(43)[::-1]), put(jax.random.key(3))
    carry = put((carry, steps.Totals.zero()))
    return steps.make_steps(apply, optimizer, mesh, augment=model.augment, **settings, **options), carry, rest


def test_a_loop_of_steps_is_the_steps(small_steps):
    """Two epochs of two steps: from the middle of the first one to the end of the second."""
    results = []
    for counts in ([1, 1, 1, 1], [1, 3]):
        (train, _), (carry, totals), rest = small_steps()
        for count in counts:
            carry, totals = train(carry, totals, *rest, count)
        results.append(jax.device_get((carry, totals)))
        assert train._cache_size() == len(results)  # for each count a program, and no other
    single, loop = results
    assert single[0].step == 4 and single[1].count == 4 * BATCH
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), single, loop)


def test_every_epoch_takes_its_order_from_the_start(small_steps):
    """The third step of epochs of two takes the first rows, and no others."""
    (train, _), (carry, totals), (whole, order, key) = small_steps()
    found = []
    for changed in (slice(0), slice(BATCH, None), slice(BATCH - 1, BATCH)):
        other = order.at[changed].set(7)
        moving = jax.tree.map(jnp.copy, (carry._replace(step=carry.step + 2), totals))
        found.append(float(train(*moving, whole, other, key, 1)[1].loss))
    assert found[0] == found[1] != found[2]


def count(jaxpr, name):
    """Of a primitive, with those of all programs inside."""
    inside = jax.tree.leaves([list(equation.params.values()) for equation in jaxpr.eqns])
    inner = [getattr(each, "jaxpr", each) for each in inside]
    found = sum(equation.primitive.name == name for equation in jaxpr.eqns)
    return found + sum(count(each, name) for each in inner if hasattr(each, "eqns"))


def test_remat_changes_nothing(small_steps):
    both, counts = [], []
    for options in ({}, {"remat": True}):
        (train, _), (carry, totals), rest = small_steps(**options)
        traced = train.trace(carry, totals, *rest, 1).jaxpr.jaxpr
        counts.append([count(traced, name) for name in ("max", "dot_general")])
        both.append(jax.device_get(train(carry, totals, *rest, 1)))
    (relus, products), (relus_of_remat, products_of_remat) = counts
    assert relus < relus_of_remat and products == products_of_remat
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), *both)


@pytest.mark.parametrize("count", [1, 2, 6])
def test_the_logits_of_all_views_are_averaged(images, small_steps, count):
    pixels, labels, mean, std = images
    (_, evaluate), (carry, totals), (whole, *_) = small_steps(view_count=count)
    found = evaluate(carry, totals, whole, 0, BATCH)
    inputs = np.float64((pixels[:BATCH] - mean) / std)
    padded = np.pad(inputs, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    moved = [inputs, inputs, padded[:, :-2, :-2], padded[:, 2:, 2:]] if count == 6 else [inputs]
    seen = [each[:, :, ::step] for each in moved for step in ((1, -1) if count > 1 else (1,))]
    slope = 1 / np.sqrt(1 + 1e-5)
    logits = np.mean([np.maximum((x.mean((1, 2)) + x[:, 3, 5]) * slope, 0) for x in seen], 0)
    losses = np.log(np.exp(logits).sum(-1)) - logits[np.arange(BATCH), labels[:BATCH] % 3]
    np.testing.assert_allclose(found.loss, losses.sum(), rtol=1e-5)


def test_nothing_seen_has_no_mean():
    assert steps.Totals.zero().means("test") == {"test_loss": None, "test_accuracy": None}


def test_a_crop_is_a_window_of_the_padded_image_flipped_or_not():
    image = jnp.arange(1.0, 32 * 32 * 3 + 1).reshape(32, 32, 3)
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (32, 32, 3))[:, :, 0]
    seen = set()
    for crop in jax.jit(jax.vmap(model.augment, (0, None)))(jax.random.split(jax.random.key(0), 500), image):
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
    params = jax.tree.map(lambda _: np.ones(3, np.float32), shapes)
    optimizer = model.make_optimizer(0.1, 10, momentum=0.9, weight_decay=0.5)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    moved = {
        jax.tree_util.keystr(path[-1:]) for path, leaf in jax.tree_util.tree_leaves_with_path(updates) if jnp.any(leaf)
    }
    assert moved == {"['kernel']"}
