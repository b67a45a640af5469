"""Values whose squares are more than the type of the statistics holds."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbn

WAYS = {
    "two passes": lambda x, params, state, **options: jbn.normalize_batch(x, params, **options)[0],
    "one pass": lambda x, params, state, **options: jbn.normalize_batch(x, params, center=state.mean, **options)[0],
    "groups": lambda x, params, state, **options: jbn.normalize_batch(x, params, groups=4, **options)[0],
    "batch_norm": lambda x, **options: jbn.batch_norm(x, train=True, **options)[0],
    "batch_renorm": lambda x, **options: jbn.batch_renorm(x, train=True, **options)[0],
}
SIZES = {
    jnp.float16: [1e4],
    jnp.bfloat16: [1e19, 1e36],
    jnp.float32: [1e18, 1e19, 1e20, 1e28, 1e36],
    jnp.float64: [1e154],
}


CASES = [(way, jnp.float32) for way in WAYS] + [("batch_norm", dtype) for dtype in SIZES if dtype != jnp.float32]


@pytest.mark.parametrize(("way", "dtype"), CASES, ids=lambda case: getattr(case, "__name__", case))
def test_values_whose_squares_overflow_are_bounded(way, dtype):
    """Right where the squares do not, and 0 for a normalized value where they do; so are the derivatives."""
    with jax.enable_x64(dtype == jnp.float64):
        values = np.random.default_rng(0).normal(1, 1, (64, 3))
        params, state = jbn.init(3, debias=False, dtype=jnp.float64 if dtype == jnp.float64 else jnp.float32)
        for options in {}, {"weights": np.linspace(0, 1, 64)}, {"weights": np.arange(8) < 7, "axis_name": "i"}:
            pooled, f = "axis_name" in options, partial(WAYS[way], params=params, state=state, **options)
            f = jax.vmap(f, axis_name="i") if pooled else f

            @jax.jit
            def results(x, f=f):
                y, tangent = jax.jvp(f, (x,), (jnp.ones_like(x),))
                return y, tangent, jax.grad(lambda x: jnp.sum(jnp.sin(f(x).astype(jnp.float32))))(x)

            for size in SIZES[dtype]:
                x = jnp.asarray(size * values).astype(dtype)
                y, *derivatives = results(x.reshape(8, 8, 3) if pooled else x)
                # A normal value is below 4, and renormalized r_max times that, and d_max.
                assert jnp.abs(y).max() < 3 * 4 + 5
                assert all(jnp.isfinite(each).all() for each in derivatives)
