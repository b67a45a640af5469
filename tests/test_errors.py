"""What is refused, with a message that says what arrived, what was expected and what to do."""

import re
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import ways
from jax.sharding import PartitionSpec as P

import jbn

PARAMS, STATE = jax.device_get(jbn.init(3))
X = np.ones((4, 3), np.float32)
MOMENTS = jbn.Moments(np.float32(4), *np.ones((3, 3), np.float32), np.float32(4))
TRAIN = partial(jbn.batch_norm, train=True)


def refused(error, message, f, *args, **options):
    with pytest.raises(error, match=f"(?s){message}"):
        f(*args, **options)


def of(value):
    """A name for a test."""
    return value if isinstance(value, str) else type(value).__name__ if isinstance(value, dict | tuple) else None


NORMALIZING = {
    "normalize_batch": lambda x, **options: jbn.normalize_batch(x, PARAMS, **options),
    "normalize_running": lambda x, **options: jbn.normalize_running(x, PARAMS, STATE, **options),
    "batch_norm": lambda x, **options: TRAIN(x, PARAMS, STATE, **options),
    "batch_norm in evaluation": lambda x, **options: jbn.batch_norm(x, PARAMS, STATE, train=False, **options),
}
MEASURING = {"moments": jbn.moments} | NORMALIZING
POOLING = ("moments", "normalize_batch", "batch_norm")
TAKING_A_STATE = (
    lambda state: jbn.normalize_running(X, PARAMS, state),
    lambda state: TRAIN(X, PARAMS, state),
    lambda state: jbn.batch_norm(X, PARAMS, state, train=False),
    lambda state: jbn.batch_renorm(X, PARAMS, state, train=True),
    lambda state: jbn.update(state, MOMENTS),
)
IMAGINARY = r"x is complex64\[4, 3\].*imaginary.*features of their own.*jnp.concatenate\(\[x.real, x.imag\], axis=-1\)"
NO_ARRAY = r"x is (None|'x'|a dict|a list|a object); expected an array"
X_THAT_IS_NONE = [  # the error, its message, x
    *((TypeError, rf"x is {dtype}\[4, 3\].*floating-point.*cast", X.astype(dtype)) for dtype in ("int32", "bool")),
    (TypeError, IMAGINARY, X.astype(np.complex64)),
    *((TypeError, NO_ARRAY, x) for x in (None, "x", {"x": X}, [[1.0], [1.0, 2.0]], object())),
    (TypeError, r"x is a Params; expected an array. Is the order right", PARAMS),
    (TypeError, r"x is a tuple.*a batch of several arrays has to be taken apart", (X, X)),
    (TypeError, r"x is a ndarray of object; expected an array of numbers", np.array([None, 1])),
]
NO_AXIS = r"feature_axis is .* x has shape \[4, 3\].*at least one axis"
OPTIONS_THAT_DO_NOT_FIT = [
    *((ValueError, NO_AXIS, {"feature_axis": axis}) for axis in (2, -3, (0, 0), (1, -1), (), (0, 5))),
    *(
        (TypeError, "feature_axis is .*int or a tuple of ints", {"feature_axis": axis})
        for axis in ("channels", 1.0, None, ("a",))
    ),
    (TypeError, r"weights is a dict; expected an array", {"weights": {}}),
    (TypeError, "weights is complex64.*boolean mask or real", {"weights": np.ones(4, np.complex64)}),
    *(
        (
            ValueError,
            re.escape(f"weights has shape {list(shape)} and x has shape [4, 3]; expected [4, 3]"),
            {"weights": np.ones(shape)},
        )
        for shape in ((3,), (5,), (3, 4), (2, 1), (4, 1, 1), ())
    ),
]


@pytest.mark.parametrize("f", MEASURING.values(), ids=MEASURING)
def test_x_and_options_of_every_function(f):
    for error, message, x in X_THAT_IS_NONE:
        refused(error, message, f, x)
    for error, message, options in OPTIONS_THAT_DO_NOT_FIT:
        refused(error, message, f, X, **options)


@pytest.mark.parametrize("f", NORMALIZING.values(), ids=NORMALIZING)
def test_features_and_epsilon_of_every_normalization(f):
    message = r"params.scale has shape \[3\]; expected \[5\]"
    refused(ValueError, rf"{message}.*feature_axis.*jbn.init", f, np.ones((4, 5), np.float32))
    channels_first = np.ones((2, 3, 5, 5), np.float32)
    refused(ValueError, rf"{message}, the features of x \[2, 3, 5, 5\]. Axis 1 .* feature_axis=1", f, channels_first)
    for epsilon in (-1e-5, float("nan"), float("inf"), np.float32(-1)):
        refused(ValueError, "epsilon is .*not negative", f, X, epsilon=epsilon)


def test_the_remedy_for_complex_x_keeps_both_halves():
    x = np.random.default_rng(0).normal(size=(2, 8, 3)).astype(np.float32)
    both = jbn.moments(np.concatenate(x, axis=-1))
    np.testing.assert_allclose(both.var, np.concatenate(np.float64(x).var(1)), rtol=1e-5)


NUMBERS = {
    "decay": lambda value: TRAIN(X, PARAMS, STATE, decay=value),
    "decay of update": lambda value: jbn.update(STATE, MOMENTS, decay=value),
    "epsilon": lambda value: TRAIN(X, PARAMS, STATE, epsilon=value),
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


def test_numbers_out_of_range():
    for name, value, message in (
        ("r_max", 0.5, "at least 1"),
        ("d_max", -1, "at least 0"),
        ("r_min", 1.5, r"\[0, 1\]"),
    ):
        refused(ValueError, rf"{name} is {value}; expected.*{message}", NUMBERS[name], value)
    for decay, train in product((-0.1, 1.1, 10, float("nan"), np.float32(2)), (True, False)):
        message = r"decay is .*\[0, 1\].*old value.*PyTorch"
        refused(ValueError, message, jbn.batch_norm, X, PARAMS, STATE, train=train, decay=decay)
        refused(ValueError, message, jbn.update, STATE, MOMENTS, decay=decay)
    for amount in (-0.1, 1.1, float("nan")):
        refused(ValueError, r"amount is .*\[0, 1\]", jbn.update, STATE, MOMENTS, amount=amount)
    refused(ValueError, r"decay has shape \[3\]; expected a scalar", jbn.update, STATE, MOMENTS, decay=np.ones(3))
    message = r"amount has shape \[2\]; expected a scalar or \[3\]"
    refused(ValueError, message, jbn.update, STATE, MOMENTS, amount=np.ones(2))


def test_values_of_other_features():
    _, state = jbn.init(5)
    message = r"state.mean has shape \[5\]; expected \[3\], the features of x \[4, 3\].*jbn.init"
    for f in TAKING_A_STATE[:-1]:
        refused(ValueError, message, f, state)
    refused(ValueError, r"moments.mean has shape \[3\]; expected \[5\]", jbn.update, state, MOMENTS)
    other = STATE._replace(weight=np.zeros(2, np.float32))
    refused(ValueError, r"state.weight has shape \[2\]; expected \[3\]", jbn.update, other, MOMENTS)
    two = jbn.Moments(np.float32(4), *np.ones((2, 2), np.float32))
    refused(ValueError, r"moments\[1\].mean has shape \[2\]; expected \[3\]", jbn.merge, MOMENTS, two)
    for f in (jbn.moments, NORMALIZING["normalize_batch"]):
        message = r"center has shape \[4\]; expected \[3\], a value for each feature"
        refused(ValueError, message, f, X, center=np.ones(4))
        refused(TypeError, r"center is int32; expected a floating-point type", f, X, center=np.ones(3, np.int32))


def test_stacked_params_and_states():
    params, state = jax.tree.map(lambda a: np.stack([a, a]), (PARAMS, STATE))
    message = r"has shape \[2, 3\]; expected \[3\].*stacked.*one at a time"
    refused(ValueError, f"params.scale {message}", jbn.normalize_running, X, params, STATE)
    refused(ValueError, f"state.mean {message}", jbn.normalize_running, X, PARAMS, state)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_state_that_cannot_hold_an_average(dtype):
    narrow = jax.tree.map(lambda field: field.astype(dtype), (STATE, MOMENTS))
    message = rf"state.mean is {jnp.dtype(dtype)}, which cannot hold a running average.*where you cast a tree"
    for f in TAKING_A_STATE:
        refused(TypeError, message, f, narrow[0])
    refused(TypeError, rf"moments.count is {jnp.dtype(dtype)}", jbn.update, STATE, narrow[1])


def test_fields_that_are_none_or_not_floating_point():
    whole = np.ones(3, np.int32)
    refused(TypeError, "params.scale is int32", jbn.normalize_batch, X, PARAMS._replace(scale=whole))
    refused(TypeError, "state.mean is int32", jbn.update, STATE._replace(mean=whole), MOMENTS)
    for f in TAKING_A_STATE:
        refused((TypeError, ValueError), "state.var", f, STATE._replace(var=None))


@pytest.mark.parametrize("count", [1_000, 1.5, -0.5, float("nan"), np.full(3, 1e6), [0.5, 0.5, 7]])
def test_a_weight_that_is_no_evidence(count):
    """Someone passes PyTorch's num_batches_tracked."""
    state = STATE._replace(weight=count)
    message = r"states?.weight has values from .*\[0, 1\].*num_batches_tracked.*jbn.State\(running_mean, running_var\)"
    for f in (*TAKING_A_STATE, *(partial(over, None, PARAMS, batches=[X]) for over in (jbn.recalibrate, jbn.drift))):
        refused(ValueError, message, f, state)
    for index, layers in enumerate(({"norm": [state]}, {"norm": [STATE, state]})):
        refused(ValueError, rf"states\['norm'\]\[{index}\].weight has", jbn.recalibrate, None, PARAMS, layers, [X])
    refused(ValueError, message.replace("states?", r"states\[1\]", 1), jbn.merge_states, STATE, state)
    counts = STATE._replace(weight=np.ones(3, np.int32))
    refused(TypeError, "state.weight is int32.*num_batches_tracked", jbn.update, counts, MOMENTS)


@pytest.mark.parametrize("wrong", [None, (), {}, 3.0, X], ids=of)
def test_something_else_for_params_state_or_moments(wrong):
    name = type(wrong).__name__
    refused(TypeError, rf"params is a {name}; expected a jbn.Params", jbn.normalize_batch, X, wrong)
    for f in TAKING_A_STATE:
        refused(TypeError, rf"state is a {name}; expected a jbn.State", f, wrong)
    refused(TypeError, rf"moments is a {name}; expected a jbn.Moments", jbn.update, STATE, wrong)
    refused(TypeError, rf"is a {name}; expected a jbn.Moments", jbn.merge, wrong)
    refused(TypeError, rf"is a {name}; expected a jbn.Moments", jbn.merge, MOMENTS, wrong)


DICT = {"mean": np.zeros(3), "var": np.ones(3), "weight": np.ones(3)}
PAIR = jbn.init(3)
TAKEN_FOR_ANOTHER = {  # the message, and the call
    "swapped": (r"params is a State; expected a jbn.Params", lambda: jbn.normalize_running(X, STATE, PARAMS)),
    "a state for params": (
        r"params is a State; expected a jbn.Params. Is the order right\?",
        lambda: TRAIN(X, STATE, PARAMS),
    ),
    "moments first": (r"moments is a State; expected a jbn.Moments.*order", lambda: jbn.update(MOMENTS, STATE)),
    "a dict of params": (
        r"params is a dict .*jbn.Params\(\*\*params\)",
        lambda: jbn.normalize_batch(X, PARAMS._asdict()),
    ),
    "a dict of moments": (
        r"moments is a dict .*jbn.Moments\(\*\*moments\)",
        lambda: jbn.update(STATE, MOMENTS._asdict()),
    ),
    "of a network": (
        "one for each normalization: pass that of this one",
        lambda: jbn.normalize_batch(X, {"norm1": PARAMS}),
    ),
    "a tuple": (r"params is a tuple.*jbn.Params\(\*params\)", lambda: jbn.normalize_batch(X, tuple(PARAMS))),
    "a list": (
        r"state is a list.*mean, var, weight.*jbn.State\(\*state\)",
        lambda: jbn.update(list(STATE), MOMENTS),
    ),
    "the pair of init": (
        r"params is a tuple.*jbn.init gives the pair \(params, state\): take it apart",
        lambda: jbn.normalize_batch(X, PAIR),
    ),
    "the pair for a state": (r"state is a tuple.*take it apart", lambda: jbn.normalize_running(X, PARAMS, PAIR)),
    "the pair of batch_norm": (
        r"x is a tuple; expected an array. jbn.batch_norm returns the pair",
        lambda: TRAIN((X, STATE), PARAMS, STATE),
    ),
    "states": (r"state is a list.*pass that of this one", lambda: TRAIN(X, PARAMS, [STATE] * 2)),
    "states to merge": (r"moments\[0\] is a State.*jbn.merge_states", lambda: jbn.merge(STATE, STATE)),
    "no state": (r"states is a Params without a jbn.State", lambda: jbn.empty_moments(PARAMS)),
    "a list of moments": (
        r"moments\[0\] is a list.*one by one, as in merge\(\*moments\)",
        lambda: jbn.merge([MOMENTS, MOMENTS]),
    ),
    "nothing": (r"merge was given nothing.*merge\(\*parts\)", jbn.merge),
    "shares": (r"shares is", lambda: jbn.merge_states(STATE, STATE, shares={})),
    "moments in evaluation": (
        r"state is a Moments, which accumulates in training.*jbn.update\(state, moments, decay=0.0\)",
        lambda: jbn.batch_norm(X, PARAMS, MOMENTS, train=False),
    ),
    "moments in renorm": (
        r"state is a Moments",
        lambda: jbn.batch_renorm(X, PARAMS, MOMENTS, train=True),
    ),
    "moments in renorm's evaluation": (
        r"state is a Moments",
        lambda: jbn.batch_renorm(X, PARAMS, MOMENTS, train=False),
    ),
}


@pytest.mark.parametrize(("message", "call"), TAKEN_FOR_ANOTHER.values(), ids=TAKEN_FOR_ANOTHER)
def test_one_thing_is_taken_for_another(message, call):
    refused(TypeError, message, call)


def test_dicts_of_a_checkpoint_and_the_remedy():
    message = r"state is a dict \('mean', 'var', 'weight'\); expected a jbn.State.*make it with jbn.State\(\*\*state\)"
    for f in TAKING_A_STATE:
        refused(TypeError, message, f, DICT)
    TRAIN(X, jbn.Params(**PARAMS._asdict()), jbn.State(**DICT))


@pytest.mark.parametrize("name", POOLING)
def test_an_axis_name_that_is_no_name_or_not_bound(name):
    f = MEASURING[name]
    for axis_name in (0, 1.5, object(), [["i"]]):
        refused(TypeError, r"axis_name is .*; expected the name", f, X, axis_name=axis_name)
    for axis_name in ("i", ("i", "j")):
        message = r"no axis 'i' is bound.*vmap.*shard_map.*jit"
        refused(NameError, message, f, X, axis_name=axis_name)
        refused(NameError, message, jax.jit(partial(f, axis_name=axis_name)), X)
    one = jax.vmap(lambda x: f(x, axis_name=("i", "j")), axis_name="i")
    refused(NameError, r"axis_name is \('i', 'j'\), and no axis 'j' is bound", one, X[None])


@pytest.mark.parametrize(("shape", "feature_axis"), [((1, 3), -1), ((3,), 0), ((1, 3, 1, 1), 1)])
def test_one_value_per_feature_in_training(shape, feature_axis):
    message = rf"x has shape \[{', '.join(map(str, shape))}\].*one value per feature.*running"
    x = np.ones(shape, np.float32)
    refused(ValueError, message, jbn.normalize_batch, x, PARAMS, feature_axis=feature_axis)
    refused(ValueError, message, TRAIN, x, PARAMS, STATE, feature_axis=feature_axis)


@pytest.mark.parametrize("transform", [jax.vmap, jax.pmap])
def test_a_vmap_over_the_examples_without_a_name(transform):
    message = r"which is one value per feature.*vmap or pmap.*axis_name"
    f = lambda x: jbn.normalize_batch(x[None], PARAMS)[0]  # noqa: E731
    refused(ValueError, rf"\[1, 3\], {message}", transform(f), X)
    g = lambda x: jbn.normalize_batch(x, PARAMS)[0]  # noqa: E731
    refused(ValueError, rf"\[3\], {message}", transform(g), X)


def test_one_value_on_each_of_many_devices_is_not_one_value():
    f = lambda x: jbn.normalize_batch(x, PARAMS, axis_name="i")[0]  # noqa: E731
    lanes = jax.vmap(f, axis_name="i")
    assert jax.eval_shape(lanes, np.ones((8, 1, 3), np.float32)).shape == (8, 1, 3)
    split = jax.shard_map(f, mesh=ways.mesh(i=8), in_specs=P("i"), out_specs=P("i"))
    assert jax.eval_shape(split, np.ones((8, 3), np.float32)).shape == (8, 3)
    refused(ValueError, "one value per feature", lanes, np.ones((1, 1, 3), np.float32))


def test_one_valid_value_is_not_refused():
    """Which positions a mask leaves is known at run time only: the output is the bias there."""
    y, measured = jbn.normalize_batch(X, PARAMS, weights=np.arange(4) == 2)
    assert measured.count == 1
    assert not np.any(y)


@pytest.mark.parametrize("shape", [(0,), (4, 0), (0, 0)])
def test_no_feature_at_all(shape):
    params, state = jbn.Params(1.0, 0.0), jbn.State(0.0, 1.0)
    message = (
        rf"x has shape {re.escape(str(list(shape)))}, in which the feature axes have sizes \[0\]: no feature at all"
    )
    refused(ValueError, message, jbn.normalize_batch, np.ones(shape), params)
    refused(ValueError, message, TRAIN, np.ones(shape), params, state)


def test_groups_that_are_no_number():
    for groups in (0, -1, 1.5, True, None, "2"):
        message = r"groups is .*; expected an int of at least 1"
        refused(ValueError, message, jbn.normalize_batch, X, PARAMS, groups=groups)
    assert jbn.normalize_batch(X, PARAMS, groups=np.int64(2))[0].shape == X.shape


def test_init():
    for features in (0, -1, (), (3, 0)):
        refused(ValueError, "features is .*size of at least 1", jbn.init, features)
    for features in (3.0, "3", None, (3, 1.5)):
        refused(TypeError, "features is .*int, or a tuple of ints", jbn.init, features)
    for dtype in (jnp.int32, jnp.bool_, jnp.complex64):
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
