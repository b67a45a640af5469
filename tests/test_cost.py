"""What the compiler reports of memory and its traffic on a CPU: none of it depends on the clock.

The figures are exact for the version of JAX in constraints.txt, and are not looked at with another.
"""

from pathlib import Path

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest

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


# Arrays of the size of x that are read or written, from jax 0.11.1 on and before. Training: x, and two sixteenths of it
# written and read again; x and y; dy, and dy and x, for two sums, each by way of an eighth of it; dy, x and dx. With
# relu, inside or behind, x is read for the other sum as well; where it adds x, the masked dy is written and read.
# Before 0.11.1 there are no eighths, and with relu the masked dy is written, from x and dy, and read three times.
PASSES = {
    "training": (lambda y, x: y, True, None, 9.75, 9.25),
    "training, relu inside": (lambda y, x: y, True, jax.nn.relu, 10.75, 12.25),
    "training and relu": (lambda y, x: jax.nn.relu(y), True, None, 10.75, 12.25),
    "training, residual and relu": (lambda y, x: jax.nn.relu(y + x), True, None, 12.75, 12.25),
    "evaluation": (lambda y, x: y, False, None, 2, 2),
    "evaluation, relu inside": (lambda y, x: y, False, jax.nn.relu, 2, 2),
    "evaluation, residual and relu": (lambda y, x: jax.nn.relu(y + x), False, None, 2, 2),
}


@pytest.mark.parametrize(("after", "train", "activation", "passes", "before"), PASSES.values(), ids=PASSES)
def test_passes_over_x(after, train, activation, passes, before):
    compiled = one(after, train, activation)
    passes = passes if jax.__version_info__ >= (0, 11, 1) else before
    counted = hlo.traffic(compiled.as_text())[hlo.ONCE] / BYTES
    assert abs(counted - passes) < 0.02  # vectors
    assert compiled.memory_analysis().temp_size_in_bytes < (0.3 if passes < 11 else 1.3) * BYTES  # sums of rows; dy
