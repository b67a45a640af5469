"""Variances to 1e-4 and outputs to 1e-5 where the mean is up to 1e5 times the standard deviation."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose
from test_straight import lowered_for

import jbn

# The contract for the variance. A plain two-pass reaches 5e-4 at offset 1e5, E[x^2] - E[x]^2 is off by 7% at 1e3.
RTOL = 1e-4
# x - mean is exact in float32 once the mean is known to twice the precision; the rest is some 1e-6 of rounding.
ATOL = 1e-5
# Counts that are and are not powers of two: the compiler turns division by a constant into a multiplication.
SIZES = [96, 512, 1000, 4096, 131072]
offsets = pytest.mark.parametrize("offset", [1e3, 1e4, -1e5, 1e5])
sizes = pytest.mark.parametrize("size", SIZES)

PARAMS, STATE = jbn.init(2)
measure = jax.jit(jbn.moments, static_argnames="feature_axis")
merge = jax.jit(jbn.merge)
normalize = jax.jit(lambda x, weights=None: jbn.normalize_batch(x, PARAMS, weights=weights))
normalize_about = jax.jit(lambda x, center: jbn.normalize_batch(x, PARAMS, center=center))


def sample(size, offset, seed=0):
    x = np.random.default_rng(seed).standard_normal((size, 2)) * [1, 3] + [offset, 3 * offset]
    return x.astype(np.float32)


def assert_accurate(y, measured, x, mask=None):
    count, mean, var = reference.moments(x, mask)
    assert_allclose(measured.count, count)
    assert_allclose(measured.var, var, rtol=RTOL)
    assert_allclose(np.float64(measured.mean), mean, rtol=2.4e-7)  # an ulp, after one bit is cut
    if y is not None:
        wanted = reference.normalize(x, mean, var, [1, 1], [0, 0])
        wanted = wanted if mask is None else np.where(mask[:, None], wanted, 0)
        assert_allclose(y, wanted, rtol=ATOL, atol=ATOL)


@offsets
@sizes
def test_one_batch(size, offset):
    x = sample(size, offset)
    assert_accurate(*normalize(x), x)


def test_eager():
    x = sample(1000, 1e5)
    assert_accurate(*jbn.normalize_batch(x, PARAMS), x)


@pytest.mark.parametrize("size", [1000, 131072])
def test_features_first(size):
    x = sample(size, 1e5)
    assert_accurate(None, measure(x.T, feature_axis=0), x)


@offsets
@pytest.mark.parametrize("size", [96, 1000, 4096])
def test_masked(size, offset):
    x, mask = sample(size, offset), np.random.default_rng(1).uniform(size=size) < 0.7
    assert_accurate(*normalize(x, mask), x, mask)


@pytest.mark.parametrize("size", [96, 1000, 131072])
@pytest.mark.parametrize("outlier", [0.0, 1e6])
def test_the_first_row_is_an_outlier(size, outlier):
    x = sample(size, 1e4)
    x[0] = outlier
    assert_accurate(*normalize(x), x)


PARTITIONS = {
    "512 values": (2, 7, 300, 100, 103),
    "511 values": (300, 2, 2, 2, 205),
    "pairs": (2,) * 8 + (300, 196),
    "131072 values": (1, 3, 5, 131063),
}


@offsets
@pytest.mark.parametrize("parts", PARTITIONS.values(), ids=PARTITIONS)
def test_merge_of_uneven_parts(parts, offset):
    x = sample(sum(parts), offset)
    split = np.split(x, np.cumsum(parts)[:-1])
    assert_accurate(None, merge_in_one_program(split), x)


@jax.jit
def merge_in_one_program(split):
    return jbn.merge(*map(jbn.moments, split))


@offsets
def test_merge_of_parts_measured_apart(offset):
    x = sample(512, offset)
    parts = [measure(part) for part in np.split(x, np.cumsum((2, 7, 300, 100)))]
    assert_accurate(None, merge(*parts), x)
    one_by_one = parts[0]
    for part in parts[1:]:
        one_by_one = merge(one_by_one, part)
    assert_accurate(None, one_by_one, x)


@offsets
def test_merge_of_parts_that_lie_apart(offset):
    x = sample(1000, offset) + np.repeat(np.arange(10, dtype=np.float32), 100)[:, None] * 30
    assert_accurate(None, merge_in_one_program(np.split(x, 10)), x)


@cache
def synchronized(way):
    def local(x, mask):
        return jbn.normalize_batch(x, PARAMS, weights=mask, axis_name="i")

    if way == "vmap":

        def run(x, mask):
            split = lambda a: None if a is None else a.reshape(8, -1, *a.shape[1:])  # noqa: E731
            y, measured = jax.vmap(local, (0, None if mask is None else 0), axis_name="i")(split(x), split(mask))
            return y.reshape(x.shape), jax.tree.map(lambda a: a[0], measured)

        return jax.jit(run)
    mesh = jax.make_mesh((8,), ("i",), axis_types=(AxisType.Auto,))
    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(P("i"), P("i")), out_specs=(P("i"), P())))


@offsets
@pytest.mark.parametrize(("way", "size"), [("vmap", 16), ("vmap", 1000), ("shard_map", 512), ("shard_map", 131072)])
def test_synchronized(way, size, offset):
    x = sample(size, offset)
    assert_accurate(*synchronized(way)(x, None), x)


@offsets
@pytest.mark.parametrize("way", ["vmap", "shard_map"])
def test_synchronized_and_masked_with_an_outlier(way, offset):
    x, mask = sample(1000, offset), np.random.default_rng(1).uniform(size=1000) < 0.6
    mask[125:250] = False
    x[0], mask[0] = 0.0, True
    assert_accurate(*synchronized(way)(x, mask), x, mask)


@jax.jit
def differentiate(x, dy):
    return jax.vjp(lambda *args: jbn.normalize_batch(*args)[0], x, PARAMS)[1](dy)


@offsets
def test_gradient(offset):
    x, dy = sample(1000, offset), np.random.default_rng(2).standard_normal((1000, 2)).astype(np.float32)
    dx, dparams = differentiate(x, dy)
    expected = reference.gradients(x, dy, [1, 1])
    assert_allclose(dx, expected[0], rtol=ATOL, atol=ATOL)
    # Sums of 1000 values, each within 1e-6.
    assert_allclose(dparams.scale, expected[1], rtol=ATOL, atol=1e-4)
    assert_allclose(dparams.bias, expected[2], rtol=ATOL, atol=1e-4)


@offsets
def test_running_statistics_measured_without_a_center(offset):
    """For data whose first step has to be exact."""

    state, plain = STATE, (np.zeros(2), np.ones(2), np.zeros(2))
    for seed in range(3):
        x = sample(1000, offset, seed)
        y, measured = normalize(x)
        assert_accurate(y, measured, x)
        state = jbn.update(state, measured, unbiased=False)
        plain = reference.update(plain, reference.moments(x), unbiased=False)
        assert_allclose(state.var, plain[1], rtol=RTOL)
        assert_allclose(state.mean, plain[0], rtol=5e-7)


@cache
def normalize_about_for(platform, size):
    """As it is lowered for that platform; it runs here."""

    def as_tuples(x, center):  # what `jax.export` knows
        y, measured = normalize_about(x, center)
        return y, tuple(measured)

    operands = sample(size, 0), np.zeros(2, np.float32)
    return jax.jit(lowered_for(platform, as_tuples, *operands))


@offsets
@sizes
@pytest.mark.parametrize("distance", [0.0, 1.1, 11.9])
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_about_a_center(platform, size, offset, distance):
    """Up to 12 standard deviations away the one pass is as good as the two, also where the center is not round."""
    x = sample(size, offset)
    center = np.float32([offset + distance, 3 * (offset + distance)])
    y, measured = normalize_about_for(platform, size)(x, center)
    measured = jbn.Moments(*measured)
    _, mean, var = reference.moments(x)
    assert_allclose(measured.var, var, rtol=RTOL)
    assert_allclose(np.float64(measured.mean), mean, rtol=2.4e-7)
    # Half of what the variance may be off by, and what x - center loses 12 standard deviations away.
    assert_allclose(y, reference.normalize(x, mean, var, [1, 1], [0, 0]), rtol=RTOL / 2, atol=ATOL)


@pytest.mark.parametrize("distance", [1e2, 1e3, 1e5])
def test_a_variance_is_never_below_what_rounding_can_have_made_of_it(distance):
    x = sample(4096, 0.0)
    center = np.float32([distance, 3 * distance])
    _, measured = normalize_about(x, center)
    least = 32 * 2.0**-24 * np.float64(center) ** 2
    var = np.asarray(measured.var)
    assert (var >= 0.99 * least).all()
    assert (var <= np.maximum(2 * reference.moments(x)[2], 1.01 * least)).all()


def test_float16_near_its_largest_value():
    """Sums and squares of such values overflow in float16: the reduction is done in float32."""
    x = (6e4 + 64 * np.random.default_rng(0).standard_normal((1000, 2))).astype(np.float16)
    y, measured = normalize(x)
    _, mean, var = reference.moments(x)
    assert_allclose(measured.var, var, rtol=RTOL)
    # What remains is the rounding of y to float16.
    assert_allclose(np.float64(y), reference.normalize(x, mean, var, [1, 1], [0, 0]), rtol=2**-11, atol=1e-4)


def test_bfloat16():
    x = (300 + 4 * np.random.default_rng(0).standard_normal((4096, 2))).astype(jnp.bfloat16)
    y, measured = normalize(x)
    _, mean, var = reference.moments(np.float64(x))
    assert_allclose(measured.var, var, rtol=RTOL)
    expected = reference.normalize(np.float64(x), mean, var, [1, 1], [0, 0])
    assert_allclose(np.float64(y), expected, rtol=2**-8, atol=1e-4)


def test_outputs_stay_bounded_beyond_the_contract():
    """No value of n can lie further than sqrt(n - 1) standard deviations from the mean."""
    for offset in (1e6, 1e7, 1e8):
        y, _ = normalize(sample(1000, offset))
        assert np.abs(np.asarray(y)).max() <= 1000**0.5
