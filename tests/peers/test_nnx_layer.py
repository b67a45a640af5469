"""`jbn.nnx.BatchNorm` beside `flax.nnx.BatchNorm`, in one network and by itself."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import parity
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from numpy.testing import assert_allclose, assert_array_equal

import jbn
import jbn.nnx

THEIRS = partial(nnx.BatchNorm, momentum=0.9, use_fast_variance=False)
OURS = partial(jbn.nnx.BatchNorm, momentum=0.9)
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(1, 2, (10, 8, 5, 5, 3)).astype(np.float32)  # ten batches
LABELS = RNG.normal(size=(10, 8, 2)).astype(np.float32)
X = RNG.normal(2, 3, (4, 5, 6, 3)).astype(np.float32)
WIDE = RNG.normal(2, 3, (16, 5, 3)).astype(np.float32)
# Both sides round sums of up to 200 float32 values in their own order, some 1e-6; ten steps of training add up.
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


class Network(nnx.Module):
    def __init__(self, norm):
        rngs = nnx.Rngs(0)
        self.convolution = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.norms = nnx.List([norm(4, rngs=rngs), norm(3, rngs=rngs)])
        self.hidden, self.out = nnx.Linear(4, 3, rngs=rngs), nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norms[0](self.convolution(x)))
        return self.out(nnx.relu(self.norms[1](self.hidden(x.mean((1, 2))))))


def values(node):
    """The state of a module, without the kinds of its variables."""
    return nnx.to_pure_dict(node if isinstance(node, nnx.State) else nnx.state(node))


def assert_same(ours, theirs, **close):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(partial(assert_allclose, **(close or CLOSE)), ours, theirs)


def train(model, steps, graph=True):
    """The loss before each step, `model` moved by it."""
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    model.train()

    @nnx.jit(graph=graph, graph_updates=graph)
    def step(model, optimizer, x, labels):
        def loss(model):
            return jnp.mean((model(x) - labels) ** 2)

        value, gradients = nnx.value_and_grad(loss, graph=graph, graph_updates=graph)(model)
        optimizer.update(model, gradients)
        return value

    return [step(model, optimizer, IMAGES[index], LABELS[index]) for index in steps]


def evaluate(model):
    return nnx.view(model, use_running_average=True)(IMAGES[0])


def single(norm, x=X, features=3, mask=None, **options):
    """(y, running statistics) of one step of a layer by itself, without jit."""
    layer = norm(features, rngs=nnx.Rngs(0), **options)
    y = layer(x, mask=mask)
    return y, values(nnx.state(layer, nnx.BatchStat))


def test_variables_are_the_same():
    ours, theirs = Network(OURS), Network(THEIRS)
    assert_same(values(ours), values(theirs), rtol=0, atol=0)
    for kind in nnx.Param, nnx.BatchStat:
        assert_same(values(nnx.state(ours, kind)), values(nnx.state(theirs, kind)), rtol=0, atol=0)
    bare = {"use_scale": False, "use_bias": False}
    for options in ({"param_dtype": jnp.bfloat16, "scale_init": nnx.initializers.normal()}, bare):
        pair = [values(norm(3, rngs=nnx.Rngs(1), **options)) for norm in (OURS, THEIRS)]
        assert_same(*pair, rtol=0, atol=0)
        assert [leaf.dtype for leaf in jax.tree.leaves(pair[0])] == [leaf.dtype for leaf in jax.tree.leaves(pair[1])]
    attributes = [set(vars(norm(3, rngs=nnx.Rngs(1)))) for norm in (OURS, THEIRS)]
    assert attributes[0] - attributes[1] == {"activation", "unbiased"}
    assert attributes[1] <= attributes[0]


@pytest.mark.parametrize("graph", [True, False])
def test_ten_steps_are_the_same(graph):
    ours, theirs = Network(OURS), Network(THEIRS)
    before = evaluate(ours)
    assert_allclose(train(ours, range(10), graph), train(theirs, range(10)), **CLOSE)
    assert_same(values(ours), values(theirs))
    assert_same(evaluate(ours), evaluate(theirs))
    assert abs(evaluate(ours) - before).max() > 0.1  # there was something to compare


def test_an_activation_inside():
    """A second relu behind the first changes nothing."""
    ours, theirs = Network(partial(OURS, activation=nnx.relu)), Network(THEIRS)
    assert_allclose(train(ours, range(3)), train(theirs, range(3)), **CLOSE)
    assert_same(values(ours), values(theirs))
    assert_same(evaluate(ours), evaluate(theirs))
    assert single(OURS, activation=jnp.tanh)[0].max() < 1


def test_unbiased():
    _, running = single(OURS, unbiased=True)
    assert_allclose(running["var"], 0.9 + 0.1 * np.float64(X).var((0, 1, 2), ddof=1), rtol=1e-5)


@pytest.mark.parametrize(("writer", "reader"), [(OURS, THEIRS), (THEIRS, OURS)])
def test_the_state_of_either_goes_on_in_the_other(writer, reader):
    written, read = Network(writer), Network(reader)
    train(written, range(3))
    nnx.update(read, jax.tree.map(jnp.array, nnx.state(written)))
    assert_same(evaluate(read), evaluate(written))
    for model in written, read:
        train(model, range(3, 6))
    assert_same(values(read), values(written))


def test_a_graph_definition_names_the_class():
    graph, state = nnx.split(Network(THEIRS))
    assert not isinstance(nnx.merge(graph, state).norms[0], jbn.nnx.BatchNorm)
    graph, _ = nnx.split(Network(OURS))
    assert isinstance(nnx.merge(graph, state).norms[0], jbn.nnx.BatchNorm)


def test_debias_is_exact_from_the_first_step():
    layer, seen = OURS(3, debias=True, rngs=nnx.Rngs(0)), []
    assert isinstance(layer.weight, nnx.BatchStat)
    assert_array_equal(layer.weight[...], 0)
    for x, _ in parity.batches(X.shape):
        layer(x)
        seen.append([of(np.float64(x), (0, 1, 2)) for of in (np.mean, np.var)])
        mean, var = np.average(seen, axis=0, weights=0.9 ** np.arange(len(seen))[::-1])
        # The first is measured about 0, one standard deviation or so from its mean: 1e-6. Sums of 120 values.
        assert_allclose(layer.mean[...], mean, rtol=1e-5, atol=1e-6)
        assert_allclose(layer.var[...], var, rtol=1e-5)
    assert_allclose(layer.weight[...], 1 - 0.9 ** len(seen), rtol=1e-6)


@pytest.mark.parametrize("handed", ["state", "dict", "half a checkpoint"])
def test_debias_with_statistics_of_flax(handed):
    """They have no weight, which is full evidence, though the layer's own is still the 0 of its start."""
    flax, ours = THEIRS(3, rngs=nnx.Rngs(0)), OURS(3, debias=True, rngs=nnx.Rngs(0))
    flax(X)
    given = jax.tree.map(jnp.array, nnx.state(flax))
    if handed == "half a checkpoint":  # restored into the state of this layer, as far as it goes
        template = nnx.state(ours)
        nnx.replace_by_pure_dict(template, nnx.to_pure_dict(given))
        given = template
    nnx.update(ours, values(given) if handed == "dict" else given)
    assert_array_equal(jbn.nnx.states(ours)[""].weight, 1)
    for layer in flax, ours:
        nnx.jit(lambda layer, x: layer(x))(layer, X + 1)
    assert_same(_stats(ours), _stats(flax))


def test_debias_of_a_fresh_layer_of_flax_and_in_layers_without():
    ours = OURS(3, debias=True, rngs=nnx.Rngs(0))
    nnx.update(ours, jax.tree.map(jnp.array, nnx.state(THEIRS(3, rngs=nnx.Rngs(0)))))
    assert_array_equal(jbn.nnx.states(ours)[""].weight, 0)
    ours(X)
    plain, flax = OURS(3, rngs=nnx.Rngs(0)), THEIRS(3, rngs=nnx.Rngs(0))
    for layer in plain, flax:
        nnx.update(layer, jax.tree.map(jnp.array, nnx.state(ours)))
        assert_allclose(layer(X, use_running_average=True), ours(X, use_running_average=True), **CLOSE)
    for layer in plain, ours:
        layer(X + 1)
    assert_same(values(plain), values(ours), rtol=0, atol=0)
    assert_allclose(plain.weight[...], 1 - 0.9**2, rtol=1e-6)
    before = np.array(flax.mean[...])
    flax(X + 1)  # goes on with full evidence
    assert_allclose(flax.mean[...], 0.9 * before + 0.1 * (X + 1).mean((0, 1, 2)), rtol=1e-5)


def test_debias_where_a_batch_leaves_no_evidence():
    """A weight of 0 that training itself leaves is no evidence: as the function, feature by feature."""
    x = X.copy()
    x[..., 0], x[0, 0, 0, 1] = x[..., 0] + 1e6, np.nan
    layer, (params, state) = OURS(3, debias=True, rngs=nnx.Rngs(0)), jbn.init(3)
    for batch in (x, x, X + 1e6, X):
        layer(batch)
        _, state = jbn.batch_norm(batch, params, state, train=True, unbiased=False)
        assert_same(jbn.nnx.states(layer)[""]._asdict(), state._asdict(), rtol=1e-6, atol=0)
        jbn.nnx.set_states(layer, jbn.nnx.states(layer))
    assert_array_equal(layer.mean[...] != 0, True)


def _stats(layer):
    return values(nnx.state(layer, nnx.BatchStat)) | {"weight": 0}


@pytest.mark.parametrize("shape", [(4, 5, 6, 1), (4, 1, 1, 1), (6, 1), (4, 5, 6, 3)])
def test_mask_broadcasts_by_leading_axes(shape):
    mask = np.random.default_rng(2).uniform(size=shape) < 0.6
    ours, theirs = single(OURS, mask=mask), single(THEIRS, mask=mask)
    full = np.broadcast_to(mask, X.shape)
    assert_same(ours, (np.where(full, theirs[0], 0), theirs[1]))
    assert_same(single(OURS, np.where(full, X, np.nan), mask=mask), ours, rtol=0, atol=0)


@pytest.mark.parametrize("axis", [1, -2, 0])
def test_a_feature_axis(axis):
    assert_same(*(single(norm, features=X.shape[axis], axis=axis) for norm in (OURS, THEIRS)))


@pytest.mark.parametrize("debias", [False, True])
def test_several_feature_axes(debias):
    """Flax evaluates them, and fails to train."""
    options = {"axis": (1, -1), "rngs": nnx.Rngs(0), "scale_init": nnx.initializers.normal()}
    ours, theirs = OURS(15, debias=debias, **options), THEIRS(15, **options)
    nnx.update(ours, jax.tree.map(jnp.array, nnx.state(theirs, nnx.Param)))
    assert_same(*(layer(X, use_running_average=True) for layer in (ours, theirs)))
    with pytest.raises((TypeError, ValueError)):
        theirs(X)
    ours(X)
    mean = X.mean((0, 2), dtype=np.float64).ravel()
    assert_allclose(ours.mean[...], mean if debias else 0.1 * mean, rtol=1e-5)
    states = recalibrate(ours, [X, X[:2]])
    assert_allclose(states[""].mean, np.concatenate([X, X[:2]]).mean((0, 2), dtype=np.float64).ravel(), rtol=1e-5)
    with pytest.raises(ValueError, match=r"params.scale has shape \[7\]; expected \[5, 3\]"):
        OURS(7, **options)(X)


@pytest.mark.parametrize("graph", [True, False])
def test_gradients(graph):
    def gradients(norm):
        layer = norm(3, rngs=nnx.Rngs(0))
        loss = nnx.grad(lambda layer, x: jnp.sum(jnp.sin(layer(x))), argnums=(0, 1), graph=graph, graph_updates=graph)
        of_layer, of_x = loss(layer, jnp.asarray(X))
        return values(of_layer) if graph else values(nnx.state(of_layer, nnx.Param)), of_x, _stats(layer)

    assert_same(gradients(OURS), gradients(THEIRS))


def test_under_remat_statistics_move_once():
    def run(norm, wrap):
        model = Network(norm)

        @nnx.jit
        def step(model, x):
            return nnx.value_and_grad(lambda model: jnp.mean(wrap(lambda model, x: model(x))(model, x) ** 2))(model)

        value, gradients = step(model, IMAGES[0])
        return value, values(gradients), values(model)

    assert_same(run(OURS, nnx.remat), run(THEIRS, lambda f: f))


class Block(nnx.Module):
    def __init__(self, norm, rngs):
        self.linear, self.norm = nnx.Linear(3, 3, rngs=rngs), norm(3, rngs=rngs)

    def __call__(self, x):
        return x + nnx.relu(self.norm(self.linear(x)))


@nnx.split_rngs(splits=3)
@nnx.vmap(in_axes=(None, 0))
def stacked(norm, rngs):
    return Block(norm, rngs)


@nnx.jit
@nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
def through(block, x):
    return block(x)


def test_scan_over_layers():
    def run(norm):
        blocks = stacked(norm, nnx.Rngs(0))
        return through(blocks, jnp.asarray(X)), values(blocks)

    ours = run(OURS)
    assert ours[1]["norm"]["mean"].shape == (3, 3)
    assert_same(ours, run(THEIRS))


@pytest.mark.parametrize("how", ["shard_map", "vmap"])
def test_pooled_over_a_named_axis(how):
    graph, variables = nnx.split(OURS(3, axis_name="i", rngs=nnx.Rngs(0)))

    def step(variables, x):
        layer = nnx.merge(graph, variables, copy=True)
        return layer(x), values(nnx.state(layer, nnx.BatchStat))

    if how == "vmap":
        step, x = jax.vmap(step, (None, 0), (0, None), axis_name="i"), WIDE.reshape(8, 2, 5, 3)
    else:
        mesh = jax.make_mesh((8,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
        whole, parts = PartitionSpec(), PartitionSpec("i")
        step = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(whole, parts), out_specs=(parts, whole)))
        x = WIDE
    y, running = step(variables, x)
    assert_same((y.reshape(WIDE.shape), running), single(THEIRS, WIDE))


def test_a_sharded_batch_under_jit():
    mesh = jax.make_mesh((8,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jax.device_put(WIDE, NamedSharding(mesh, PartitionSpec("i")))
    layer = OURS(3, rngs=nnx.Rngs(0))
    y = nnx.jit(lambda layer, x: layer(x))(layer, x)
    assert len(y.sharding.device_set) == 8
    assert_same((y, values(nnx.state(layer, nnx.BatchStat))), single(THEIRS, WIDE))


@pytest.mark.parametrize("given", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("dtype", [None, jnp.float32, jnp.bfloat16])
def test_dtypes(given, dtype):
    x = jnp.asarray(X, given)
    (y, running), (expected, theirs) = single(OURS, x, dtype=dtype), single(THEIRS, x.astype(jnp.float32))
    assert y.dtype == (dtype or given)
    assert {field.dtype for field in running.values()} == {jnp.dtype(jnp.float32)}
    assert_same(running, theirs)
    # y is below 4 and rounded once: half a unit in the last place.
    assert_allclose(y.astype(jnp.float32), expected, rtol=0, atol=max(2 * jnp.finfo(y.dtype).eps, 2e-5))


def test_evaluation_casts_no_statistics():
    """A running mean of 1000.1 is 1000 in bfloat16."""
    layer = OURS(1, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    layer.mean[...] = jnp.array([1000.1])
    y = layer(jnp.array([[1000.1], [1001.1]]), use_running_average=True)
    assert y.dtype == jnp.bfloat16
    assert_allclose(y.astype(jnp.float32), [[0], [1]], atol=1e-3)  # 1000.1 in float32, and a bfloat16 near 1


@pytest.mark.parametrize("dtype", [None, jnp.float32, jnp.bfloat16])
def test_whole_numbers(dtype):
    x = np.abs(10 * X).astype(np.int32)
    (y, running), (theirs, expected) = single(OURS, x, dtype=dtype), single(THEIRS, x.astype(np.float32))
    assert y.dtype == (dtype or jnp.float32)
    assert_same(running, expected)
    assert_allclose(y.astype(jnp.float32), theirs, rtol=4 * jnp.finfo(y.dtype).eps, atol=4 * jnp.finfo(y.dtype).eps)


@pytest.mark.parametrize("norm", [OURS, THEIRS])
def test_statistics_move_under_the_jit_of_nnx_and_stay_under_that_of_jax(norm):
    """In silence: warnings are errors here."""
    model = norm(3, rngs=nnx.Rngs(0))
    jax.jit(jax.grad(lambda model, x: jnp.sum(jnp.sin(model(x))), allow_int=True))(model, X)
    assert_array_equal(model.mean[...], 0)
    assert_array_equal(model.var[...], 1)
    nnx.jit(lambda model, x: model(x))(model, X)
    assert_allclose(model.mean[...], 0.1 * X.mean((0, 1, 2), dtype=np.float64), rtol=1e-5)


def test_use_running_average_by_each_way():
    layer = nnx.Sequential(OURS(3, use_running_average=None, rngs=nnx.Rngs(0)))
    norm = layer.layers[0]
    with pytest.raises(ValueError, match="use_running_average is None"):
        layer(X)
    norm(X, use_running_average=False)
    moved = np.array(norm.mean[...])
    assert (moved != 0).all()
    evaluation = norm(X, use_running_average=True)
    layer.eval()
    assert_array_equal(layer(X), evaluation)
    layer.set_attributes(use_running_average=True)
    assert_array_equal(layer(X), evaluation)
    assert_array_equal(nnx.view(layer, use_running_average=True)(X), evaluation)
    assert_array_equal(norm.mean[...], moved)
    nnx.view(layer, use_running_average=False)(X)  # shares its variables
    assert (norm.mean[...] != moved).all()
    moved = np.array(norm.mean[...])
    layer.train()
    layer(X)
    assert (norm.mean[...] != moved).all()


def test_one_feature_does_not_spoil_its_statistics():
    x = X.copy()
    x[0, 0, 0, 0], x[..., 1] = np.nan, x[..., 1] + 1e6
    _, running = single(OURS, x)
    assert running["mean"][0] == 0 and running["var"][0] == 1
    assert_allclose(running["mean"][1], x[..., 1].mean(), rtol=1e-6)  # starts anew
    assert_allclose(running["mean"][2], 0.1 * X[..., 2].mean(), rtol=1e-5)


def apply(model, states, batch):
    """As in the docstring of the module."""
    jbn.nnx.set_states(model, states)
    return model(batch), jbn.nnx.states(model)


def recalibrate(model, batches):
    model.train()
    states = jbn.recalibrate(apply, model, jbn.nnx.states(model), batches)
    jbn.nnx.set_states(model, states)
    return jbn.nnx.states(model)


class Dense(nnx.Module):
    """Two normalizations in sequence, of which NumPy knows everything."""

    def __init__(self, norm):
        rngs = nnx.Rngs(0)
        self.a, self.b = nnx.Linear(4, 3, rngs=rngs), nnx.Linear(3, 3, rngs=rngs)
        self.norm_a, self.norm_b = norm(3, rngs=rngs), norm(3, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.norm_b(self.b(nnx.relu(self.norm_a(self.a(x))))))


def exact(model, batches):
    """{layer: (mean, var)} in float64, each layer normalized by the statistics of all data."""
    x, found = np.concatenate(batches).astype(np.float64), {}
    for name in "ab":
        linear = getattr(model, name)
        x = x @ np.float64(linear.kernel[...]) + np.float64(linear.bias[...])
        found[f"norm_{name}"] = mean, var = x.mean(0), x.var(0)
        x = np.maximum((x - mean) / np.sqrt(var + 1e-5), 0)
    return found


def assert_exact(states, model, batches):
    for name, (mean, var) in exact(model, batches).items():
        # 24 float32 values behind two products of matrices: some 1e-6 of a standard deviation.
        assert_allclose((states[name].mean - mean) / np.sqrt(var), 0, atol=1e-5)
        assert_allclose(states[name].var, var, rtol=1e-5)
        assert_array_equal(states[name].weight, 1)


BATCHES = [RNG.normal(1, 2, (rows, 4)).astype(np.float32) for rows in (8, 5, 11)]


@pytest.mark.parametrize("debias", [False, True])
def test_recalibration_is_exact(debias):
    model = Dense(partial(OURS, debias=debias))
    structure, mean = jax.tree.structure(nnx.state(model)), model.norm_a.mean
    assert_exact(recalibrate(model, BATCHES), model, BATCHES)
    assert jax.tree.structure(nnx.state(model)) == structure
    assert model.norm_a.mean is mean
    drift = jbn.drift(apply, model, jbn.nnx.states(model), BATCHES)
    assert abs(drift["norm_a"].shift).max() < 1e-5 and abs(drift["norm_a"].ratio - 1).max() < 1e-5
    assert_exact(jbn.nnx.states(model), model, BATCHES)  # drift left them alone


@pytest.mark.parametrize("debias", [False, True])
def test_recalibration_of_a_model_that_is_split(debias):
    """The other way of the docstring, for models that share modules."""

    def apply_split(params, states, batch):
        return apply(nnx.merge(*params, copy=True), states, batch)

    model = Dense(partial(OURS, debias=debias))
    states = jbn.recalibrate(apply_split, nnx.split(model), jbn.nnx.states(model), BATCHES)
    assert_exact(states, model, BATCHES)


@pytest.mark.parametrize("debias", [False, True])
def test_recalibration_of_layers_in_a_scan(debias):
    class Tower(nnx.Module):
        def __init__(self, norm):
            self.blocks = stacked(norm, nnx.Rngs(0))

        def __call__(self, x):
            return through(self.blocks, x)

    ours, theirs = Tower(partial(OURS, debias=debias)), Tower(partial(THEIRS, momentum=0.0))
    states = recalibrate(ours, [jnp.asarray(X)])
    theirs(jnp.asarray(X))  # one batch: its own statistics, which a step with momentum 0 stores
    assert_allclose(states["blocks/norm"].mean, theirs.blocks.norm.mean[...], rtol=1e-5, atol=1e-5)
    assert_allclose(states["blocks/norm"].var, theirs.blocks.norm.var[...], rtol=1e-5)


def test_states_by_path():
    model = Network(partial(OURS, debias=True))
    assert list(jbn.nnx.states(model)) == ["norms/0", "norms/1"]
    assert list(jbn.nnx.states(model.norms[0])) == [""]
    with nnx.set_graph_mode(False):
        assert list(jbn.nnx.states(model)) == ["norms/0", "norms/1"]
    fresh = jbn.nnx.states(model)
    train(model, [0])
    merged = jbn.merge_states(fresh, jbn.nnx.states(model))
    jbn.nnx.set_states(model, merged)
    assert_allclose(model.norms[1].weight[...], 0.05, rtol=1e-6)
    with pytest.raises(ValueError, match=r"states is of \['norms/0'\] and model has \['norms/0', 'norms/1'\]"):
        jbn.nnx.set_states(model, {"norms/0": merged["norms/0"]})
