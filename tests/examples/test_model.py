"""The ResNet of the CIFAR-10 example."""

from functools import partial

import jax
import jax.numpy as jnp
import model
import numpy as np
import pytest


@pytest.mark.parametrize("depth", model.DEPTHS)
def test_depth_counts_the_layers_with_weights(depth):
    params, state = jax.eval_shape(partial(model.init, depth=depth), jax.random.key(0))
    assert sum("shortcut" not in name for name in params) == depth
    assert params.keys() - state.keys() == {"head"}


def test_parameters_of_resnet_20():
    # He et al. 2015, table 6, gives 0.27 M for ResNet-20; the two projection shortcuts add 16 x 32 + 32 x 64 and norms.
    params, _ = model.init(jax.random.key(0), 20)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 269_722 + 16 * 32 + 32 * 64 + 2 * (32 + 64)


def test_kernels_have_the_variance_of_he():
    params, _ = model.init(jax.random.key(0), 20)
    for name in ("stage1/block1/conv1", "stage2/block2/conv2"):
        kernel = params[name]["kernel"]
        # 9,216 and 36,864 draws: their variance is within 5 % of the one drawn from
        np.testing.assert_allclose(kernel.var(), 2 / np.prod(kernel.shape[:3]), rtol=0.05)


def test_zero_last_scale_starts_each_block_as_its_shortcut():
    images = jax.random.normal(jax.random.key(1), (4, 32, 32, 3))
    params, state = model.init(jax.random.key(0), 8, zero_last_scale=True)
    logits, _ = model.apply(params, state, images, depth=8, train=True)
    changed = {**params, "stage2/block0/conv1": jax.tree.map(lambda leaf: leaf + 1, params["stage2/block0/conv1"])}
    np.testing.assert_array_equal(logits, model.apply(changed, state, images, depth=8, train=True)[0])
    assert jnp.std(logits) > 0.1


def test_evaluation_leaves_the_state_and_treats_images_one_by_one():
    images = jax.random.normal(jax.random.key(1), (4, 32, 32, 3))
    params, state = model.init(jax.random.key(0), 8)
    _, state = model.apply(params, state, images, depth=8, train=True)
    logits, same = model.apply(params, state, images, depth=8, train=False)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), same, state))
    # single images take other paths through the convolution's sums than a batch does
    np.testing.assert_allclose(model.apply(params, state, images[:1], depth=8, train=False)[0], logits[:1], atol=1e-4)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_statistics():
    images = jax.random.normal(jax.random.key(1), (4, 32, 32, 3), jnp.bfloat16)
    params, state = model.init(jax.random.key(0), 8)
    logits, state = model.apply(params, state, images, depth=8, train=True)
    assert logits.dtype == jnp.float32 and {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype("float32")}
