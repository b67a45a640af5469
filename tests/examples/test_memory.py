"""What the compiler reports of the example's training step on a CPU, with and without the measuring of statistics.

The figures are those of the version of JAX in constraints.txt, and are not looked at with another.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import model
import numpy as np
import optax
import pytest

import jbn

CONSTRAINTS = Path(__file__).resolve().parents[2] / "constraints.txt"
PINNED = {line.partition(";")[0] for line in CONSTRAINTS.read_text().splitlines()}
pytestmark = pytest.mark.skipif(f"jax=={jax.__version__}" not in PINNED, reason="figures of the pinned version of JAX")
BATCH = 16


def scale_and_bias(x, params, state, *, activation=None, **options):
    y = x * params.scale + params.bias
    return y if activation is None else activation(y), state


def compiled(normalize):
    """Loss and gradients of ResNet-8."""
    params, state = model.init(jax.random.key(0), 8)
    images, labels = jnp.ones((BATCH, 32, 32, 3)), jnp.zeros(BATCH, jnp.int32)

    def loss(params):
        logits, after = model.apply(params, state, images, depth=8, train=True, normalize=normalize)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels)), after

    return jax.jit(jax.grad(loss, has_aux=True)).lower(params).compile()


def test_memory_and_its_traffic():
    step, without = compiled(jbn.batch_norm), compiled(scale_and_bias)
    images = 4 * BATCH * np.prod([32, 32, 16])  # bytes of one array between the first layers
    memory, bare = (each.memory_analysis().temp_size_in_bytes / images for each in (step, without))
    assert memory == pytest.approx(11.55, rel=0.05)
    assert memory < 1.02 * bare  # what the backward pass keeps is what it would keep anyway
    assert step.cost_analysis()["bytes accessed"] / images == pytest.approx(158.3, rel=0.05)
