"""No branch and no loop, on any platform: what CPU, GPU and TPU are lowered to, compiled and run on this CPU.

Neither is here, but what JAX hands to their compilers can be compiled and run: constant conditions, as of a choice by
platform, are folded, and whatever else there is shows in the text.
"""

from functools import partial

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import ways
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose

import jbn
from jbn import streams

ROWS, FEATURES = 16, 6
PARAMS, STATE = jbn.init(FEATURES)
RANDOM = np.random.default_rng(0)
X, DY = RANDOM.standard_normal((2, ROWS, 4, FEATURES)).astype(np.float32)
MASK = RANDOM.uniform(size=(ROWS, 4)) < 0.7
PLATFORMS = ("cpu", "cuda", "tpu")


def training(x, dy, params, state, normalize=jbn.batch_norm, **options):
    """Forward and backward."""

    def forward(x, params):
        return normalize(x, params, state, train=True, **options)

    y, pullback, after = jax.vjp(forward, x, params, has_aux=True)
    return y, after, pullback(dy)


def channels_first(x, dy, params, state):
    return training(jnp.moveaxis(x, -1, 1), jnp.moveaxis(dy, -1, 1), params, state, feature_axis=1)


def bfloat16(x, dy, params, state):
    return training(x.astype(jnp.bfloat16), dy.astype(jnp.bfloat16), params, state)


def ensemble(x, dy, params, state):
    return jax.vmap(training)(*jax.tree.map(lambda a: jnp.stack([a, 2 * a]), (x, dy, params, state)))


def in_shard_map(x, dy, params, state, check_vma, activation=None, **manual):
    local = partial(training, axis_name="i", activation=activation)
    if not check_vma:
        # Each device has its own share of the gradients of params.
        whole = local
        local = lambda *operands: (lambda y, s, g: (y, s, (g[0], jax.lax.psum(g[1], "i"))))(*whole(*operands))  # noqa: E731
    data, same = P("i"), P()
    mesh = ways.mesh(i=4, j=2) if manual else ways.mesh(i=8)
    specs = {"in_specs": (data, data, same, same), "out_specs": (data, same, (data, same))}
    return jax.shard_map(local, mesh=mesh, check_vma=check_vma, **specs, **manual)(x, dy, params, state)


def recalibration(x, dy, params, state):
    def apply(params, state, x):
        return jbn.batch_norm(x, params, state, train=True)

    return jbn.recalibrate(apply, params, state, [x], passes=1)


def stream(x, dy, params, state):
    seen = streams.observe(streams.init(FEATURES), x, weights=MASK, horizon=1e6)
    return seen, streams.normalize(seen, x, clip=5.0)


FORMS = {
    "training": training,
    "masked": partial(training, weights=MASK),
    "masked by feature": partial(training, weights=np.asarray(X) > -1),
    "real weights": partial(training, weights=MASK * np.float32(0.3)),
    "bfloat16": bfloat16,
    "groups": partial(training, groups=4),
    "relu": partial(training, activation=jax.nn.relu),
    "masked relu": partial(training, weights=MASK, activation=jax.nn.relu),
    "relu in shard_map": partial(in_shard_map, check_vma=True, activation=jax.nn.relu),
    "channels first": channels_first,
    "ensemble": ensemble,
    "shard_map": partial(in_shard_map, check_vma=True),
    "unchecked shard_map": partial(in_shard_map, check_vma=False),
    "partly manual": partial(in_shard_map, check_vma=True, axis_names={"i"}),
    "partly manual, unchecked": partial(in_shard_map, check_vma=False, axis_names={"i"}),
    "renorm": partial(training, normalize=jbn.batch_renorm),
    "stream": stream,
    "recalibrate": recalibration,
    "evaluation": lambda x, dy, params, state: jbn.batch_norm(x, params, state, train=False)[0],
    "no center": lambda x, dy, params, state: jax.grad(lambda x: jnp.sum(jbn.normalize_batch(x, params)[0] ** 3))(x),
}
POOLED = tuple(form for form in FORMS if "shard_map" in form or "manual" in form)


def exported_for(platform, f, *args):
    unchecked = [jax.export.DisabledSafetyCheck.platform()]
    return jax.export.export(jax.jit(f), platforms=(platform,), disabled_checks=unchecked)(*args)


def lowered_for(platform, f, *args):
    """`f` as it is lowered for that platform; it runs here."""
    return exported_for(platform, f, *args).call


def put(form):
    """The operands, on the devices that the form is exported for."""
    operands = X, DY, PARAMS, STATE
    if form not in POOLED:
        return operands
    mesh = ways.mesh(i=4, j=2) if "manual" in form else ways.mesh(i=8)
    specs = P("i"), P("i"), P(), P()
    return tuple(jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in zip(operands, specs, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_no_branch_no_loop_and_one_message_each_way(form):
    operands, results, programs = put(form), [], {}
    for platform in PLATFORMS:  # of which most are given the same text: that is compiled once
        exported = exported_for(platform, FORMS[form], *operands)
        programs.setdefault(exported.mlir_module(), (platform, exported.call))
    for platform, call in programs.values():
        compiled = jax.jit(call).lower(*operands).compile()
        reached = [instruction.opcode for _, instruction in hlo.reach(compiled.as_text())]
        assert not {"conditional", "while"} & set(reached), platform
        found = hlo.collectives(compiled.as_text())
        assert [each.kind for each in found] == ["all-reduce"] * (2 if form in POOLED else 0), platform
        results.append(compiled(*operands))
    for result in results[1:]:
        jax.tree.map(partial(assert_allclose, rtol=1e-5, atol=1e-5), result, results[0])


def test_a_branch_would_be_seen():
    """The same check can fail."""

    def branching(x):
        return jax.lax.cond(x[0, 0, 0] > 0, jnp.sin, jnp.cos, x)

    compiled = jax.jit(lowered_for("cuda", branching, X)).lower(X).compile()
    assert "conditional" in [instruction.opcode for _, instruction in hlo.reach(compiled.as_text())]
