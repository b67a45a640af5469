"""What the compiler reports of memory and its traffic on a CPU: none of it depends on the clock.

The figures are exact for the version of JAX in constraints.txt, and are not looked at with another.
"""

from pathlib import Path

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

import jbn

CONSTRAINTS = Path(__file__).resolve().parents[1] / "constraints.txt"
PINNED = {line.partition(";")[0] for line in CONSTRAINTS.read_text().splitlines()}
pytestmark = pytest.mark.skipif(f"jax=={jax.__version__}" not in PINNED, reason="figures of the pinned version of JAX")
SHAPE = (128, 8, 8, 16)
BYTES = 4 * np.prod(SHAPE)


def one(after, train=True, activation=None):
    """The compiled program of one normalization, and of what comes `after` it, forward and, in training, backward."""
    x = dy = jnp.ones(SHAPE)
    params, state = jbn.init(SHAPE[-1])

    def step(x, dy, params, state):  # the state as an argument: a center that is known to be 0 is no center
        def forward(x, params):
            y, new = jbn.batch_norm(x, params, state, train=train, activation=activation)
            return after(y, x), new

        if not train:
            return forward(x, params)[0]
        y, pullback, new = jax.vjp(forward, x, params, has_aux=True)
        return y, new, pullback(dy)

    return jax.jit(step).lower(x, dy, params, state).compile()


# Arrays of the size of x that are read or written. Training: x for both sums, by way of some sixteenths, two sums and
# what is looked at, which is counted as all of x; x and y; dy for its sum; dy and x for the other; dy, x and dx. With
# relu, inside or behind, dy is masked first, by what x says: x, dy, and the masked dy.
PASSES = {
    "training": (lambda y, x: y, True, None, 10.4),
    "training, relu inside": (lambda y, x: y, True, jax.nn.relu, 13.4),
    "training and relu": (lambda y, x: jax.nn.relu(y), True, None, 13.4),
    "training, residual and relu": (lambda y, x: jax.nn.relu(y + x), True, None, 13.4),
    "evaluation": (lambda y, x: y, False, None, 2),
    "evaluation, relu inside": (lambda y, x: y, False, jax.nn.relu, 2),
    "evaluation, residual and relu": (lambda y, x: jax.nn.relu(y + x), False, None, 2),
}


@pytest.mark.parametrize(("after", "train", "activation", "passes"), PASSES.values(), ids=PASSES)
def test_passes_over_x(after, train, activation, passes):
    compiled = one(after, train, activation)
    assert round(hlo.traffic(compiled.as_text())[hlo.ONCE] / BYTES, 1) == passes
    assert compiled.memory_analysis().temp_size_in_bytes < (0.2 if passes < 13 else 1.2) * BYTES  # with sums of rows


def test_what_makes_x_is_written_once():
    """In a chain of normalizations of sums, XLA would compute all before again in the sums of each."""

    def passes(layers):
        def chain(x, weight, params, state):
            for _ in range(layers):
                x = jbn.batch_norm(x + jax.nn.relu(x @ weight), params, state, train=True)[0]
            return x

        x = jnp.ones((512, SHAPE[-1]))
        text = jax.jit(chain).lower(x, jnp.eye(SHAPE[-1]), *jbn.init(SHAPE[-1])).compile().as_text()
        return hlo.traffic(text)[hlo.ONCE] / x.nbytes

    assert passes(4) - passes(3) == pytest.approx(passes(3) - passes(2))


@pytest.mark.parametrize("rows", [4096, 4093], ids=["rows at a time", "not to be cut"])
def test_sums_of_rows_are_those_of_all(rows):
    """By real weights, beside the float64 formula; what cannot be cut is read for each sum."""
    random = np.random.default_rng(0)
    x = random.normal(3, 2, (rows, 5)).astype(np.float32)
    weights = random.uniform(0, 2, (rows, 1)).astype(np.float32)
    measure = jax.jit(lambda x, weights, center: jbn.moments(x, weights=weights, center=center))
    found = measure(x, weights, jnp.full(5, 2.5))
    _, mean, var = reference.moments(x, weights)
    np.testing.assert_allclose(found.mean, mean, rtol=1e-6)
    np.testing.assert_allclose(found.var, var, rtol=1e-5)  # sums of thousands, in parts
    if rows == 4093:  # x for each of two sums
        assert round(hlo.traffic(measure.lower(x, None, jnp.ones(5)).compile().as_text())[hlo.ONCE] / x.nbytes) == 2
