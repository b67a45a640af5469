"""What is refused, with a message that says what arrived, what was expected and what to do."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jbn

PARAMS, STATE = jbn.init(3)
X = jnp.ones((4, 3))
MOMENTS = jbn.moments(X)


def refused(error, message, f, *args, **options):
    with pytest.raises(error, match=f"(?s){message}"):
        f(*args, **options)


MEASURING = {
    "moments": jbn.moments,
    "normalize_batch": lambda x, **options: jbn.normalize_batch(x, PARAMS, **options),
    "normalize_running": lambda x, **options: jbn.normalize_running(x, PARAMS, STATE, **options),
    "batch_norm": lambda x, **options: jbn.batch_norm(x, PARAMS, STATE, train=True, **options),
    "batch_norm in evaluation": lambda x, **options: jbn.batch_norm(x, PARAMS, STATE, train=False, **options),
}
measuring = pytest.mark.parametrize("f", MEASURING.values(), ids=MEASURING)
normalizing = pytest.mark.parametrize("f", list(MEASURING.values())[1:], ids=list(MEASURING)[1:])


@measuring
@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint8, jnp.bool_, jnp.complex64])
def test_x_that_is_not_real_floating_point(f, dtype):
    refused(TypeError, rf"x is {jnp.dtype(dtype)}\[4, 3\].*floating-point.*cast", f, X.astype(dtype))


@measuring
@pytest.mark.parametrize("feature_axis", [2, -3, (0, 0), (1, -1), (), (0, 5)])
def test_feature_axis_that_x_has_not(f, feature_axis):
    refused(ValueError, r"feature_axis is .* x has shape \[4, 3\].*at least one axis", f, X, feature_axis=feature_axis)


@measuring
@pytest.mark.parametrize("feature_axis", ["channels", 1.0, None, ("a",)])
def test_feature_axis_that_is_no_axis(f, feature_axis):
    refused(TypeError, "feature_axis is .*int or a tuple of ints", f, X, feature_axis=feature_axis)


@measuring
@pytest.mark.parametrize("shape", [(3,), (5,), (3, 4), (2, 1), (4, 1, 1), ()])
def test_weights_that_do_not_fit(f, shape):
    message = re.escape(f"weights has shape {list(shape)} and x has shape [4, 3]; expected [4, 3]")
    refused(ValueError, message, f, X, weights=jnp.ones(shape))


@measuring
def test_weights_that_are_not_real(f):
    refused(TypeError, "weights is complex64.*boolean mask or real", f, X, weights=jnp.ones(4, jnp.complex64))


@normalizing
def test_wrong_feature_size(f):
    message = r"params.scale has shape \[3\]; expected \[5\].*feature_axis.*jbn.init"
    refused(ValueError, message, f, jnp.ones((4, 5)))


@normalizing
@pytest.mark.parametrize("epsilon", [-1e-5, float("nan"), float("inf"), np.float32(-1), np.ones(2)])
def test_epsilon(f, epsilon):
    refused(ValueError, "epsilon is .*not negative", f, X, epsilon=epsilon)


def test_a_state_of_the_wrong_size():
    _, state = jbn.init(4)
    message = r"state.mean has shape \[4\]; expected \[3\].*jbn.init"
    refused(ValueError, message, jbn.normalize_running, X, PARAMS, state)
    refused(ValueError, r"moments.mean has shape \[3\]; expected \[4\]", jbn.update, state, MOMENTS)


@pytest.mark.parametrize("train", [True, False])
def test_batch_norm_with_a_state_of_the_wrong_size(train):
    _, state = jbn.init(4)
    refused(ValueError, r"shape \[[34]\]; expected \[[34]\]", jbn.batch_norm, X, PARAMS, state, train=train)


def test_a_state_whose_weight_is_of_other_features():
    state = STATE._replace(weight=jnp.zeros(2))
    refused(ValueError, r"state.weight has shape \[2\]; expected \[3\]", jbn.update, state, MOMENTS)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_state_that_cannot_hold_an_average(dtype):
    narrow = jax.tree.map(lambda field: field.astype(dtype), STATE)
    message = rf"state.mean is {jnp.dtype(dtype)}, which cannot hold a running average.*where you cast a tree"
    refused(TypeError, message, jbn.update, narrow, MOMENTS)
    refused(TypeError, message, jbn.normalize_running, X, PARAMS, narrow)
    for train in (True, False):
        refused(TypeError, message, jbn.batch_norm, X, PARAMS, narrow, train=train)
    narrow = jax.tree.map(lambda field: field.astype(dtype), MOMENTS)
    refused(TypeError, rf"moments.count is {jnp.dtype(dtype)}", jbn.update, STATE, narrow)


def test_a_center_that_does_not_fit():
    for f in (MEASURING["moments"], MEASURING["normalize_batch"]):
        refused(
            ValueError, r"center has shape \[4\]; expected \[3\], a value for each feature", f, X, center=np.ones(4)
        )
        refused(TypeError, r"center is int32; expected a floating-point type", f, X, center=np.ones(3, np.int32))


def test_params_and_state_swapped():
    refused(TypeError, r"params is a State; expected a jbn.Params", jbn.normalize_running, X, STATE, PARAMS)
    refused(TypeError, r"params is a State; expected a jbn.Params", jbn.normalize_batch, X, STATE)
    refused(TypeError, r"moments is a State; expected a jbn.Moments.*order", jbn.update, MOMENTS, STATE)
    for train in (True, False):
        refused(TypeError, r"is a .*; expected a jbn.(Params|State)", jbn.batch_norm, X, STATE, PARAMS, train=train)


@pytest.mark.parametrize("wrong", [None, (), {}, 3.0, X])
def test_something_else_for_params_state_or_moments(wrong):
    name = type(wrong).__name__
    refused(TypeError, rf"params is a {name}; expected a jbn.Params", jbn.normalize_batch, X, wrong)
    refused(TypeError, rf"state is a {name}; expected a jbn.State", jbn.normalize_running, X, PARAMS, wrong)
    refused(TypeError, rf"state is a {name}; expected a jbn.State", jbn.update, wrong, MOMENTS)
    refused(TypeError, rf"moments is a {name}; expected a jbn.Moments", jbn.update, STATE, wrong)
    refused(TypeError, rf"is a {name}; expected a jbn.Moments", jbn.merge, wrong)
    refused(TypeError, rf"is a {name}; expected a jbn.Moments", jbn.merge, MOMENTS, wrong)


def test_fields_that_are_not_floating_point():
    refused(TypeError, "params.scale is int32", jbn.normalize_batch, X, PARAMS._replace(scale=jnp.ones(3, jnp.int32)))
    refused(TypeError, "state.mean is int32", jbn.update, STATE._replace(mean=jnp.ones(3, jnp.int32)), MOMENTS)


def test_a_field_of_the_state_that_is_none():
    refused((TypeError, ValueError), "state.var", jbn.normalize_running, X, PARAMS, STATE._replace(var=None))
    refused((TypeError, ValueError), "state.var", jbn.update, STATE._replace(var=None), MOMENTS)


@pytest.mark.parametrize("decay", [-0.1, 1.1, 10, float("nan"), np.float32(2)])
@pytest.mark.parametrize("train", [True, False])
def test_decay_outside_0_to_1(decay, train):
    message = r"decay is .*\[0, 1\].*old value.*PyTorch"
    refused(ValueError, message, jbn.batch_norm, X, PARAMS, STATE, train=train, decay=decay)
    refused(ValueError, message, jbn.update, STATE, MOMENTS, decay=decay)


@pytest.mark.parametrize("amount", [-0.1, 1.1, float("nan")])
def test_amount_outside_0_to_1(amount):
    refused(ValueError, r"amount is .*\[0, 1\]", jbn.update, STATE, MOMENTS, amount=amount)


def test_a_vector_of_decays_and_amounts_of_other_features():
    refused(ValueError, r"decay has shape \[3\]; expected a scalar", jbn.update, STATE, MOMENTS, decay=np.ones(3))
    message = r"amount has shape \[2\]; expected a scalar or \[3\]"
    refused(ValueError, message, jbn.update, STATE, MOMENTS, amount=np.ones(2))


@pytest.mark.parametrize("axis_name", ["i", ("i", "j")])
def test_an_unbound_axis_name(axis_name):
    message = r"no axis 'i' is bound.*vmap.*shard_map.*jit"
    for name in ("moments", "normalize_batch", "batch_norm"):
        refused(NameError, message, MEASURING[name], X, axis_name=axis_name)
        refused(NameError, message, jax.jit(lambda x, name=name: MEASURING[name](x, axis_name=axis_name)), X)


def test_one_axis_bound_and_one_not():
    f = jax.vmap(lambda x: jbn.moments(x, axis_name=("i", "j")), axis_name="i")
    refused(NameError, r"axis_name is \('i', 'j'\), and no axis 'j' is bound", f, X[None])


@pytest.mark.parametrize(("shape", "feature_axis"), [((1, 3), -1), ((3,), 0), ((1, 3, 1, 1), 1)])
def test_one_value_per_feature_in_training(shape, feature_axis):
    message = rf"x has shape \[{', '.join(map(str, shape))}\].*one value per feature.*running"
    x = jnp.ones(shape)
    refused(ValueError, message, jbn.normalize_batch, x, PARAMS, feature_axis=feature_axis)
    refused(ValueError, message, jbn.batch_norm, x, PARAMS, STATE, train=True, feature_axis=feature_axis)
    jbn.batch_norm(x, PARAMS, STATE, train=False, feature_axis=feature_axis)
    assert jbn.moments(x, feature_axis=feature_axis).count == 1


def test_one_value_on_each_of_many_devices_is_not_one_value():
    f = lambda x: jbn.normalize_batch(x, PARAMS, axis_name="i")[0]  # noqa: E731
    assert jax.jit(jax.vmap(f, axis_name="i"))(jnp.ones((8, 1, 3))).shape == (8, 1, 3)
    mesh = jax.make_mesh((8,), ("i",), axis_types=(AxisType.Auto,))
    split = jax.shard_map(f, mesh=mesh, in_specs=P("i"), out_specs=P("i"))
    assert jax.jit(split)(jnp.ones((8, 3))).shape == (8, 3)
    refused(ValueError, "one value per feature", jax.vmap(f, axis_name="i"), jnp.ones((1, 1, 3)))


def test_one_valid_value_is_not_refused():
    """Which positions a mask leaves is known at run time only: the output is the bias there."""
    y, measured = jbn.normalize_batch(X, PARAMS, weights=np.arange(4) == 2)
    assert measured.count == 1
    assert not y.any()


def test_merge_of_nothing():
    refused(TypeError, r"merge was given nothing.*merge\(\*parts\)", jbn.merge)


def test_merge_of_different_features():
    message = r"moments\[1\].mean has shape \[2\]; expected \[3\]"
    refused(ValueError, message, jbn.merge, MOMENTS, jbn.moments(jnp.ones((4, 2))))


@pytest.mark.parametrize("features", [0, -1, (), (3, 0)])
def test_init_with_sizes_that_are_none(features):
    refused(ValueError, "features is .*size of at least 1", jbn.init, features)


@pytest.mark.parametrize("features", [3.0, "3", None, (3, 1.5), [3]])
def test_init_with_features_that_are_no_size(features):
    refused(TypeError, "features is .*int, or a tuple of ints", jbn.init, features)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bool_, jnp.complex64])
def test_init_with_a_dtype_that_is_not_floating_point(dtype):
    refused(TypeError, "dtype is .*floating-point", jbn.init, 3, dtype=dtype)


def test_policy_is_keyword_only():
    for f, args in (
        (jbn.moments, (X, -1)),
        (jbn.normalize_batch, (X, PARAMS, 1e-5)),
        (jbn.normalize_running, (X, PARAMS, STATE, 1e-5)),
        (jbn.batch_norm, (X, PARAMS, STATE, True)),
        (jbn.update, (STATE, MOMENTS, 0.9)),
        (jbn.init, (3, True)),
    ):
        refused(TypeError, "positional argument", f, *args)


def test_a_forgotten_unpacking_is_named():
    params, state = jbn.init(3)
    result = jbn.batch_norm(jnp.ones((4, 3)), params, state, train=True)
    with pytest.raises(TypeError, match=r"x is a tuple; expected an array. jbn.batch_norm returns the pair"):
        jbn.batch_norm(result, params, state, train=True)
    with pytest.raises(TypeError, match=r"params is a State; expected a jbn.Params. Is the order right\?"):
        jbn.batch_norm(jnp.ones((4, 3)), state, params, train=True)


@pytest.mark.parametrize("train", [True, False])
def test_a_state_of_another_size_is_named(train):
    (params, _), (_, state) = jbn.init(3), jbn.init(5)
    with pytest.raises(ValueError, match=r"state.mean has shape \[5\]; expected \[3\]"):
        jbn.batch_norm(jnp.ones((4, 3)), params, state, train=train)
