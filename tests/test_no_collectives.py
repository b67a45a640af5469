"""JAX itself refuses what would communicate on explicit meshes: evaluation does not, training does across its rows.

`no_collectives` looks at every operation as it is traced, also at those that the compiler removes later: a backward
pass by x alone is traced with the sums for params. So this is of forward passes; tests/test_collectives.py counts the
messages of both in what is compiled.
"""

from functools import partial

import jax
import numpy as np
import pytest
import ways
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jbn

no_collectives = getattr(jax.sharding, "no_collectives", None)
pytestmark = pytest.mark.skipif(no_collectives is None, reason="jax.sharding.no_collectives came with jax 0.12")

FEATURES, GRID = 6, {"rows": 4, "features": 2}
WHOLE, ROWS, COLUMNS, BOTH = P(), P("rows"), P(None, None, "features"), P("rows", None, "features")
refused = partial(pytest.raises, Exception, match="forbidden by `no_collectives`")  # its class is not public


@pytest.fixture
def silent():
    """Run a function of x, params and state on a mesh, with no communication across the axes named."""
    mesh = ways.mesh(AxisType.Explicit, **GRID)

    def run(function, forbidden, of_x, of_values):
        x = jax.device_put(
            np.random.default_rng(0).standard_normal((16, 4, FEATURES), np.float32), NamedSharding(mesh, of_x)
        )
        values = jax.device_put(jbn.init(FEATURES), NamedSharding(mesh, of_values))
        with jax.set_mesh(mesh), no_collectives(forbidden):
            return x, jax.jit(function)(x, *values)

    return run


def step(x, params, state, train=True, **options):
    return jbn.batch_norm(x, params, state, train=train, **options)


@pytest.mark.parametrize(
    ("of_x", "of_values"), [(ROWS, WHOLE), (COLUMNS, P("features")), (BOTH, P("features")), (BOTH, WHOLE)]
)
@pytest.mark.parametrize("evaluate", [partial(step, train=False, activation=jax.nn.relu), jbn.normalize_running])
def test_evaluation(silent, evaluate, of_x, of_values):
    x, y = silent(evaluate, set(GRID), of_x, of_values)
    assert jax.tree.leaves(y)[0].sharding.is_equivalent_to(x.sharding, x.ndim)


@pytest.mark.parametrize("of_values", [WHOLE, P("features")])
@pytest.mark.parametrize("of_x", [ROWS, BOTH])
@pytest.mark.parametrize("train", [step, lambda x, params, state: jbn.normalize_batch(x, params)])
def test_training_across_rows_is_refused(silent, train, of_x, of_values):
    with refused():
        silent(train, {"rows"}, of_x, of_values)


def test_training_across_features(silent):
    silent(step, {"features"}, BOTH, P("features"))
    silent(step, set(GRID), COLUMNS, P("features"))


def test_values_that_lie_apart_are_gathered_where_the_features_are_whole(silent):
    with refused():
        silent(partial(step, train=False), {"features"}, ROWS, P("features"))


def test_named_axes(silent):
    """Evaluation that is told of an axis sends nothing across it."""

    def local(train):
        specs = {"in_specs": (ROWS, WHOLE, WHOLE), "out_specs": (ROWS, WHOLE)}
        return jax.shard_map(partial(step, train=train, axis_name="rows"), **specs)

    silent(local(False), set(GRID), ROWS, WHOLE)
    with refused():
        silent(local(True), {"rows"}, ROWS, WHOLE)
