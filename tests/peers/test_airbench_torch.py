"""The example's airbench is the one in PyTorch: steps, what is learned, what is averaged, and evaluation."""

from functools import partial

import airbench
import compiling
import config
import data
import flax_norm
import jax
import jax.numpy as jnp
import jax_airbench
import numpy as np
import pytest
import steps

import jbn

torch = pytest.importorskip("torch")
import torch_airbench  # noqa: E402

BATCH, IMAGES, TEST, EPOCHS = 8, 16, 12, 3  # two steps an epoch; the last batch of the test is not full
OWN = {"width": 24, "batch": BATCH, "epochs": EPOCHS, "dtype": "float32", "peak_rate": 0.05, "weight_decay": 0.1}
SETTINGS = config.Config(**config.defaults("airbench", "paper") | OWN)


@pytest.fixture(scope="module", autouse=True)
def _compiled_quickly():
    compiling.quickly(True)


def random_images(count, seed):
    generator = np.random.default_rng(seed)
    pixels = generator.integers(256, size=(count, 32, 32, 3), dtype=np.uint8)
    return pixels, generator.integers(10, size=count, dtype=np.int32)


DATA = data.Dataset("random", *random_images(IMAGES, 0), *random_images(TEST, 1))


def assert_same(carry, training, tolerance):
    """Of every array, whatever differs by more than `tolerance` of its largest number."""
    theirs = training.network.state_dict()
    ours = torch_airbench.convert(carry.params, carry.state)
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        if array.is_floating_point():
            limit = tolerance * float(theirs[name].abs().max())
            np.testing.assert_allclose(array, theirs[name], rtol=0, atol=limit, err_msg=name)


def test_steps_and_evaluation():
    """The fifth of six steps is one to the average, and the sixth, the last, another."""
    ours = jax_airbench.Training(DATA, SETTINGS)
    theirs = torch_airbench.Training(DATA, SETTINGS)
    ours.start(0)
    theirs.start(0)
    assert_same(ours.carry, theirs, 0)
    params, state = jax.tree.map(jnp.copy, (ours.carry.params, ours.carry.state))
    # In PyTorch the first mean and variance count as data.
    ours.begin(params, {name: each._replace(weight=jnp.ones_like(each.weight)) for name, each in state.items()})
    close = partial(np.testing.assert_allclose, rtol=1e-4)  # float32 in another order
    for epoch in range(EPOCHS):
        for given, drawn in zip(ours.draw(epoch), theirs.draw(epoch), strict=True):
            close(ours.step(given), theirs.step(drawn))
            assert_same(ours.carry, theirs, 2e-4)
    assert int(ours.carry.step) == theirs.total == 6
    close(ours.evaluate(), theirs.evaluate())


@pytest.mark.parametrize("total", [6, 10])
def test_lookahead(total):
    """The last of six steps is none on which the average moves; the last of ten is."""
    generator = np.random.default_rng(0)
    fast = torch.zeros(3)
    lookahead = torch_airbench.Lookahead([fast], total)
    ours = jnp.zeros(3)
    carry = steps.Carry(ours, {}, (), jnp.zeros((), jnp.int32), (ours, {}))
    for step in range(1, total + 1):
        moved = generator.normal(size=3).astype(np.float32)
        fast += torch.from_numpy(moved)
        lookahead.step()
        carry = airbench.lookahead(carry._replace(params=ours + moved, step=jnp.array(step)), total)
        ours = jnp.asarray(carry.params)
        np.testing.assert_allclose(ours, fast, rtol=1e-5, err_msg=f"step {step}")


@pytest.mark.parametrize("train", [True, False])
def test_flax_norm(train):
    x = jax.random.normal(jax.random.key(0), (8, 5, 5, 3))
    params = jbn.Params(None, jnp.arange(3.0))
    state = jbn.State(jnp.full(3, 0.1), jnp.full(3, 2.0), jnp.ones(3))
    options = {"train": train, "decay": airbench.DECAY, "epsilon": airbench.EPSILON, "activation": jax.nn.gelu}
    y, after = jbn.batch_norm(x, params, state, unbiased=False, **options)
    peer_y, peer_after = flax_norm.batch_norm(x, params, state, axis_name=None, **options)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), (y, after), (peer_y, peer_after))
