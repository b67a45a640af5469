"""`jbn.linen.BatchNorm` beside `flax.linen.BatchNorm`, in one network and by itself."""

import re
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import parity
import pytest
import ways
from flax import errors, serialization
from jax.sharding import NamedSharding, PartitionSpec
from numpy.testing import assert_allclose, assert_array_equal

import jbn
import jbn.linen

THEIRS = partial(nn.BatchNorm, momentum=0.9, use_fast_variance=False)
OURS = partial(jbn.linen.BatchNorm, momentum=0.9)
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(1, 2, (10, 8, 5, 5, 3)).astype(np.float32)  # ten batches
LABELS = RNG.normal(size=(10, 8, 2)).astype(np.float32)
X = RNG.normal(2, 3, (4, 5, 6, 3)).astype(np.float32)
# Both sides round sums of up to 200 float32 values in their own order, some 1e-6; ten steps of training add up.
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


class Network(nn.Module):
    norm: partial

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(4, (3, 3))(x)
        x = nn.relu(self.norm(use_running_average=not train)(x))
        x = nn.Dense(3)(x.mean((1, 2)))
        return nn.Dense(2)(nn.relu(self.norm(use_running_average=not train)(x)))


def start(norm):
    return Network(norm).init(jax.random.key(0), IMAGES[0], True)


@partial(jax.jit, static_argnums=0)
def step(norm, variables, x, labels):
    """The variables after one step, the loss before it and its gradients."""

    def loss(params):
        y, changed = Network(norm).apply({**variables, "params": params}, x, True, mutable=["batch_stats"])
        return jnp.mean((y - labels) ** 2), changed["batch_stats"]

    (value, running), gradients = jax.value_and_grad(loss, has_aux=True)(variables["params"])
    params = jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], gradients)
    return {"params": params, "batch_stats": running}, value, gradients


def train(norm, variables, steps):
    for index in steps:
        variables, *seen = step(norm, variables, IMAGES[index], LABELS[index])
        yield variables, *seen


def last(norm, variables, steps):
    *_, (variables, _, _) = train(norm, variables, steps)
    return variables


def evaluate(norm, variables):
    return Network(norm).apply(variables, IMAGES[0], False)


def assert_same(ours, theirs, **close):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(partial(assert_allclose, **(close or CLOSE)), ours, theirs)


def dtypes(tree):
    return jax.tree.map(lambda leaf: leaf.dtype, tree)


def single(norm, x=X, **options):
    """(y, running statistics) of one step of a layer by itself, without jit."""
    mask, kind = options.pop("mask", None), norm(use_running_average=False, **options)
    variables = kind.init(jax.random.key(0), x)
    return kind.apply(variables, x, mask=mask, mutable=["batch_stats"])


def test_variables_are_the_same():
    ours, theirs = start(OURS), start(THEIRS)
    assert sorted(ours["batch_stats"]) == ["BatchNorm_0", "BatchNorm_1"]
    assert_same(ours, theirs, rtol=0, atol=0)
    options = {"axis": (1, -1), "param_dtype": jnp.bfloat16, "scale_init": nn.initializers.normal()}
    pair = [kind(False, **options, name="a").init(jax.random.key(1), X) for kind in (OURS, THEIRS)]
    assert_same(*pair, rtol=0, atol=0)
    assert dtypes(pair[0]) == dtypes(pair[1])
    for kind in OURS, THEIRS:
        assert set(kind(False, use_scale=False, use_bias=False).init(jax.random.key(1), X)) == {"batch_stats"}


def test_ten_steps_are_the_same():
    for ours, theirs in zip(train(OURS, start(OURS), range(10)), train(THEIRS, start(THEIRS), range(10)), strict=True):
        assert_same(ours, theirs)
    assert_same(evaluate(OURS, ours[0]), evaluate(THEIRS, theirs[0]))
    assert abs(evaluate(OURS, ours[0]) - evaluate(OURS, start(OURS))).max() > 0.1  # there was something to compare


def test_an_activation_inside():
    """A second relu behind the first changes nothing."""
    inside = partial(OURS, activation=nn.relu)
    for ours, theirs in zip(train(inside, start(OURS), range(3)), train(THEIRS, start(THEIRS), range(3)), strict=True):
        assert_same(ours, theirs)
    assert_same(evaluate(inside, ours[0]), evaluate(THEIRS, theirs[0]))
    assert single(OURS, activation=jnp.tanh)[0].max() < 1


def test_unbiased():
    _, changed = single(OURS, unbiased=True)
    assert_allclose(changed["batch_stats"]["var"], 0.9 + 0.1 * np.float64(X).var((0, 1, 2), ddof=1), rtol=1e-5)


@pytest.mark.parametrize(("writer", "reader"), [(OURS, THEIRS), (THEIRS, OURS)])
def test_a_checkpoint_of_either_goes_on_in_the_other(writer, reader):
    written = last(writer, start(writer), range(3))
    read = serialization.from_bytes(start(reader), serialization.to_bytes(written))
    assert_same(evaluate(reader, read), evaluate(writer, written))
    assert_same(last(reader, read, range(3, 6)), last(writer, written, range(3, 6)))


def test_statistics_without_weight_are_full_evidence_and_one_that_is_there_is_kept():
    debiased = partial(OURS, debias=True)
    flax = last(THEIRS, start(THEIRS), range(3))
    assert_same(last(debiased, flax, range(3, 6)), last(THEIRS, flax, range(3, 6)))
    written = last(debiased, start(debiased), range(3))
    assert_same(evaluate(OURS, written), evaluate(debiased, written), rtol=0, atol=0)
    assert_same(evaluate(THEIRS, written), evaluate(debiased, written))
    after = last(OURS, written, range(3, 6))
    assert_same(after, last(debiased, written, range(3, 6)), rtol=0, atol=0)
    # momentum 0.9: 1 - 0.9^6, to float32
    assert_allclose(after["batch_stats"]["BatchNorm_1"]["weight"], 1 - 0.9**6, rtol=1e-6)


def test_statistics_in_the_place_of_the_initial_ones_are_full_evidence():
    """As where half a checkpoint was restored, and the weight is still the 0 of the start."""
    debiased = partial(OURS, debias=True)
    flax, fresh = last(THEIRS, start(THEIRS), range(3)), start(debiased)
    names = fresh["batch_stats"]
    merged = flax | {"batch_stats": {name: names[name] | flax["batch_stats"][name] for name in names}}
    after = last(debiased, merged, range(3, 6))
    for name, theirs in last(THEIRS, flax, range(3, 6))["batch_stats"].items():
        assert_array_equal(after["batch_stats"][name].pop("weight"), 1)
        assert_same(after["batch_stats"][name], theirs)


def test_debias_where_a_batch_leaves_no_evidence():
    """A weight of 0 that training itself leaves is no evidence: as the function, feature by feature."""
    x = X.copy()
    x[..., 0], x[0, 0, 0, 1] = x[..., 0] + 1e6, np.nan
    layer, (params, state) = OURS(use_running_average=False, debias=True), jbn.init(3)
    variables = layer.init(jax.random.key(0), x)
    for batch in (x, x, X + 1e6, X):
        variables |= layer.apply(variables, batch, mutable=["batch_stats"])[1]
        _, state = jbn.batch_norm(batch, params, state, train=True, unbiased=False)
        kept = jbn.linen.states(variables["batch_stats"])
        assert_same(kept._asdict(), state._asdict(), rtol=1e-6, atol=0)
        variables |= {"batch_stats": jbn.linen.batch_stats(kept)}


def test_debias_is_exact_from_the_first_step():
    layer, seen = OURS(use_running_average=False, debias=True), []
    variables = layer.init(jax.random.key(0), X)
    assert {name: each.tolist() for name, each in variables["batch_stats"].items()} == {
        "mean": [0] * 3,
        "var": [1] * 3,
        "weight": [0] * 3,
    }
    for x, _ in parity.batches(X.shape):
        _, changed = layer.apply(variables, x, mutable=["batch_stats"])
        variables |= changed
        seen.append([of(np.float64(x), (0, 1, 2)) for of in (np.mean, np.var)])
        shares = 0.9 ** np.arange(len(seen))[::-1]
        mean, var = np.average(seen, axis=0, weights=shares)
        # The first is measured about 0, one standard deviation or so from its mean: 1e-6. Sums of 120 values.
        assert_allclose(variables["batch_stats"]["mean"], mean, rtol=1e-5, atol=1e-6)
        assert_allclose(variables["batch_stats"]["var"], var, rtol=1e-5)


@pytest.mark.parametrize("shape", [(4, 5, 6, 1), (4, 1, 1, 1), (6, 1), (3,), (4, 5, 6, 3)])
def test_mask_broadcasts_by_leading_axes(shape):
    mask = np.random.default_rng(2).uniform(size=shape) < 0.6
    mask = mask | (np.ones(3, bool) if shape == (3,) else False)  # of a feature without values Flax makes NaN
    ours, theirs = single(OURS, mask=mask), single(THEIRS, mask=mask)
    full = np.broadcast_to(mask, X.shape)
    assert_same((ours[0], ours[1]), (np.where(full, theirs[0], 0), theirs[1]))
    spoiled, changed = single(OURS, np.where(full, X, np.nan), mask=mask.astype(np.float32))
    assert_same((spoiled, changed), ours, rtol=0, atol=0)


def test_a_mask_that_leaves_a_feature_nothing():
    y, changed = single(OURS, mask=np.array([True, False, True]))
    assert not y[..., 1].any()
    assert changed["batch_stats"]["mean"][1] == 0 and changed["batch_stats"]["var"][1] == 1
    assert changed["batch_stats"]["mean"][0] != 0


@pytest.mark.parametrize("axis", [1, -2, (1, -1), (-1, 1), (3, -1)])
def test_feature_axes(axis):
    assert_same(single(OURS, axis=axis), single(THEIRS, axis=axis))


def test_gradients_of_the_input():
    def gradients(norm):
        layer = norm(use_running_average=False)
        variables = layer.init(jax.random.key(0), X)
        return jax.grad(lambda x: jnp.sum(jnp.sin(layer.apply(variables, x, mutable=["batch_stats"])[0])))(X)

    assert_same(gradients(OURS), gradients(THEIRS))


def test_under_remat_statistics_move_once():
    def run(network):
        variables = start(OURS)

        def loss(params):
            y, changed = network.apply({**variables, "params": params}, IMAGES[0], True, mutable=["batch_stats"])
            return jnp.sum(y**2), changed

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])

    wrapped = run(nn.remat(Network, static_argnums=2)(OURS))
    assert_same(wrapped, run(Network(THEIRS)))


class Block(nn.Module):
    norm: partial

    @nn.compact
    def __call__(self, x, _):
        return x + nn.relu(self.norm(use_running_average=False)(nn.Dense(3)(x))), None


def scanned(norm):
    axes = {"params": 0, "batch_stats": 0, "moments": 0}
    return nn.scan(Block, variable_axes=axes, split_rngs={"params": True}, length=3)(norm)


def test_scan_over_layers():
    def run(norm):
        layers = scanned(norm)
        variables = layers.init(jax.random.key(0), X, None)
        return variables, layers.apply(variables, X, None, mutable=["batch_stats"])

    ours = run(OURS)
    assert ours[1][1]["batch_stats"]["BatchNorm_0"]["mean"].shape == (3, 3)
    assert_same(ours, run(THEIRS))


MESH = jax.make_mesh((8,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
WHOLE, PARTS = PartitionSpec(), PartitionSpec("i")


def pooled(how):
    """`how` with the 16 examples of a batch, over 8 devices or positions named "i"."""
    if how == "vmap":

        def over(f):
            mapped = jax.vmap(f, axis_name="i", in_axes=(None, 0), out_axes=(0, None))
            return lambda variables, x: mapped(variables, x.reshape(8, 2, *x.shape[1:]))

        return over
    return lambda f: jax.jit(jax.shard_map(f, mesh=MESH, in_specs=(WHOLE, PARTS), out_specs=(PARTS, WHOLE)))


WIDE = RNG.normal(2, 3, (16, 5, 3)).astype(np.float32)


@pytest.mark.parametrize("how", ["shard_map", "vmap"])
def test_pooled_over_a_named_axis(how):
    expected = single(THEIRS, WIDE)
    layer = OURS(use_running_average=False, axis_name="i")
    variables = layer.init(jax.random.key(0), WIDE[:1, 0])  # one row, and an axis that is not bound
    apply = pooled(how)(partial(layer.apply, mutable=["batch_stats"]))
    y, changed = apply(variables, WIDE)
    assert_same((y.reshape(WIDE.shape), changed), expected)


def test_pooled_moments_cost_no_message():
    layer = OURS(use_running_average=False, axis_name="i")
    variables = layer.init(jax.random.key(0), WIDE)

    def messages(mutable):
        apply = pooled("shard_map")(partial(layer.apply, mutable=mutable))
        return len(re.findall(r" all-reduce\(", apply.lower(variables, WIDE).compile().as_text()))

    assert messages(["batch_stats"]) == messages(["batch_stats", "moments"]) == 1


def test_subgroups_of_a_named_axis():
    groups = [[0, 1, 2, 3], [4, 5, 6, 7]]

    layer = OURS(use_running_average=False, axis_name="i", axis_index_groups=groups)
    variables = layer.init(jax.random.key(0), WIDE)

    def apply(variables, x):
        y, changed = layer.apply(variables, x, mutable=["batch_stats"])
        return y, jax.tree.map(lambda field: field[None], changed)

    specs = {"in_specs": (WHOLE, PARTS), "out_specs": (PARTS, PARTS)}
    y, changed = jax.jit(jax.shard_map(apply, mesh=MESH, check_vma=False, **specs))(variables, WIDE)
    halves = [single(THEIRS, half) for half in np.split(WIDE, 2)]
    assert_same(y, np.concatenate([half[0] for half in halves]))
    for index, half in ((0, 0), (7, 1)):
        assert_same(jax.tree.map(lambda field, i=index: field[i], changed), halves[half][1])


def test_a_sharded_batch_under_jit():
    expected = single(THEIRS, WIDE)
    layer = OURS(use_running_average=False)
    variables = layer.init(jax.random.key(0), WIDE)
    x = jax.device_put(WIDE, NamedSharding(MESH, PARTS))
    ours = jax.jit(partial(layer.apply, mutable=["batch_stats"]))(variables, x)
    assert len(ours[0].sharding.device_set) == 8
    assert_same(ours, expected)


@pytest.mark.parametrize("given", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("dtype", [None, jnp.float32, jnp.bfloat16])
def test_dtypes(given, dtype):
    x = jnp.asarray(X, given)
    (y, changed), (expected, running) = single(OURS, x, dtype=dtype), single(THEIRS, x.astype(jnp.float32))
    assert y.dtype == (dtype or given)
    assert dtypes(changed) == dtypes(running)
    assert_same(changed, running)
    # y is below 4 and rounded once: half a unit in the last place.
    assert_allclose(y.astype(jnp.float32), expected, rtol=0, atol=max(2 * jnp.finfo(y.dtype).eps, 2e-5))


@pytest.mark.parametrize("dtype", [None, jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("given", [np.int32, np.uint8, np.bool_])
def test_whole_numbers(given, dtype):
    x = (np.abs(X) > 2).astype(given) if given == np.bool_ else np.abs(10 * X).astype(given)
    (y, changed), (theirs, running) = single(OURS, x, dtype=dtype), single(THEIRS, x.astype(np.float32), dtype=dtype)
    assert y.dtype == theirs.dtype == (dtype or jnp.float32)
    assert_same(changed, running)
    assert_allclose(
        *(each.astype(jnp.float32) for each in (y, theirs)),
        rtol=4 * jnp.finfo(y.dtype).eps,
        atol=4 * jnp.finfo(y.dtype).eps,
    )


def test_a_dtype_that_is_none_of_numbers_with_a_point():
    with pytest.raises(ValueError, match="inexact"):
        single(OURS, dtype=jnp.int32)


def test_statistics_that_flax_kept_in_bfloat16():
    layer = THEIRS(use_running_average=False, force_float32_reductions=False, param_dtype=jnp.bfloat16)
    x = X.astype(jnp.bfloat16)
    variables = layer.init(jax.random.key(0), x)
    _, changed = layer.apply(variables, x, mutable=["batch_stats"])
    variables |= jax.tree.map(lambda field: field.astype(jnp.bfloat16), changed)
    wide = jax.tree.map(lambda field: field.astype(jnp.float32), variables)
    assert_same(OURS(True).apply(variables, X), THEIRS(True).apply(wide, X))
    _, changed = OURS(False).apply(variables, X, mutable=["batch_stats"])
    assert {field.dtype for field in changed["batch_stats"].values()} == {jnp.dtype(jnp.float32)}


def test_float64():
    with jax.enable_x64(True):
        x = jnp.asarray(X, jnp.float64)
        y, changed = single(OURS, x, param_dtype=jnp.float64)
        assert y.dtype == changed["batch_stats"]["mean"].dtype == jnp.float64
        assert_allclose(changed["batch_stats"]["mean"], 0.1 * np.float64(X).mean((0, 1, 2)), rtol=1e-13)


def test_initialization_moves_nothing():
    layer = OURS(use_running_average=False, axis_name="nowhere", scale_init=nn.initializers.constant(2.0))
    y, variables = layer.init_with_output(jax.random.key(0), X[:1, 0, 0])
    assert sorted(variables) == ["batch_stats", "params"]
    assert_array_equal(variables["batch_stats"]["mean"], 0)
    assert_allclose(y, 2 * X[:1, 0, 0] / np.sqrt(1 + 1e-5), rtol=1e-6)


def test_use_running_average_by_constructor_or_call():
    variables = OURS().init(jax.random.key(0), X, use_running_average=True)
    by_call = OURS().apply(variables, X, use_running_average=True)
    assert_array_equal(OURS(use_running_average=True).apply(variables, X), by_call)
    with pytest.raises(ValueError, match="use_running_average"):
        OURS().apply(variables, X)
    with pytest.raises(ValueError, match="use_running_average"):
        OURS(use_running_average=True).apply(variables, X, use_running_average=True)
    with pytest.raises(errors.ModifyScopeVariableError):  # as Flax: training cannot go without moving statistics
        OURS().apply(variables, X, use_running_average=False)


def moments_of(layer, variables, batches):
    measured = {}
    for x in batches:
        _, measured = layer.apply(variables | measured, x, mutable=["batch_stats", "moments"])
        variables |= {"batch_stats": measured.pop("batch_stats")}
    return measured["moments"]


def test_moments_of_several_batches_merge():
    layer = OURS(use_running_average=False)
    parts = X, X[:2] + 3, X[1:] * 2
    found = moments_of(layer, layer.init(jax.random.key(0), X), parts)["moments"]
    whole = np.concatenate(parts).astype(np.float64)
    assert_array_equal(found.count, np.prod(whole.shape[:3]))
    # Measured about a running mean one or two standard deviations away: k 2^-24 of their square.
    assert_allclose(found.mean, whole.mean((0, 1, 2)), rtol=2e-6)
    assert_allclose(found.var, whole.var((0, 1, 2)), rtol=1e-5)


@pytest.mark.parametrize("of_state", [(), ("j",), ("i",)])
def test_moments_of_a_batch_cut_on_an_explicit_mesh(of_state):
    """Whatever way the running statistics lie: JAX adds nothing that lies otherwise."""
    layer, mesh = OURS(use_running_average=False), ways.mesh(ways.AxisType.Explicit, i=4, j=2)
    batches = np.float32(RNG.normal(2, 3, (2, 8, 4)))
    variables = jax.device_put(layer.init(jax.random.key(0), batches[0]), NamedSharding(mesh, PartitionSpec(*of_state)))
    with jax.set_mesh(mesh):
        cut = [jax.device_put(x, NamedSharding(mesh, PartitionSpec("i", "j"))) for x in batches]
        found = moments_of(layer, variables, cut)["moments"]
    whole = batches.astype(np.float64).reshape(16, 4)
    assert_array_equal(found.count, 16)
    assert_allclose(found.mean, whole.mean(0), rtol=2e-6)  # about a running mean near it, as above
    assert_allclose(found.var, whole.var(0), rtol=1e-5)


def test_moments_of_layers_in_a_scan():
    layers = scanned(OURS)
    variables = layers.init(jax.random.key(0), X, None)
    found = layers.apply(variables, X, None, mutable=True)[1]["moments"]["BatchNorm_0"]["moments"]
    first = X.astype(np.float64) @ np.float64(variables["params"]["Dense_0"]["kernel"][0])
    assert_array_equal(found.count, np.full((3, 3), 120))
    assert_allclose(found.mean[0], first.mean((0, 1, 2)), rtol=1e-5, atol=1e-5)
    assert_allclose(found.var[0], first.var((0, 1, 2)), rtol=1e-5)


def compiled(f, *arguments):
    """What XLA makes of `f`, without where in the source it came from."""
    text = jax.jit(f).lower(*arguments).compile().as_text()
    return re.sub(r", metadata=\{[^}]*\}", "", text)[text.index("\n%") :]


def test_the_layer_compiles_to_what_the_function_does():
    """So the moments cost nothing where nobody asks; where somebody does, x is read no more often."""
    layer = OURS(use_running_average=False)
    variables = layer.init(jax.random.key(0), X)

    def plain(variables, *args):
        params, running = variables["params"], variables["batch_stats"]
        options = {"train": True, "decay": 0.9, "unbiased": False}
        y, state = jbn.batch_norm(*args, jbn.Params(**params), jbn.linen.states(running), **options)
        return y, {"batch_stats": {"mean": state.mean, "var": state.var}}

    def entry(text):
        return text[text.index("ENTRY") :]

    without, asked = (partial(layer.apply, mutable=["batch_stats", *more]) for more in ([], ["moments"]))
    traced = [[of.params.get("name") for of in jax.make_jaxpr(f)(variables, X).eqns] for f in (without, plain)]
    assert [name for name in traced[0] if name] == [name for name in traced[1] if name]
    ours = entry(compiled(without, variables, X))
    assert re.sub(r"\.\d+", "", ours) == re.sub(r"\.\d+", "", entry(compiled(plain, variables, X)))
    readers = [len(re.findall(r"fusion\(.*%args_0_\.1", text)) for text in (ours, entry(compiled(asked, variables, X)))]
    assert readers == [3, 3]  # the two sums, and the output


class Dense(nn.Module):
    """Two normalizations in sequence, of which NumPy knows everything."""

    norm: partial

    @nn.compact
    def __call__(self, x, train):
        for name in "ab":
            x = nn.relu(self.norm(use_running_average=not train, name=f"norm_{name}")(nn.Dense(3, name=name)(x)))
        return x


def exact(params, batches):
    """{layer: (mean, var)} in float64, each layer normalized by the statistics of all data."""
    x, found = np.concatenate(batches).astype(np.float64), {}
    for name in "ab":
        dense = params[name]
        x = x @ np.float64(dense["kernel"]) + np.float64(dense["bias"])
        found[f"norm_{name}"] = mean, var = x.mean(0), x.var(0)
        x = np.maximum((x - mean) / np.sqrt(var + 1e-5), 0)
    return found


def recalibrate(network, variables, batches):
    """As in the docstring of the module."""

    def apply(params, states, batch):
        given = {"params": params, "batch_stats": jbn.linen.batch_stats(states)}
        y, changed = network.apply(given, batch, True, mutable=["batch_stats"])
        assert "moments" not in changed
        return y, jbn.linen.states(changed["batch_stats"])

    running = variables["batch_stats"]
    states = jbn.recalibrate(apply, variables["params"], jbn.linen.states(running), batches)
    drift = jbn.drift(apply, variables["params"], states, batches)
    return variables | {"batch_stats": jbn.linen.batch_stats(states, like=running)}, drift


@pytest.mark.parametrize("debias", [False, True])
def test_recalibration_is_exact(debias):
    batches = [RNG.normal(1, 2, (rows, 4)).astype(np.float32) for rows in (8, 5, 11)]
    network = Dense(partial(OURS, debias=debias))
    variables = network.init(jax.random.key(0), batches[0], True)
    after, drift = recalibrate(network, variables, batches)
    assert jax.tree.structure(after) == jax.tree.structure(variables)
    for name, (mean, var) in exact(variables["params"], batches).items():
        running = after["batch_stats"][name]
        # 24 float32 values behind two products of matrices: some 1e-6 of a standard deviation.
        assert_allclose((running["mean"] - mean) / np.sqrt(var), 0, atol=1e-5)
        assert_allclose(running["var"], var, rtol=1e-5)
        assert_array_equal(running.get("weight", np.ones(3)), 1)
    assert abs(drift["norm_a"].shift).max() < 1e-5 and abs(drift["norm_a"].ratio - 1).max() < 1e-5
    if debias:  # evidence that was there goes on
        _, changed = network.apply(after, batches[0], True, mutable=["batch_stats"])
        assert_array_equal(changed["batch_stats"]["norm_a"]["weight"], 1)


@pytest.mark.parametrize("debias", [False, True])
def test_recalibration_of_layers_in_a_scan(debias):
    layers = scanned(partial(OURS, debias=debias))
    variables = layers.init(jax.random.key(0), X, None)
    apply = type("Both", (), {"apply": lambda _, given, x, train, **how: layers.apply(given, x, None, **how)})()
    after, _ = recalibrate(apply, variables, [X])
    # One batch: its own statistics, which a step with momentum 0 stores.
    step = scanned(partial(THEIRS, momentum=0.0)).apply(
        {name: variables[name] for name in ("params", "batch_stats")}, X, None, mutable=["batch_stats"]
    )
    theirs = step[1]["batch_stats"]["BatchNorm_0"]
    for name in "mean", "var":
        assert_allclose(after["batch_stats"]["BatchNorm_0"][name], theirs[name], rtol=1e-5, atol=1e-5)


def test_bridges():
    with_weight = {"mean": jnp.ones(2), "var": jnp.full(2, 2.0), "weight": jnp.full(2, 0.5)}
    without = {name: with_weight[name] for name in ("mean", "var")}
    other = {"Dense_0/kernel/u": jnp.ones(3)}  # what SpectralNorm keeps there
    tree = {"a": {"BatchNorm_0": with_weight}, "mean": {"BatchNorm_0": without}, "var": other}
    states = jbn.linen.states(tree)
    assert_same(states["a"]["BatchNorm_0"], jbn.State(**with_weight), rtol=0, atol=0)
    assert states["mean"]["BatchNorm_0"].weight.tolist() == [1, 1]
    assert states["var"] == other
    assert_same(jbn.linen.batch_stats(states, like=tree), tree, rtol=0, atol=0)
    assert jbn.linen.batch_stats(states)["mean"]["BatchNorm_0"]["weight"].tolist() == [1, 1]
    merged = jbn.linen.batch_stats(jbn.merge_states(states, states), like=tree)
    assert_same(merged, tree, rtol=1e-6)
    with pytest.raises(ValueError, match=r"like has \['a'\] where states has \['a', 'mean', 'var'\]"):
        jbn.linen.batch_stats(states, like={"a": tree["a"]})
    with pytest.raises(ValueError, match="like has a ndarray"):
        jbn.linen.batch_stats({"a": states["a"]}, like={"a": np.ones(3)})


def test_statistics_of_another_width(tmp_path):
    """Orbax restores what there is into NumPy arrays of any shape."""
    layer = OURS()
    wide, narrow = (layer.init(jax.random.key(0), jnp.ones((2, width)), True)["batch_stats"] for width in (6, 4))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "wide", wide)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "wide", jax.tree.map(np.asarray, narrow))
    assert restored["mean"].shape == (6,)
    params, x = {"scale": jnp.ones(4), "bias": jnp.zeros(4)}, jnp.asarray(RNG.normal(size=(8, 4)), jnp.float32)
    for train in (False, True):
        with pytest.raises(ValueError, match=r"state.mean has shape \[6\]; expected \[4\].*x \[8, 4\]"):
            layer.apply({"params": params, "batch_stats": restored}, x, not train, mutable=["batch_stats"])
        with pytest.raises(ValueError, match=r"state.mean has shape \[6\]; expected \[4\].*x \[8, 4\]"):
            jbn.batch_norm(x, jbn.Params(**params), jbn.State(**restored), train=train)


def test_one_feature_does_not_spoil_its_statistics():
    x = X.copy()
    x[0, 0, 0, 0], x[..., 1] = np.nan, x[..., 1] + 1e6
    _, changed = single(OURS, x)
    mean, var = (changed["batch_stats"][name] for name in ("mean", "var"))
    assert mean[0] == 0 and var[0] == 1
    assert_allclose(mean[1], x[..., 1].mean(), rtol=1e-6)  # starts anew
    assert_allclose(mean[2], 0.1 * X[..., 2].mean(), rtol=1e-5)


def test_a_mask_that_does_not_broadcast():
    """By NumPy's rules, as Flax has it: the message says which shape would."""
    x, layer = jnp.ones((8, 4, 4, 3)), jbn.linen.BatchNorm(use_running_average=False)
    variables = layer.init(jax.random.key(0), x)
    for shape in ((8, 4, 4), (8,), (1, 8, 4, 4, 3)):
        with pytest.raises(ValueError, match=rf"mask has shape {re.escape(str(list(shape)))} .* \[8, 4, 4, 1\]"):
            layer.apply(variables, x, mask=np.ones(shape, bool), mutable=["batch_stats"])
