"""What `jbn.nnx.BatchNorm` promises beyond test_layers.py: attributes, modes, `jit`, paths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from frameworks import BATCHES, LAYERS, Nnx, X, values
from numpy.testing import assert_allclose, assert_array_equal
from test_layers import by_hand, exactly, same

import jbn
import jbn.nnx

NNX = LAYERS[1]
OURS, THEIRS = NNX.ours, Nnx.own


def test_variables_are_the_same():
    ours, theirs = (NNX.network(own=own) for own in (False, True))
    for kind in nnx.Variable, nnx.Param, nnx.BatchStat:
        same(values(nnx.state(ours, kind)), values(nnx.state(theirs, kind)), 0)
    bare = {"use_scale": False, "use_bias": False}
    for options in ({"param_dtype": jnp.bfloat16, "scale_init": nnx.initializers.normal()}, bare):
        pair = [values(norm(3, rngs=nnx.Rngs(1), **options)) for norm in (OURS, THEIRS)]
        same(*pair, 0)
        assert [leaf.dtype for leaf in jax.tree.leaves(pair[0])] == [leaf.dtype for leaf in jax.tree.leaves(pair[1])]
    attributes = [set(vars(norm(3, rngs=nnx.Rngs(1)))) for norm in (OURS, THEIRS)]
    assert attributes[0] - attributes[1] == {"activation", "unbiased"}
    assert attributes[1] <= attributes[0]


def test_a_graph_definition_names_the_class():
    graph, state = nnx.split(NNX.network(own=True))
    assert not isinstance(nnx.merge(graph, state).norm_a, jbn.nnx.BatchNorm)
    graph, _ = nnx.split(NNX.network())
    assert isinstance(nnx.merge(graph, state).norm_a, jbn.nnx.BatchNorm)


def test_debias_of_a_fresh_layer_of_flax():
    ours = NNX.hand(OURS(3, debias=True, rngs=nnx.Rngs(0)), THEIRS(3, rngs=nnx.Rngs(0)))
    assert_array_equal(jbn.nnx.states(ours)[""].weight, 0)
    ours(X)
    theirs = NNX.hand(THEIRS(3, rngs=nnx.Rngs(0)), ours)
    before = np.array(theirs.mean[...])
    theirs(X + 1)  # goes on with full evidence
    assert_allclose(theirs.mean[...], 0.9 * before + 0.1 * (X + 1).mean((0, 1, 2)), rtol=1e-5)


@pytest.mark.parametrize("debias", [False, True])
def test_several_feature_axes(debias):
    """Flax evaluates them, and fails to train."""
    options = {"axis": (1, -1), "rngs": nnx.Rngs(0), "scale_init": nnx.initializers.normal()}
    ours, theirs = OURS(15, debias=debias, **options), THEIRS(15, **options)
    nnx.update(ours, jax.tree.map(jnp.array, nnx.state(theirs, nnx.Param)))
    same(*(layer(X, use_running_average=True) for layer in (ours, theirs)))
    with pytest.raises((TypeError, ValueError)):
        theirs(X)
    ours(X)
    mean = X.mean((0, 2), dtype=np.float64).ravel()
    assert_allclose(ours.mean[...], mean if debias else 0.1 * mean, rtol=1e-5)
    exact = jbn.recalibrate(*NNX.recalibration(ours), [X, X[:2]])
    assert_allclose(exact[""].mean, np.concatenate([X, X[:2]]).mean((0, 2), dtype=np.float64).ravel(), rtol=1e-5)
    with pytest.raises(ValueError, match=r"params.scale has shape \[7\]; expected \[5, 3\]"):
        OURS(7, **options)(X)


def test_evaluation_casts_no_statistics():
    """A running mean of 1000.1 is 1000 in bfloat16."""
    layer = OURS(1, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    layer.mean[...] = jnp.array([1000.1])
    y = layer(jnp.array([[1000.1], [1001.1]]), use_running_average=True)
    assert y.dtype == jnp.bfloat16
    assert_allclose(y.astype(jnp.float32), [[0], [1]], atol=1e-3)  # 1000.1 in float32, and a bfloat16 near 1


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


@pytest.mark.parametrize("debias", [False, True])
def test_recalibration_of_a_model_that_is_split(debias):
    """The other way of the docstring, for models that share modules."""
    model = NNX.network(debias=debias)
    apply, _, states = NNX.recalibration(model)

    def apply_split(params, states, batch):
        return apply(nnx.merge(*params, copy=True), states, batch)

    exact = jbn.recalibrate(apply_split, nnx.split(model), states, BATCHES)
    exactly(exact.values(), by_hand(NNX.params(model), BATCHES.reshape(-1, BATCHES.shape[-1]))[0])


def test_states_by_path():
    model = NNX.network(debias=True)
    for graph in (True, False):
        with nnx.set_graph_mode(graph):
            assert list(jbn.nnx.states(model)) == ["norm_a", "norm_b"]
    assert list(jbn.nnx.states(model.norm_a)) == [""]
    assert list(jbn.nnx.states(nnx.Sequential(model.norm_a))) == ["layers/0"]
    fresh = jbn.nnx.states(model)
    merged = jbn.merge_states(fresh, jbn.nnx.states(NNX.train(model, [0])))
    jbn.nnx.set_states(model, merged)
    assert_allclose(model.norm_b.weight[...], 0.05, rtol=1e-6)
    with pytest.raises(ValueError, match=r"states is of \['norm_a'\] and model has \['norm_a', 'norm_b'\]"):
        jbn.nnx.set_states(model, {"norm_a": merged["norm_a"]})
