"""The benchmark's network in Flax's own modules is the example's network."""

from functools import partial

import flax_resnet
import jax
import jax.numpy as jnp
import model
import numpy as np

DEPTH = 8


def test_flax_gives_the_same_logits_gradients_and_statistics():
    images = jax.random.normal(jax.random.key(0), (16, 32, 32, 3))
    params, state = model.init(jax.random.key(1), DEPTH)
    peer_params, peer_state = flax_resnet.convert(params)
    assert jax.tree.map(jnp.shape, peer_state) == jax.tree.map(
        jnp.shape, flax_resnet.ResNet(DEPTH).init(jax.random.key(0), images, False)["batch_stats"]
    )

    def loss(apply, params, state):
        logits, state = apply(params, state, images, depth=DEPTH, train=True)
        return jnp.mean(jnp.sin(logits)), (logits, state)

    run = jax.jit(jax.value_and_grad(loss, argnums=1, has_aux=True), static_argnums=0)
    (_, (logits, after)), gradient = run(model.apply, params, state)
    (_, (peer_logits, peer_after)), peer_gradient = run(flax_resnet.apply, peer_params, peer_state)
    # nine layers of float32, and Flax's variance as a difference of squares
    close = partial(np.testing.assert_allclose, rtol=2e-3, atol=2e-4)
    close(logits, peer_logits)
    jax.tree.map(close, flax_resnet.convert(gradient)[0], peer_gradient)
    for name, moved in after.items():
        peer = peer_after[flax_resnet.flat(name, "norm")]
        close(0.1 * moved.mean, peer["mean"])  # the first step: ours is debiased, Flax's a tenth of the way from 0
        count = len(images) * sides()[name] ** 2
        close(0.9 + 0.1 * moved.var * (count - 1) / count, peer["var"])


def sides() -> dict[str, int]:
    """Height of what each normalization sees."""
    side, found = 32, {"stem": 32}
    for name, _, _, stride in model.blocks(DEPTH):
        side //= stride
        found |= {f"{name}/{part}": side for part in ("conv1", "conv2", "shortcut")}
    return found
