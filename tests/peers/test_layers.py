"""What every layer of LAYERS promises, beside the framework's own layer and float64 NumPy.

Tolerances: both sides round sums of up to 120 float32 values near 1 to 10 in their own order, some 1e-6 of the
largest; two layers and ten steps of training add up.
"""

import frameworks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from frameworks import BATCHES, FLAX, LAYERS, MOMENTUM, ROWS, TARGETS, X
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from numpy.testing import assert_allclose, assert_array_equal

import jbn

CLOSE = 2e-5
WIDE = np.random.default_rng(1).normal(2, 3, (16, 5, 3)).astype(np.float32)
MESH = jax.make_mesh((8,), ("i",), axis_types=(AxisType.Auto,))
WHOLE, PARTS = PartitionSpec(), PartitionSpec("i")


def name(case):
    return getattr(case, "name", str(case))


every_layer = pytest.mark.parametrize("layer", LAYERS, ids=name)
every_layer_of_flax = pytest.mark.parametrize("layer", FLAX, ids=name)


def same(got, expected, tolerance=CLOSE):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=tolerance, atol=tolerance), got, expected)


def expected(layer, x, mask=None, axis=-1, unbiased=False):
    """(y, state) of the first step in float64."""
    measured = reference.moments(x, mask, axis)
    start = jbn.State(0.0, 1.0, 1.0 if layer.flax else 0.0)
    y = reference.normalize(x, *measured[1:], np.ones_like(measured[1]), 0 * measured[1], feature_axis=axis)
    mean, var, weight = reference.update(start, measured, MOMENTUM, unbiased=unbiased)
    return np.where(reference.full_weights(x, mask, axis) > 0, y, 0), jbn.State(mean, var, np.full(mean.shape, weight))


def by_hand(linear, x):
    """The mean and variance that every normalization of `linear`, (kernel, bias, ...), is given, and y, in float64."""
    found, x = [], np.float64(x)
    for kernel, bias, *affine in linear:
        x = x @ np.float64(kernel) + np.float64(bias)
        _, mean, var = reference.moments(x)
        found.append((mean, var))
        x = np.maximum(reference.normalize(x, mean, var, *(affine or (np.ones_like(mean), 0 * mean))), 0)
    return found, x


@pytest.mark.parametrize("layer", [*LAYERS, frameworks.Nnx(jbn.nnx.BatchNorm, graph=False)], ids=name)
def test_ten_steps_are_those_of_the_framework(layer):
    ours, theirs = layer.network(), layer.network(own=True)
    before = layer.evaluate(ours, BATCHES[0])
    for x, target in zip(BATCHES, TARGETS, strict=True):
        (ours, loss), (theirs, their_loss) = (layer.step(model, x, target) for model in (ours, theirs))
        same((loss, layer.params(ours), layer.states(ours)), (their_loss, layer.params(theirs), layer.states(theirs)))
    after = layer.evaluate(ours, BATCHES[0])
    if layer.flax:
        same(after, layer.evaluate(theirs, BATCHES[0]))
    assert abs(after - before).max() > 0.1  # there was something to compare


@every_layer
def test_an_activation_inside(layer):
    """A second relu behind the first changes nothing; tanh is seen."""
    inside, plain = layer.network(activation=jax.nn.relu), layer.network()
    for x, target in zip(BATCHES[:3], TARGETS, strict=False):
        (inside, loss), (plain, plain_loss) = (layer.step(model, x, target) for model in (inside, plain))
        same((loss, layer.params(inside), layer.states(inside)), (plain_loss, layer.params(plain), layer.states(plain)))
    same(*(layer.evaluate(model, BATCHES[0]) for model in (inside, plain)))
    assert_allclose(layer.first(X, activation=jnp.tanh)[0], np.tanh(layer.first(X)[0]), atol=1e-6)


@every_layer
def test_unbiased(layer):
    same(layer.first(X, unbiased=True), expected(layer, X, unbiased=True))


@pytest.mark.parametrize(("layer", "axis"), [(layer, axis) for layer in LAYERS for axis in layer.axes], ids=name)
def test_feature_axes(layer, axis):
    options = {} if axis == -1 else {"axis": axis}
    given = (3,) if axis == (3, -1) else axis
    same(layer.first(X, **options), expected(layer, X, axis=given))


@every_layer
@pytest.mark.parametrize("shape", [(8, 1), (8, 3), (2, 5, 3), (1, 4, 1)])
def test_shapes(layer, shape):
    x = np.random.default_rng(0).normal(3, 2, shape).astype(np.float32)
    same(layer.first(x), expected(layer, x))


@every_layer
@pytest.mark.parametrize("shape", [(4, 5, 6, 1), (4, 1, 1, 1), (6, 1), (3,), (4, 5, 6, 3)])
def test_a_mask_broadcasts_by_leading_axes(layer, shape):
    mask = np.random.default_rng(2).uniform(size=shape) < 0.6
    mask = mask | (shape == (3,))
    full = np.broadcast_to(mask, X.shape)
    ours = layer.first(X, mask)
    same(ours, expected(layer, X, full))
    # Flax's are masks of whatever dtype; Equinox's 0 and 1 as numbers are real weights, rounded in another order.
    spoiled = layer.first(np.where(full, X, np.nan), mask.astype(np.float32))
    same(spoiled, ours, 0 if layer.flax else 1e-6)


@every_layer
def test_a_mask_that_leaves_a_feature_nothing(layer):
    y, state = layer.first(X, np.array([True, False, True]))
    assert not y[..., 1].any()
    assert state.mean[1] == 0 and state.var[1] == 1
    assert state.mean[0] != 0


@every_layer
def test_one_feature_does_not_spoil_its_statistics(layer):
    x = X.copy()
    x[0, 0, 0, 0], x[..., 1] = np.nan, x[..., 1] + 1e6
    _, state = layer.first(x)
    assert state.mean[0] == 0 and state.var[0] == 1
    assert_allclose(state.mean[1], x[..., 1].mean(), rtol=1e-6)  # starts anew
    assert_allclose(state.mean[2], expected(layer, X)[1].mean[2], rtol=1e-5)


@every_layer
@pytest.mark.parametrize("given", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("dtype", [None, jnp.float32, jnp.bfloat16])
def test_dtypes(layer, given, dtype):
    """`dtype` is that of the output in Flax, and that of scale and bias in Equinox."""
    x = jnp.asarray(X, given)
    y, state = layer.first(x, dtype=dtype)
    their_y, their_state = expected(layer, np.float64(x))
    assert y.dtype == ((dtype or given) if layer.flax else given)
    assert {np.dtype(field.dtype) for field in state} == {np.dtype(np.float32)}
    same(state, their_state)
    # y is below 4 and rounded once: half a unit in the last place.
    assert_allclose(np.float64(y), their_y, rtol=0, atol=max(2 * jnp.finfo(y.dtype).eps, CLOSE))


@every_layer_of_flax
@pytest.mark.parametrize("dtype", [None, jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("given", [np.int32, np.uint8, np.bool_])
def test_whole_numbers(layer, given, dtype):
    x = (np.abs(X) > 2).astype(given) if given == np.bool_ else np.abs(10 * X).astype(given)
    y, state = layer.first(x, dtype=dtype)
    their_y, their_state = expected(layer, x)
    assert y.dtype == (dtype or jnp.float32)
    same(state, their_state)
    epsilon = 4 * float(jnp.finfo(y.dtype).eps)
    assert_allclose(np.float64(y), their_y, rtol=epsilon, atol=epsilon)


@pytest.mark.parametrize("layer", [layer for layer in LAYERS if layer.float64 is not None], ids=name)
def test_float64(layer):
    with jax.enable_x64(True):
        y, state = layer.first(jnp.asarray(X, jnp.float64), **layer.float64)
        assert {np.dtype(each.dtype) for each in (y, *state)} == {np.dtype(np.float64)}
        same((y, state), expected(layer, np.float64(X)), 1e-12)


@every_layer_of_flax
def test_a_checkpoint_of_either_goes_on_in_the_other(layer):
    for own in (True, False):
        written = layer.train(layer.network(own=own), range(3))
        read = layer.read(layer.network(own=not own), written)
        same(*(layer.evaluate(model, BATCHES[0]) for model in (read, written)))
        read, written = (layer.train(model, range(3, 6)) for model in (read, written))
        same(*((layer.params(model), layer.states(model)) for model in (read, written)))


@pytest.mark.parametrize(("layer", "how"), [(layer, how) for layer in FLAX for how in layer.hands], ids=name)
def test_statistics_without_a_weight_are_full_evidence(layer, how):
    """Also in the place of the initial ones, where the weight is still the 0 of the start."""
    theirs = layer.train(layer.network(own=True), range(3))
    ours = layer.hand(layer.network(debias=True), theirs, how)
    ours, theirs = (layer.train(model, range(3, 6)) for model in (ours, theirs))
    same((layer.params(ours), layer.states(ours)), (layer.params(theirs), layer.states(theirs)))


@every_layer_of_flax
def test_a_weight_that_is_there_is_kept(layer):
    written = layer.train(layer.network(debias=True), range(3))
    plain, theirs = (layer.hand(layer.network(own), written) for own in (False, True))
    outputs = [layer.evaluate(model, BATCHES[0]) for model in (written, plain, theirs)]
    same(outputs[1], outputs[0], 0)
    same(outputs[2], outputs[0])
    plain, written = (layer.train(model, range(3, 6)) for model in (plain, written))
    same(*((layer.params(model), layer.states(model)) for model in (plain, written)), 0)
    assert_allclose(layer.states(plain)["norm_b"].weight, 1 - MOMENTUM**6, rtol=1e-6)


@every_layer
def test_debias_is_exact_from_the_first_step(layer):
    apply, variables = layer.alone(X, **({"debias": True} if layer.flax else {}))
    start = layer.state(variables)
    assert [np.unique(field).tolist() for field in start] == [[0], [1], [0]]
    seen = []
    for step in range(6):
        x = np.random.default_rng(step).normal(step, 1 + step, X.shape).astype(np.float32)
        _, variables = apply(variables, x)
        seen.append(reference.moments(x)[1:])
        mean, var = np.average(seen, axis=0, weights=MOMENTUM ** np.arange(len(seen))[::-1])
        # The first is measured about 0, one standard deviation or so from its mean: 1e-6. Sums of 120 values.
        state = layer.state(variables)
        assert_allclose(state.mean, mean, rtol=1e-5, atol=1e-6)
        assert_allclose(state.var, var, rtol=1e-5)
        assert_allclose(state.weight, 1 - MOMENTUM ** len(seen), rtol=1e-5)


@every_layer_of_flax
def test_debias_where_a_batch_leaves_no_evidence(layer):
    """A weight of 0 that training itself leaves is no evidence: as the function, feature by feature."""
    x = X.copy()
    x[..., 0], x[0, 0, 0, 1] = x[..., 0] + 1e6, np.nan
    (apply, variables), (params, state) = layer.alone(X, debias=True), jbn.init(3)
    for batch in (x, x, X + 1e6, X):
        _, variables = apply(variables, batch)
        _, state = jbn.batch_norm(batch, params, state, train=True, decay=MOMENTUM, unbiased=False)
        for got, field in zip(layer.state(variables), state, strict=True):
            assert_allclose(got, field, rtol=1e-6, atol=0)


@every_layer
def test_under_remat_statistics_move_once(layer):
    plain, wrapped = (layer.step(layer.network(), BATCHES[0], TARGETS[0], remat=remat) for remat in (False, True))
    same(*((loss, layer.params(model), layer.states(model)) for model, loss in (wrapped, plain)))


@every_layer
@pytest.mark.parametrize("how", ["shard_map", "vmap"])
def test_pooled_over_a_named_axis(layer, how):
    apply, variables = layer.alone(WIDE, axis_name="i" if layer.flax else ("i",))
    if how == "vmap":
        x = WIDE.reshape(8, 2, *WIDE.shape[1:])
        y, variables = jax.vmap(apply, axis_name="i", in_axes=(None, 0), out_axes=(0, None))(variables, x)
    else:
        specs = {"in_specs": (WHOLE, PARTS), "out_specs": (PARTS, WHOLE), "check_vma": layer.check_vma}
        y, variables = jax.jit(jax.shard_map(apply, mesh=MESH, **specs))(variables, WIDE)
    same((y.reshape(WIDE.shape), layer.state(variables)), expected(layer, WIDE))


@every_layer
def test_a_sharded_batch_under_jit(layer):
    apply, variables = layer.alone(WIDE)
    y, variables = jax.jit(apply)(variables, jax.device_put(WIDE, NamedSharding(MESH, PARTS)))
    assert len(y.sharding.device_set) == 8
    same((y, layer.state(variables)), expected(layer, WIDE))


def exactly(states, statistics):
    for state, (mean, var) in zip(states, statistics, strict=True):
        # Float32 values behind two products of matrices: some 1e-6 of a standard deviation.
        assert_allclose((state.mean - mean) / np.sqrt(var), 0, atol=1e-5)
        assert_allclose(state.var, var, rtol=1e-5)
        assert_array_equal(state.weight, 1)


@pytest.mark.parametrize(
    ("layer", "options"),
    [*((layer, {}) for layer in LAYERS), *((layer, {"debias": True}) for layer in FLAX)],
    ids=name,
)
class TestRecalibration:
    def test_is_exact_and_drift_says_so(self, layer, options):
        model = layer.train(layer.network(**options), range(3))
        batches = [BATCHES[0], BATCHES[1][:5], BATCHES[2]]
        statistics, _ = by_hand(layer.params(model), np.concatenate(batches))
        apply, params, states = layer.recalibration(model)
        before = [np.array(leaf) for leaf in jax.tree.leaves(states)]
        exact = jbn.recalibrate(apply, params, states, batches)
        drifts = jbn.drift(apply, params, exact, batches)
        after = layer.with_states(model, exact)
        exactly(layer.states(after).values(), statistics)
        assert jax.tree.structure(layer.recalibration(after)[1:]) == jax.tree.structure((params, states))
        first, _ = jax.tree.leaves(drifts, is_leaf=lambda value: isinstance(value, jbn.Drift))
        assert abs(first.shift).max() < 1e-5 and abs(first.ratio - 1).max() < 1e-5  # the next sees each batch's own
        assert all(map(np.array_equal, before, jax.tree.leaves(states)))  # the old ones can be used still
        after = layer.train(after, [3])  # what comes back is a model to go on with, and its evidence goes on
        assert_array_equal(layer.states(after)["norm_a"].weight, 1)

    def test_of_layers_in_a_scan(self, layer, options):
        model = layer.stack(**options)
        linear = [*layer.of_stack(model)]
        apply, params, states = layer.recalibration(model)
        (exact,) = frameworks.states_in(jbn.recalibrate(apply, params, states, [ROWS]))
        statistics, expected_y = by_hand(linear, ROWS)
        exactly([jax.tree.map(lambda field, at=at: field[at], exact) for at in range(3)], statistics)
        y, new = apply(params, states, ROWS)
        assert_allclose(y, expected_y, atol=CLOSE)
        (new,) = frameworks.states_in(new)
        share = 1 if options or not layer.flax else 1 - MOMENTUM
        assert_allclose(new.mean, share * np.array([mean for mean, _ in statistics]), atol=CLOSE)
