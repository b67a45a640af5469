"""What is refused, with a message that says what arrived, what was expected and what to do."""

import re
from functools import partial

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
TAKING_A_STATE = (
    lambda state: jbn.normalize_running(X, PARAMS, state),
    lambda state: jbn.batch_norm(X, PARAMS, state, train=True),
    lambda state: jbn.batch_norm(X, PARAMS, state, train=False),
    lambda state: jbn.batch_renorm(X, PARAMS, state, train=True),
    lambda state: jbn.update(state, MOMENTS),
)
measuring = pytest.mark.parametrize("f", MEASURING.values(), ids=MEASURING)
normalizing = pytest.mark.parametrize("f", list(MEASURING.values())[1:], ids=list(MEASURING)[1:])


@measuring
@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint8, jnp.bool_])
def test_x_that_is_not_floating_point(f, dtype):
    refused(TypeError, rf"x is {jnp.dtype(dtype)}\[4, 3\].*floating-point.*cast", f, X.astype(dtype))


@measuring
def test_complex_x_and_the_remedy_that_keeps_both_halves(f):
    x = np.random.default_rng(0).normal(size=(8, 3)) + 1j * np.random.default_rng(1).normal(size=(8, 3))
    message = (
        r"x is complex64\[8, 3\].*imaginary.*features of their own.*jnp.concatenate\(\[x.real, x.imag\], axis=-1\)"
    )
    refused(TypeError, message, f, jnp.asarray(x, jnp.complex64))
    both = jbn.moments(jnp.concatenate([x.real, x.imag], axis=-1))
    np.testing.assert_allclose(both.var, np.concatenate([x.real.var(0), x.imag.var(0)]), rtol=1e-5)


@measuring
@pytest.mark.parametrize("x", [None, "x", {"x": X}, [[1.0], [1.0, 2.0]], object()], ids=lambda x: type(x).__name__)
def test_x_that_is_no_array(f, x):
    refused(TypeError, r"x is (None|'x'|a dict|a list|a object); expected an array", f, x)


@measuring
def test_params_or_a_pair_for_x(f):
    refused(TypeError, r"x is a Params; expected an array. Is the order right", f, PARAMS)
    refused(TypeError, r"x is a tuple.*a batch of several arrays has to be taken apart", f, (X, X))
    refused(TypeError, r"x is a ndarray of object; expected an array of numbers", f, np.array([None, 1]))


@measuring
def test_weights_that_are_no_array(f):
    refused(TypeError, r"weights is a dict; expected an array", f, X, weights={})


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
@pytest.mark.parametrize("epsilon", [-1e-5, float("nan"), float("inf"), np.float32(-1)])
def test_epsilon(f, epsilon):
    refused(ValueError, "epsilon is .*not negative", f, X, epsilon=epsilon)


NUMBERS = {
    "decay": lambda value: jbn.batch_norm(X, PARAMS, STATE, train=True, decay=value),
    "decay of update": lambda value: jbn.update(STATE, MOMENTS, decay=value),
    "epsilon": lambda value: jbn.batch_norm(X, PARAMS, STATE, train=True, epsilon=value),
    "epsilon of normalize_running": lambda value: jbn.normalize_running(X, PARAMS, STATE, epsilon=value),
    "epsilon of drift": lambda value: jbn.drift(None, PARAMS, STATE, [X], epsilon=value),
    "r_max": lambda value: jbn.batch_renorm(X, PARAMS, STATE, train=True, r_max=value),
    "r_min": lambda value: jbn.batch_renorm(X, PARAMS, STATE, train=True, r_min=value),
    "d_max": lambda value: jbn.batch_renorm(X, PARAMS, STATE, train=True, d_max=value),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_are_none(name):
    f, name = NUMBERS[name], name.split()[0]
    refused(ValueError, rf"{name} has shape \[2\]; expected a scalar, a number", f, np.ones(2))
    for wrong in ("0.9", 1j, {}, object()):
        refused(TypeError, rf"{name} is .*; expected a number", f, wrong)
    if name != "r_min":
        refused(TypeError, rf"{name} is None; expected a number", f, None)


def test_limits_of_renorm_out_of_range():
    for name, value, message in (
        ("r_max", 0.5, "at least 1"),
        ("d_max", -1, "at least 0"),
        ("r_min", 1.5, r"\[0, 1\]"),
    ):
        refused(ValueError, rf"{name} is {value}; expected.*{message}", NUMBERS[name], value)


def test_a_state_of_the_wrong_size():
    _, state = jbn.init(5)
    message = r"state.mean has shape \[5\]; expected \[3\], the features of x \[4, 3\].*jbn.init"
    refused(ValueError, message, jbn.normalize_running, X, PARAMS, state)
    _, state = jbn.init(4)
    refused(ValueError, r"moments.mean has shape \[3\]; expected \[4\]", jbn.update, state, MOMENTS)


@normalizing
def test_channels_first_without_feature_axis(f):
    message = (
        r"params.scale has shape \[3\]; expected \[5\], the features of x \[2, 3, 5, 5\]. Axis 1 .* feature_axis=1"
    )
    refused(ValueError, message, f, jnp.ones((2, 3, 5, 5)))


def test_stacked_params_and_states():
    params, state = jax.tree.map(lambda a: jnp.stack([a, a]), (PARAMS, STATE))
    message = r"has shape \[2, 3\]; expected \[3\].*stacked.*one at a time"
    refused(ValueError, f"params.scale {message}", jbn.normalize_running, X, params, STATE)
    refused(ValueError, f"state.mean {message}", jbn.normalize_running, X, PARAMS, state)


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


def test_dicts_of_a_checkpoint_and_the_remedy():
    params, state = PARAMS._asdict(), {"mean": np.zeros(3), "var": np.ones(3), "weight": np.ones(3)}
    refused(TypeError, r"params is a dict .*jbn.Params\(\*\*params\)", jbn.normalize_batch, X, params)
    message = r"state is a dict \('mean', 'var', 'weight'\); expected a jbn.State.*make it with jbn.State\(\*\*state\)"
    for f in TAKING_A_STATE:
        refused(TypeError, message, f, state)
    refused(TypeError, r"moments is a dict .*jbn.Moments\(\*\*moments\)", jbn.update, STATE, MOMENTS._asdict())
    jbn.batch_norm(X, jbn.Params(**params), jbn.State(**state), train=True)
    refused(TypeError, "one for each normalization: pass that of this one", jbn.normalize_batch, X, {"norm1": PARAMS})


def test_tuples_that_lost_their_type():
    refused(TypeError, r"params is a tuple.*jbn.Params\(\*params\)", jbn.normalize_batch, X, tuple(PARAMS))
    refused(TypeError, r"state is a list.*mean, var, weight.*jbn.State\(\*state\)", jbn.update, list(STATE), MOMENTS)


def test_the_pair_of_init_not_taken_apart():
    pair = jbn.init(3)
    for f in (lambda: jbn.normalize_batch(X, pair), lambda: jbn.batch_norm(X, pair, STATE, train=True)):
        refused(TypeError, r"params is a tuple.*jbn.init gives the pair \(params, state\): take it apart", f)
    refused(TypeError, r"state is a tuple.*take it apart", jbn.normalize_running, X, PARAMS, pair)


def test_a_list_of_moments_or_states():
    message = r"state is a list.*pass that of this one"
    refused(TypeError, message, jbn.batch_norm, X, PARAMS, [STATE] * 2, train=True)
    refused(TypeError, r"moments\[0\] is a State.*jbn.merge_states", jbn.merge, STATE, STATE)
    refused(TypeError, r"states is a Params without a jbn.State", jbn.empty_moments, PARAMS)
    refused(TypeError, r"moments\[0\] is a list.*one by one, as in merge\(\*moments\)", jbn.merge, [MOMENTS, MOMENTS])
    refused(TypeError, r"shares is", jbn.merge_states, STATE, STATE, shares={})


def test_moments_in_evaluation():
    message = r"state is a Moments, which accumulates in training.*jbn.update\(state, moments, decay=0.0\)"
    refused(TypeError, message, jbn.batch_norm, X, PARAMS, MOMENTS, train=False)
    for train in (True, False):
        refused(TypeError, r"state is a Moments", jbn.batch_renorm, X, PARAMS, MOMENTS, train=train)


@pytest.mark.parametrize("count", [1_000, 1.5, -0.5, float("nan"), np.full(3, 1e6), jnp.full(3, 2.0), [0.5, 0.5, 7]])
def test_a_weight_that_is_no_evidence(count):
    """Someone passes PyTorch's num_batches_tracked."""
    state = STATE._replace(weight=count)
    message = r"states?.weight has values from .*\[0, 1\].*num_batches_tracked.*jbn.State\(running_mean, running_var\)"
    for f in (*TAKING_A_STATE, *(partial(over, None, PARAMS, batches=[X]) for over in (jbn.recalibrate, jbn.drift))):
        refused(ValueError, message, f, state)
    for layers in ({"norm": [state]}, {"norm": [STATE, state]}):
        index = len(layers["norm"]) - 1
        refused(ValueError, rf"states\['norm'\]\[{index}\].weight has", jbn.recalibrate, None, PARAMS, layers, [X])
    refused(ValueError, message.replace("states?", r"states\[1\]", 1), jbn.merge_states, STATE, state)
    refused(
        TypeError,
        "state.weight is int32.*num_batches_tracked",
        jbn.update,
        STATE._replace(weight=jnp.ones(3, int)),
        MOMENTS,
    )


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


@pytest.mark.parametrize("axis_name", [0, 1.5, object(), [["i"]]])
def test_an_axis_name_that_is_no_name(axis_name):
    for name in ("moments", "normalize_batch", "batch_norm"):
        refused(TypeError, r"axis_name is .*; expected the name", MEASURING[name], X, axis_name=axis_name)


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


@pytest.mark.parametrize("transform", [jax.vmap, jax.pmap])
def test_a_vmap_over_the_examples_without_a_name(transform):
    f = lambda x: jbn.normalize_batch(x[None], PARAMS)[0]  # noqa: E731
    refused(ValueError, r"\[1, 3\], which is one value per feature.*vmap or pmap.*axis_name", transform(f), X)
    g = lambda x: jbn.normalize_batch(x, PARAMS)[0]  # noqa: E731
    refused(ValueError, r"\[3\], which is one value per feature.*vmap or pmap.*axis_name", transform(g), X)


@pytest.mark.parametrize("shape", [(0,), (4, 0), (0, 0)])
def test_no_feature_at_all(shape):
    params, state = jbn.Params(1.0, 0.0), jbn.State(0.0, 1.0)
    message = (
        rf"x has shape {re.escape(str(list(shape)))}, in which the feature axes have sizes \[0\]: no feature at all"
    )
    refused(ValueError, message, jbn.normalize_batch, jnp.ones(shape), params)
    refused(ValueError, message, jbn.batch_norm, jnp.ones(shape), params, state, train=True)


@pytest.mark.parametrize("groups", [0, -1, 1.5, True, None, "2"])
def test_groups_that_are_no_number(groups):
    refused(ValueError, r"groups is .*; expected an int of at least 1", jbn.normalize_batch, X, PARAMS, groups=groups)
    assert jbn.normalize_batch(X, PARAMS, groups=np.int64(2))[0].shape == X.shape


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


@pytest.mark.parametrize("features", [3.0, "3", None, (3, 1.5)])
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
