"""The network for speed: what it starts from and how it is trained. tests/peers has PyTorch's steps."""

import dataclasses
from functools import partial

import airbench
import config
import data
import jax
import jax.numpy as jnp
import model
import numpy as np
import optax
import pytest
import recipes
import steps

RANDOM = np.random.default_rng(0)


@pytest.fixture(scope="module")
def network():
    """Params and state of two features in the first stage, and the images that its first layer whitens."""
    rough = RANDOM.normal(128, 50, (40, 33, 33, 1)) + RANDOM.normal(0, 20, (40, 33, 33, 3))
    smooth = rough[:, 1:, 1:] + rough[:, :-1, 1:] + rough[:, 1:, :-1]
    pixels = np.clip(smooth / 3, 0, 255).astype(np.uint8)
    mean, std = steps.channel_statistics(pixels)
    kernel = airbench.whitening(pixels, mean, std)
    return *airbench.init(jax.random.key(0), kernel, width=8), (pixels - mean) / std


def test_the_first_layer_whitens(network):
    params, _, images = network
    kernel = np.float64(params["whitening"]["kernel"]).reshape(12, 24)
    windows = (
        np.lib.stride_tricks.sliding_window_view(images, (2, 2), (1, 2)).transpose(0, 1, 2, 4, 5, 3).reshape(-1, 12)
    )
    white = windows @ kernel
    np.testing.assert_array_equal(white[:, 12:], -white[:, :12])
    covariance = white[:, :12].T @ white[:, :12] / len(white)
    values = np.linalg.eigvalsh(windows.T @ windows / len(windows))
    np.testing.assert_allclose(covariance, np.diag(values / (values + 5e-4)), atol=1e-3)


def test_convolutions_start_by_passing_their_inputs_on(network):
    params, state, _ = network
    assert list(state) == [name for name, *_ in airbench.layers(8)]
    for name, inputs, outputs in airbench.layers(8):
        kernel, norm = params[name]["kernel"], params[name]["norm"]
        passes = min(inputs, outputs)
        x = RANDOM.standard_normal((2, 5, 5, inputs)).astype(np.float32)
        np.testing.assert_allclose(airbench.plain(x, kernel)[..., :passes], x[..., :passes], rtol=1e-6)
        assert kernel.shape[-1] == outputs and np.all(abs(kernel[..., passes:]) <= 1 / np.sqrt(9 * inputs))
        assert norm.scale is None and norm.bias.shape == (outputs,)


def test_an_image_is_flipped_in_every_second_pass_and_moved_by_two_pixels():
    image = jnp.arange(1.0, 32 * 32 * 3 + 1).reshape(32, 32, 3)
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (32, 32, 3))[:, :, 0]
    augment = jax.jit(jax.vmap(airbench.augment, (0, None, 0)))
    keys = jax.random.split(jax.random.key(0), 200)
    for times_seen in (0, 1, 2, 3):
        seen = set()
        for made in np.asarray(augment(keys, image, jnp.full(200, times_seen))):
            same = np.all(windows == (made[:, ::-1] if times_seen % 2 else made), axis=(2, 3, 4))
            seen.update(map(tuple, np.argwhere(same)))
        assert len(seen) == 25


@pytest.mark.parametrize("augment", [airbench.augment, model.augment])
def test_images_move_as_far_as_asked_and_lose_a_square(augment):
    """Around any pixel, 4 of its side of 4 rows and columns or fewer, at the edges."""
    image = jnp.arange(1.0, 32 * 32 * 3 + 1).reshape(32, 32, 3)
    keys = jax.random.split(jax.random.key(0), 500)
    moved = jax.jit(jax.vmap(partial(augment, image=image, times_seen=0, moves=1)))(keys)
    assert len(np.unique(moved, axis=0)) == 9 * (1 if augment is airbench.augment else 2)
    whole = jax.jit(jax.vmap(partial(augment, image=image, times_seen=0, moves=0)))(keys)
    cut = np.asarray(jax.jit(jax.vmap(partial(augment, image=image, times_seen=0, moves=0, cutout=4)))(keys))
    lost = (cut == 0).all(-1)
    np.testing.assert_array_equal(cut, np.where(lost[..., None], 0, whole))
    rows, columns = lost.any(2), lost.any(1)
    np.testing.assert_array_equal(lost, rows[:, :, None] & columns[:, None])
    for span in (rows, columns):
        first, count = span.argmax(1), span.sum(1)
        assert set(count) == {2, 3, 4} and (np.diff(span.astype(int), prepend=0) == 1).sum() == 500
        assert len(set(first)) > 25 and ((count == 4) | (first == 0) | (first + count == 32)).all()


@pytest.mark.parametrize(("network_name", "augment"), [("airbench", airbench.augment), ("resnet", model.augment)])
def test_a_recipe_augments_as_its_options_say(network_name, augment):
    pixels = RANDOM.integers(256, size=(8, 32, 32, 3), dtype=np.uint8)
    dataset = data.Dataset("random", pixels, np.zeros(8, np.int32), pixels, np.zeros(8, np.int32))
    settings = config.Config(**config.defaults(network_name, "paper"))
    image, key = jnp.asarray(pixels[0], jnp.float32), jax.random.key(1)
    assert jnp.array_equal(recipes.make(settings, dataset, 10).augment(key, image, 1), augment(key, image, 1))
    given = recipes.make(dataclasses.replace(settings, moves=1, cutout=5), dataset, 10).augment(key, image, 1)
    assert jnp.array_equal(given, augment(key, image, 1, moves=1, cutout=5))
    for less in ({"moves": 1}, {"cutout": 5}):
        assert not jnp.array_equal(given, augment(key, image, 1, **less))


def test_steps_of_the_optimizer(network):
    """Without momentum: the kernels by the rate, biases by 64 of them, both with the decay of a step; one layer not."""
    params, _, _ = network
    ones = jax.tree.map(jnp.ones_like, params)
    optimizer = airbench.make_optimizer(0.5, 100, momentum=0.0, weight_decay=0.1)
    state, rates = optimizer.init(ones), []
    for _ in range(100):
        updates, state = optimizer.update(ones, state, ones)
        layer = updates["stage0/conv0"]
        rates.append((-layer["kernel"].max(), -layer["norm"].bias.max()))
    kernels, biases = np.array(rates).T
    schedule = np.interp(np.arange(100), [0, 23, 100], [0.2, 1, 0.07])
    np.testing.assert_allclose(kernels, 0.5 * schedule * 1.1, rtol=1e-5)
    np.testing.assert_allclose(biases, 0.5 * schedule * (64 + 0.1), rtol=1e-5)
    np.testing.assert_array_equal(updates["whitening"]["kernel"], 0)


def test_lookahead():
    """Of 12 steps, the average moves and is moved to in the fifth and the tenth, and is moved to in the last."""
    fast = {"params": {"w": jnp.float32(0)}, "state": {"mean": jnp.float32(0)}}
    carry = steps.Carry(
        fast["params"], fast["state"], optax.EmptyState(), jnp.int32(0), (fast["params"], fast["state"])
    )
    after_step = jax.jit(partial(airbench.lookahead, total=12))
    w = slow = 0.0
    for step in range(1, 13):
        w += step
        moved = jax.tree.map(lambda leaf, step=step: leaf + step, (carry.params, carry.state))
        carry = after_step(carry._replace(params=moved[0], state=moved[1], step=jnp.int32(step)))
        if step in (5, 10):
            decay = 0.95**5 * (step / 12) ** 3
            w = slow = decay * slow + (1 - decay) * w
        if step == 12:
            w = slow
        for leaf in jax.tree.leaves((carry.params, carry.state)):
            np.testing.assert_allclose(leaf, w, rtol=1e-6)


def test_features_of_any_width_and_dtype(network):
    params, state, images = network
    for dtype in ("float32", "bfloat16"):
        apply = jax.jit(partial(airbench.apply, train=True))
        logits, new_state = apply(params, state, jnp.asarray(images[:8], dtype))
        assert logits.shape == (8, 10) and logits.dtype == jnp.float32 and np.isfinite(logits).all()
        assert {leaf.dtype for leaf in jax.tree.leaves(new_state)} == {jnp.dtype("float32")}
