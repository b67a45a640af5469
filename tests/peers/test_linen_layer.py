"""What `jbn.linen.BatchNorm` promises beyond test_layers.py: variables, collections, moments, what it compiles to."""

import re
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import ways
from flax import errors
from frameworks import KEY, LAYERS, RNG, ROWS, Linen, X
from jax.sharding import NamedSharding, PartitionSpec
from numpy.testing import assert_allclose, assert_array_equal
from test_layers import MESH, PARTS, WHOLE, WIDE, expected, same

import jbn
import jbn.linen

LINEN = LAYERS[0]
OURS, THEIRS = LINEN.ours, Linen.own


def test_variables_are_the_same():
    (_, ours), (_, theirs) = (LINEN.network(own=own) for own in (False, True))
    same(ours, theirs, 0)
    options = {"axis": (1, -1), "param_dtype": jnp.bfloat16, "scale_init": nn.initializers.normal()}
    pair = [kind(False, **options, name="a").init(KEY, X) for kind in (OURS, THEIRS)]
    same(*pair, 0)
    same(*(jax.tree.map(lambda leaf: leaf.dtype.itemsize, tree) for tree in pair), 0)
    for kind in OURS, THEIRS:
        assert set(kind(False, use_scale=False, use_bias=False).init(KEY, X)) == {"batch_stats"}


def test_pooled_moments_cost_no_message():
    layer = OURS(use_running_average=False, axis_name="i")
    variables = layer.init(KEY, WIDE)

    def messages(mutable):
        apply = partial(layer.apply, mutable=mutable)
        apply = jax.jit(jax.shard_map(apply, mesh=MESH, in_specs=(WHOLE, PARTS), out_specs=(PARTS, WHOLE)))
        return len(re.findall(r" all-reduce\(", apply.lower(variables, WIDE).compile().as_text()))

    assert messages(["batch_stats"]) == messages(["batch_stats", "moments"]) == 1


def test_subgroups_of_a_named_axis():
    layer, variables = LINEN.alone(WIDE, axis_name="i", axis_index_groups=((0, 1, 2, 3), (4, 5, 6, 7)))

    def apply(variables, x):
        y, variables = layer(variables, x)
        return y, jax.tree.map(lambda field: field[None], LINEN.state(variables))

    specs = {"in_specs": (WHOLE, PARTS), "out_specs": (PARTS, PARTS)}
    y, states = jax.jit(jax.shard_map(apply, mesh=MESH, check_vma=False, **specs))(variables, WIDE)
    for device, half in ((0, slice(8)), (7, slice(8, 16))):
        state = jax.tree.map(lambda field, device=device: field[device], states)
        same((y[half], state), expected(LINEN, WIDE[half]))


def test_a_dtype_that_is_none_of_numbers_with_a_point():
    with pytest.raises(ValueError, match="inexact"):
        LINEN.first(X, dtype=jnp.int32)


def test_statistics_that_flax_kept_in_bfloat16():
    layer = THEIRS(use_running_average=False, force_float32_reductions=False, param_dtype=jnp.bfloat16)
    x = X.astype(jnp.bfloat16)
    variables = layer.init(KEY, x)
    _, changed = layer.apply(variables, x, mutable=["batch_stats"])
    variables |= jax.tree.map(lambda field: field.astype(jnp.bfloat16), changed)
    wide = jax.tree.map(lambda field: field.astype(jnp.float32), variables)
    same(OURS(True).apply(variables, X), THEIRS(True).apply(wide, X))
    _, changed = OURS(False).apply(variables, X, mutable=["batch_stats"])
    assert {field.dtype for field in changed["batch_stats"].values()} == {jnp.dtype(jnp.float32)}


def test_initialization_moves_nothing():
    layer = OURS(use_running_average=False, axis_name="nowhere", scale_init=nn.initializers.constant(2.0))
    y, variables = layer.init_with_output(KEY, X[:1, 0, 0])
    assert sorted(variables) == ["batch_stats", "params"]
    assert_array_equal(variables["batch_stats"]["mean"], 0)
    assert_allclose(y, 2 * X[:1, 0, 0] / np.sqrt(1 + 1e-5), rtol=1e-6)


def test_use_running_average_by_constructor_or_call():
    variables = OURS().init(KEY, X, use_running_average=True)
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
    found = moments_of(layer, layer.init(KEY, X), parts)["moments"]
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
    variables = jax.device_put(layer.init(KEY, batches[0]), NamedSharding(mesh, PartitionSpec(*of_state)))
    with jax.set_mesh(mesh):
        cut = [jax.device_put(x, NamedSharding(mesh, PartitionSpec("i", "j"))) for x in batches]
        found = moments_of(layer, variables, cut)["moments"]
    whole = batches.astype(np.float64).reshape(16, 4)
    assert_array_equal(found.count, 16)
    assert_allclose(found.mean, whole.mean(0), rtol=2e-6)  # about a running mean near it, as above
    assert_allclose(found.var, whole.var(0), rtol=1e-5)


def test_moments_of_layers_in_a_scan():
    network, variables = model = LINEN.stack()
    found = network.apply(variables, ROWS, True, mutable=True)[1]["moments"]["blocks"]["BatchNorm_0"]["moments"]
    (kernel, _), *_ = LINEN.of_stack(model)
    first = ROWS.astype(np.float64) @ np.float64(kernel)
    assert_array_equal(found.count, np.full((3, 3), len(ROWS)))
    assert_allclose(found.mean[0], first.mean(0), rtol=1e-5, atol=1e-5)
    assert_allclose(found.var[0], first.var(0), rtol=1e-5)


def compiled(f, *arguments):
    """What XLA makes of `f`, without where in the source it came from."""
    text = jax.jit(f).lower(*arguments).compile().as_text()
    return re.sub(r", metadata=\{[^}]*\}", "", text)[text.index("\n%") :]


def test_the_layer_compiles_to_what_the_function_does():
    """So the moments cost nothing where nobody asks; where somebody does, x is read no more often."""
    layer = OURS(use_running_average=False)
    variables = layer.init(KEY, X)

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


def test_bridges():
    with_weight = {"mean": jnp.ones(2), "var": jnp.full(2, 2.0), "weight": jnp.full(2, 0.5)}
    without = {name: with_weight[name] for name in ("mean", "var")}
    other = {"Dense_0/kernel/u": jnp.ones(3)}  # what SpectralNorm keeps there
    tree = {"a": {"BatchNorm_0": with_weight}, "mean": {"BatchNorm_0": without}, "var": other}
    states = jbn.linen.states(tree)
    same(states["a"]["BatchNorm_0"], jbn.State(**with_weight), 0)
    assert states["mean"]["BatchNorm_0"].weight.tolist() == [1, 1]
    assert states["var"] == other
    same(jbn.linen.batch_stats(states, like=tree), tree, 0)
    assert jbn.linen.batch_stats(states)["mean"]["BatchNorm_0"]["weight"].tolist() == [1, 1]
    same(jbn.linen.batch_stats(jbn.merge_states(states, states), like=tree), tree, 1e-6)
    with pytest.raises(ValueError, match=r"like has \['a'\] where states has \['a', 'mean', 'var'\]"):
        jbn.linen.batch_stats(states, like={"a": tree["a"]})
    with pytest.raises(ValueError, match="like has a ndarray"):
        jbn.linen.batch_stats({"a": states["a"]}, like={"a": np.ones(3)})


def test_statistics_of_another_width(tmp_path):
    """Orbax restores what there is into NumPy arrays of any shape."""
    layer = OURS()
    wide, narrow = (layer.init(KEY, jnp.ones((2, width)), True)["batch_stats"] for width in (6, 4))
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


def test_a_mask_that_does_not_broadcast():
    """By NumPy's rules, as Flax has it: the message says which shape would."""
    x, layer = jnp.ones((8, 4, 4, 3)), jbn.linen.BatchNorm(use_running_average=False)
    variables = layer.init(KEY, x)
    for shape in ((8, 4, 4), (8,), (1, 8, 4, 4, 3)):
        with pytest.raises(ValueError, match=rf"mask has shape {re.escape(str(list(shape)))} .* \[8, 4, 4, 1\]"):
            layer.apply(variables, x, mask=np.ones(shape, bool), mutable=["batch_stats"])
