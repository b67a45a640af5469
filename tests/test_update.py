"""The update rule against the plain formula in float64, and all that must leave a state as it was."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from numpy.testing import assert_allclose, assert_array_equal

import jbn

FEATURES = 3
OLD = jbn.State(np.float32([1, -2, 3]), np.float32([0.5, 1.5, 4]), np.full(FEATURES, 0.4, np.float32))
PARAMS, FRESH = jax.device_get(jbn.init(FEATURES))
update = jax.jit(jbn.update, static_argnames="unbiased")


def measurements(steps, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(step, 1 + step, (4 + step, FEATURES)).astype(np.float32) for step in range(steps)]


def moments(x):
    """As measured by NumPy."""
    count, mean, var = map(np.float32, reference.moments(x))
    return jbn.Moments(count, mean, var, np.zeros_like(mean), count)


def assert_state(state, expected, rtol=1e-5):
    # A few float32 operations a step.
    jax.tree.map(partial(assert_allclose, rtol=rtol, atol=1e-6), tuple(state), tuple(expected))


def dtypes(state):
    return [field.dtype for field in state]


def assert_same(state, old):
    jax.tree.map(assert_array_equal, state, old)
    assert dtypes(state) == dtypes(old)


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize(("decay", "amount"), [(0.9, 1.0), (0.5, 0.3), (0.999, 1.0), (0.0, 1.0), (0.0, 0.25)])
def test_the_formula_step_by_step(decay, amount, debias, unbiased):
    state = FRESH._replace(weight=np.full(FEATURES, 0 if debias else 1, np.float32))
    plain = (np.zeros(FEATURES), np.ones(FEATURES), 0.0 if debias else 1.0)
    for x in measurements(6):
        state = update(state, moments(x), decay=decay, amount=amount, unbiased=unbiased)
        plain = reference.update(plain, reference.moments(x), decay, amount, unbiased)
        # weight is 1 - 0.999^n there, a difference of nearly equal float32 numbers: 6e-8 / 1e-3.
        assert_state(state, plain, rtol=2e-4 if decay == 0.999 else 1e-5)


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.99])
def test_debiased_is_the_weighted_average_at_every_step(decay):
    """Equinox divides by 1 - m^t what had started at 1: 102.9 for 3.92 at the first step."""
    state, batches = FRESH, measurements(8)
    means, variances = (np.stack([reference.moments(x)[field] for x in batches]) for field in (1, 2))
    for step, x in enumerate(batches):
        state = update(state, moments(x), decay=decay, unbiased=False)
        shares = decay ** np.arange(step, -1, -1.0)
        averages = (np.average(values[: step + 1], 0, shares) for values in (means, variances))
        assert_state(state, (*averages, 1 - decay ** (step + 1)), rtol=2e-5)


@pytest.mark.parametrize("decay", [0.0, 0.1, 0.9, 0.999, 0.99999])
@pytest.mark.parametrize("amount", [1.0, 0.3])
def test_the_first_batch_replaces_the_state_to_the_last_bit(decay, amount):
    measured = moments(measurements(1)[0] * 1e-3)  # 1 + (var - 1) would round
    for f in (update, jbn.update):
        after = f(FRESH, measured, decay=decay, amount=amount, unbiased=False)
        assert_array_equal(after.mean, measured.mean)
        assert_array_equal(after.var, measured.var)


def test_unbiased_is_the_sample_variance():
    x = measurements(1)[0]
    assert_allclose(update(FRESH, moments(x)).var, np.float64(x).var(0, ddof=1), rtol=1e-6)
    assert_allclose(update(FRESH, moments(x), unbiased=False).var, np.float64(x).var(0), rtol=1e-6)


@pytest.mark.parametrize("count", [1.0, 0.5])
@pytest.mark.parametrize("unbiased", [True, False])
def test_a_count_of_1_or_less_says_nothing_of_a_variance(count, unbiased):
    measured = moments(measurements(1)[0])._replace(count=np.float32(count), squares=np.float32(count))
    assert_same(update(OLD, measured, unbiased=unbiased), OLD)


def test_decay_and_amount_may_be_traced():
    x = measurements(1)[0]
    steps = [(0.9, 1.0), (0.3, 0.5), (0.0, 0.1)]
    run = jax.jit(jax.vmap(lambda decay, amount: jbn.update(OLD, moments(x), decay=decay, amount=amount)))
    got = jax.device_get(run(*np.float32(steps).T))
    for row, step in enumerate(steps):
        expected = reference.update([np.float64(field) for field in OLD], reference.moments(x), *step)
        assert_state(jax.tree.map(lambda a: a[row], got), expected)  # noqa: B023


def test_a_concrete_array_may_be_decay_inside_jit():
    decay, measured = jnp.asarray(0.5), moments(measurements(1)[0])
    inside = jax.jit(lambda state: jbn.update(state, measured, decay=decay, amount=jnp.asarray(1.0)))(OLD)
    assert_state(inside, jbn.update(OLD, measured, decay=0.5))


def test_a_boolean_amount_gates_the_update():
    measured = moments(measurements(1)[0])
    gate = lambda amount: jbn.update(OLD, measured, amount=amount)  # noqa: E731
    for f in (gate, jax.jit(gate)):
        for true in (True, np.True_, jnp.asarray(True)):
            assert_state(f(true), update(OLD, measured))
        for false in (False, np.False_, jnp.asarray(False)):
            assert_same(f(false), OLD)


def test_decay_1_leaves_the_state_and_decay_0_replaces_it():
    measured = moments(measurements(1)[0])
    assert_same(update(OLD, measured, decay=1.0), OLD)
    after = update(OLD, measured, decay=0.0, unbiased=False)
    assert_same(after, jbn.State(measured.mean, measured.var, np.ones(FEATURES, np.float32)))


def with_value(field, value):
    """Good moments but for one value of one field, that of feature 1."""
    measured = moments(measurements(1)[0])
    return measured._replace(**{field: np.where(np.arange(FEATURES) == 1, np.float32(value), getattr(measured, field))})


NOTHING = {
    "amount 0": (moments(measurements(1)[0]), {"amount": 0.0}),
    "count 0": (jbn.moments(np.full((4, FEATURES), np.nan, np.float32), weights=np.zeros(4, bool)), {}),
    "empty": (jbn.moments(np.zeros((0, FEATURES), np.float32)), {}),
    "count nan": (moments(measurements(1)[0])._replace(count=np.float32(np.nan)), {}),
    "overflow of the mean": (jbn.moments(np.full((4, FEATURES), 3e38, np.float32)), {}),
}
ONE_FEATURE = {
    "amount 0 of one": (moments(measurements(1)[0]), {"amount": np.float32([1, 0, 1])}),
    "count 0, values left": (with_value("count", 0.0), {}),
    **{
        f"{field} {value}": (with_value(field, value), {})
        for field in ("count", "mean", "var")
        for value in (np.nan, np.inf, -np.inf)
    },
    "count negative": (with_value("count", -1.0), {}),
    "overflow of the unbiased variance": (with_value("var", 3.3e38), {"decay": 0.0}),
    "a NaN in x": (jbn.moments(np.array([[1, np.nan, 2], [3, 4, 5]], np.float32)), {}),
    "overflow of the variance": (jbn.moments(np.array([[1, 1e30, 2], [3, -1e30, 1]], np.float32)), {}),
    "all of a feature masked": (jbn.moments(measurements(1)[0], weights=np.array([[True, False, True]] * 4)), {}),
}
states = pytest.mark.parametrize("state", [OLD, FRESH], ids=["old", "fresh"])


@states
@pytest.mark.parametrize(("measured", "options"), NOTHING.values(), ids=NOTHING)
def test_nothing_moves_bit_for_bit(measured, options, state):
    assert_same(jbn.update(state, measured, **options), state)


@states
@pytest.mark.parametrize(("measured", "options"), ONE_FEATURE.values(), ids=ONE_FEATURE)
def test_one_feature_stays_bit_for_bit_and_the_others_move(measured, options, state):
    after = jbn.update(state, measured, **options)
    assert_same(take(after, 1), take(state, 1))
    good = jax.tree.map(lambda field: field if np.ndim(field) == 0 else np.asarray(field)[OTHERS], measured)
    options = {name: np.take(value, OTHERS) if np.ndim(value) else value for name, value in options.items()}
    assert_same(take(after, OTHERS), jbn.update(take(state, OTHERS), good, **options))
    assert (np.asarray(after.mean)[OTHERS] != state.mean[OTHERS]).all()


OTHERS = np.array([0, 2])


def take(state, features):
    """As channels are pruned."""
    return jax.tree.map(lambda field: np.asarray(field)[features], state)


def test_states_are_cut_and_joined_by_tree_map():
    measured = moments(measurements(1)[0])
    parts = [
        jbn.update(take(OLD, part), jax.tree.map(lambda a, part=part: a[part] if np.ndim(a) else a, measured))
        for part in (np.array([2]), np.array([0, 1]))
    ]
    joined = jax.tree.map(lambda *fields: np.concatenate(fields), *parts)
    assert_same(joined, take(jbn.update(OLD, measured), np.array([2, 0, 1])))


@pytest.mark.parametrize("name", ["amount", "decay"])
def test_a_traced_nan_moves_nothing(name):
    measured = moments(measurements(1)[0])
    assert_same(jax.jit(lambda value: jbn.update(OLD, measured, **{name: value}))(jnp.nan), OLD)


def test_a_state_stays_finite_whatever_is_fed_to_it():
    rng, state = np.random.default_rng(5), FRESH
    step = jax.jit(lambda x, weights, state: jbn.batch_norm(x, PARAMS, state, train=True, weights=weights)[1])
    nasty = [0.0, -0.0, 1e-45, 1e-38, 1.0, 1e19, 3.4e38, -3.4e38, np.inf, -np.inf, np.nan]
    for _ in range(60):
        x = rng.choice(nasty, (6, FEATURES)) * rng.choice([1, 1, 0.5], (6, FEATURES))
        weights = rng.choice([0, 1e-30, 1, 1e30, np.nan, np.inf, -1], 6)
        state = step(x.astype(np.float32), weights.astype(np.float32), state)
        assert all(np.isfinite(leaf).all() for leaf in state)
        assert (np.asarray(state.var) >= 0).all()
    x = measurements(1)[0][:4]
    fed = update(state, moments(x), decay=0.0)
    assert_allclose(fed.mean, np.float64(x).mean(0), rtol=1e-6)


@pytest.mark.parametrize("of_x", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64])
@pytest.mark.parametrize("of_state", [jnp.float32, jnp.float64])
def test_dtypes_of_the_state_never_change(of_state, of_x):
    with jax.enable_x64(True):
        state = jax.tree.map(lambda field: field.astype(of_state), FRESH)
        x = measurements(3)[2][:4].astype(of_x)

        def step(state, x):
            return jbn.batch_norm(x, PARAMS, state, train=True, decay=0.9)[::-1]

        after, _ = jax.jit(lambda state: jax.lax.scan(step, state, np.stack([x, x])))(state)
        assert dtypes(after) == dtypes(state)
        assert_allclose(np.float64(after.mean), np.float64(x).mean(0), rtol=2e-2)


def test_moments_in_the_place_of_a_state_accumulate_in_a_scan():
    """One update by what microbatches of uneven masks gave is the update by the whole batch; a NaN is left out."""
    rng = np.random.default_rng(8)
    parts, mask = rng.normal(3, 2, (5, 4, FEATURES)).astype(np.float32), rng.uniform(size=(5, 4)) < 0.5
    mask[1], mask[2, 0] = False, True
    parts[3, 0], mask[3, 0] = np.nan, True

    @jax.jit
    def accumulate(state, parts, mask):
        def step(total, part):
            y, total = jbn.batch_norm(part[0], PARAMS, total, train=True, weights=part[1])
            return total, y

        return jax.lax.scan(step, jbn.empty_moments(state), (parts, mask))

    total, y = accumulate(OLD, parts, mask)
    first = reference.normalize(parts[0], *reference.moments(parts[0], mask[0])[1:], *PARAMS)
    # One row of two: their variance is a difference of values that are some times as large.
    assert_allclose(np.asarray(y)[0], np.where(mask[0][:, None], first, 0), rtol=1e-4, atol=1e-4)
    whole = reference.moments(np.delete(parts, 3, 0), np.delete(mask, 3, 0)[..., None])
    assert_state(total[:3], (np.full(FEATURES, whole[0]), *whole[1:]))
    assert_state(update(OLD, total), reference.update([np.float64(field) for field in OLD], whole))


@pytest.mark.parametrize(("measured", "options"), NOTHING.values(), ids=NOTHING)
def test_nothing_reaches_moments_in_the_place_of_a_state(measured, options):
    total = update(jbn.empty_moments(OLD), moments(measurements(2)[1]))
    assert_same(jbn.update(total, measured, **options), total)


OF_MOMENTS = {name: case for name, case in ONE_FEATURE.items() if "unbiased" not in name}  # a factor of states


@pytest.mark.parametrize(("measured", "options"), OF_MOMENTS.values(), ids=OF_MOMENTS)
def test_nothing_of_one_feature_reaches_its_moments(measured, options):
    total = update(jbn.empty_moments(OLD), moments(measurements(2)[1]))
    after = jbn.update(total, measured, **options)
    assert_same(take(after, 1), take(total, 1))
    assert (np.asarray(after.count)[OTHERS] > total.count[0]).all()


def test_amount_multiplies_the_count_that_moments_accumulate():
    first, second = map(moments, measurements(2))
    total = update(first, second, amount=0.5)
    merged = jbn.merge(first, second._replace(count=second.count / 2, squares=second.squares / 4))
    assert_state(total, jax.tree.map(lambda field: np.broadcast_to(field, FEATURES), merged))


def test_moments_in_float32_keep_what_float64_data_measures():
    """The sum of mean and mean_low, not the mean alone: what rounding takes from the means would be a variance."""
    with jax.enable_x64(True):
        x = 1e5 + np.random.default_rng(0).standard_normal((64, 64, FEATURES))
        step = lambda total, part: (jbn.update(total, jbn.moments(part)), None)  # noqa: E731
        total, _ = jax.jit(lambda x: jax.lax.scan(step, jbn.empty_moments(FRESH), x))(x)
        assert total.mean.dtype == jnp.float32
        assert_allclose(total.var, x.reshape(-1, FEATURES).var(0), rtol=2e-6)


def test_empty_moments_have_the_shapes_and_dtypes_of_the_states():
    with jax.enable_x64(True):
        states = {"a": jbn.init((2, 3))[1], "b": [jbn.init(1, dtype=jnp.float64)[1]], "steps": 3}
        empty = jbn.empty_moments(states)
        assert [leaf.shape for leaf in empty["a"]] == [(2, 3)] * 5
        assert dtypes(empty["a"]) == [jnp.float32] * 5
        assert dtypes(empty["b"][0]) == [jnp.float64] * 5
        assert empty["steps"] == 3


def test_what_is_measured_in_float64_is_known_further_away():
    """By a state in float32 too: the doubt is that of the measurement."""
    with jax.enable_x64(True):
        x = 1e4 + np.random.default_rng(0).standard_normal((64, FEATURES))
        _, after = jbn.batch_norm(x, PARAMS, FRESH, train=True)
        assert_allclose(after.var, np.var(x, 0, ddof=1), rtol=1e-6)
        assert_allclose(after.weight, 0.1, rtol=1e-6)
