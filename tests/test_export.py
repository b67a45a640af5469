"""`jax.export` with sizes that are not known: serialized, brought back, and the same numbers, for three platforms."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from numpy.testing import assert_allclose

import jbn

FEATURES = 4
PARAMS = jbn.Params(*np.random.default_rng(0).normal(size=(2, FEATURES)).astype(np.float32))
STATE = jbn.State(*np.random.default_rng(1).uniform(0.5, 1, (3, FEATURES)).astype(np.float32))
MOMENTS = jbn.moments(np.random.default_rng(2).normal(size=(9, FEATURES)).astype(np.float32))
PLATFORMS = ("cpu", "cuda", "tpu")


def training(x, mask, params, state, moments, normalize=jbn.batch_norm, **options):
    """A step with its gradients."""

    def loss(x, params):
        y, after = normalize(x, params, state, train=True, **options)
        return jnp.sum(jnp.sin(y)), (y, after)

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(x, params)


def masked(x, mask, params, state, moments, real):
    weights = mask.astype(x.dtype) * 0.3 if real else mask
    return training(x, mask, params, state, moments, weights=weights)


IN_GROUPS = {
    "batch_norm in groups": partial(training, groups=4),
    "batch_norm in interleaved groups": partial(training, groups=4, interleaved=True),
}
OTHERS = {
    "batch_norm": training,
    "batch_norm, masked": partial(masked, real=False),
    "batch_norm, real weights": partial(masked, real=True),
    "batch_norm in evaluation": lambda x, w, p, s, m: jbn.batch_norm(x, p, s, train=False),
    "batch_norm by moments": lambda x, w, p, s, m: jbn.batch_norm(x, p, m, train=True),
    "batch_renorm": partial(training, normalize=jbn.batch_renorm),
    "renorm_limits": lambda x, w, p, s, m: jbn.renorm_limits(x.shape[0]),
    "normalize_batch": lambda x, w, p, s, m: jbn.normalize_batch(x, p, weights=w),
    "normalize_running": lambda x, w, p, s, m: jbn.normalize_running(x, p, s),
    "normalize_running by moments": lambda x, w, p, s, m: jbn.normalize_running(x, p, m),
    "moments": lambda x, w, p, s, m: jbn.moments(x, weights=w),
    "merge": lambda x, w, p, s, m: jbn.merge(m, jbn.moments(x)),
    "merge_states": lambda x, w, p, s, m: jbn.merge_states(s, jbn.update(s, m), shares=[1, 3]),
    "update": lambda x, w, p, s, m: jbn.update(s, m),
    "init and empty_moments": lambda x, w, p, s, m: (jbn.init(FEATURES), jbn.empty_moments(s)),
}


def like(tree):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(jnp.shape(a), jnp.result_type(a)), tree)


def exported(f, batch, vjp_order=0):
    (rows,) = export.symbolic_shape(batch)
    specs = jax.ShapeDtypeStruct((rows, 3, FEATURES), jnp.float32), jax.ShapeDtypeStruct((rows, 3, 1), jnp.bool_)
    program = export.export(jax.jit(f), platforms=PLATFORMS)(*specs, *like((PARAMS, STATE, MOMENTS)))
    return export.deserialize(program.serialize(vjp_order=vjp_order))


@pytest.mark.parametrize(("functions", "batch"), [(OTHERS, "rows"), (IN_GROUPS, "4*rows")], ids=["others", "groups"])
def test_every_function(functions, batch):
    """In one program, which takes a batch of any size."""

    def every(*operands):
        return {name: f(*operands) for name, f in functions.items()}

    again = exported(every, batch)
    assert again.platforms == PLATFORMS
    x = np.random.default_rng(0).normal(1, 2, (12, 3, FEATURES)).astype(np.float32)
    mask = np.random.default_rng(1).uniform(size=(12, 3, 1)) < 0.7
    operands = x, mask, PARAMS, STATE, MOMENTS
    got, wanted = again.call(*operands), jax.jit(every)(*operands)
    assert jax.tree.structure(got) == jax.tree.structure(wanted)  # Params, State and Moments come back
    jax.tree.map(partial(assert_allclose, rtol=1e-5, atol=1e-5), got, wanted)


def test_what_is_exported_is_differentiable():
    again = exported(OTHERS["batch_norm in evaluation"], "rows", vjp_order=1)
    x, mask = np.random.default_rng(0).normal(size=(8, 3, FEATURES)).astype(np.float32), np.ones((8, 3, 1), bool)
    got = jax.jit(jax.grad(lambda x: jnp.sum(again.call(x, mask, PARAMS, STATE, MOMENTS)[0] ** 3)))(x)
    wanted = jax.jit(jax.grad(lambda x: jnp.sum(jbn.normalize_running(x, PARAMS, STATE) ** 3)))(x)
    assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_groups_of_a_size_that_may_not_divide():
    with pytest.raises(
        ValueError, match=r"groups is 4 and axis 0 of x has size rows; .*export.symbolic_shape\('4\*rows'\)"
    ):
        exported(IN_GROUPS["batch_norm in groups"], "rows")


def test_a_second_registration_is_refused_and_says_what_is_there():
    for kind in (jbn.Params, jbn.State, jbn.Moments):
        with pytest.raises(ValueError, match=rf"Duplicate .* `jbn.{kind.__name__}`"):
            export.register_namedtuple_serialization(kind, serialized_name="mine")


def test_a_batch_that_a_constraint_says_can_be_divided():
    (batch,) = export.symbolic_shape("batch", constraints=["mod(batch, 128) == 0", "batch >= 128"])
    step = jax.jit(lambda x: jbn.batch_norm(x, PARAMS, STATE, train=True)[0])
    exported = export.export(step, platforms=PLATFORMS)(jax.ShapeDtypeStruct((batch, FEATURES), jnp.float32))
    x = np.random.default_rng(3).normal(size=(128, FEATURES)).astype(np.float32)
    wanted = PARAMS.scale * (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) + PARAMS.bias
    assert_allclose(exported.call(x), wanted, rtol=1e-4, atol=1e-5)
