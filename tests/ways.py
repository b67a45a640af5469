"""The ways to split a batch over lanes and devices, each a function of the whole batch, and what each has to give.

With each stands the line that its user writes to have the gradients of replicated params, where every device
differentiates the sum of its own losses:

    one device, jit over automatic or explicit shardings   nothing: they are those of the whole batch
    shard_map with check_vma=True                          nothing: they arrive summed, and a psum would add them again
    shard_map with check_vma=False, pmap, vmap             jax.lax.psum(gradients, axis_name): each has its own share

Differentiated from outside of the vmap, pmap or shard_map they arrive summed in all of them.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import reference
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jbn

SHAPE = (32, 2, 3)
PARAMS = jbn.Params(np.float32([0.5, -1, 2]), np.float32([0, 1, -3]))
# Variances and weights away from 0 and 1, so that a state that is left alone differs from one that is made anew.
STATE = jbn.State(np.float32([0.5, -0.5, 1]), np.float32([4, 5, 6]), np.float32([0.5, 0.5, 0.5]))
STEPS = 10
EVERYWHERE = P()
OUTPUTS = ("y", "mean", "var", "weight", "dx", "dscale", "dbias")
# Sums of 64 values near 1, each rounded to float32.
TOLERANCE = 64 * 2**-24


class Way(NamedTuple):
    """A way to split: `split` makes a function of the whole batch out of one device's step, `line` belongs in there."""

    split: Callable
    line: Callable


def nothing(gradients, axis_name):
    return gradients


def psum(gradients, axis_name):
    return jax.lax.psum(gradients, axis_name)


def step(normalize, line, x, weights, dy, params, state, axis_name=None):
    """A training step: y, the new state, and the gradients of sum(y * dy)."""

    def loss(x, params):
        y, after = normalize(x, params, state, train=True, weights=weights, axis_name=axis_name)
        return jnp.sum(y * dy), (y, after)

    (_, (y, after)), (dx, dparams) = jax.value_and_grad(loss, (0, 1), has_aux=True)(x, params)
    return y, after, dx, line(dparams, axis_name)


def mesh(axis_type=AxisType.Auto, devices=None, **axes):
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(axis_type,) * len(axes), devices=devices)


def over_lanes(step, transforms, **axes):
    """Nested `vmap` or `pmap`, the outermost first, over parts of the rows."""
    names, lanes = tuple(axes), tuple(axes.values())
    lane = partial(step, axis_name=names if len(names) > 1 else names[0])
    for transform, name in zip(reversed(transforms), reversed(names), strict=True):
        lane = transform(lane, axis_name=name, in_axes=(0, 0, 0, None, None))

    def split(a):
        return None if a is None else a.reshape(*lanes, -1, *a.shape[1:])

    def one(a):
        a = a.reshape(-1, *a.shape[len(lanes) :])
        return jnp.where(jnp.all(a == a[:1]), a[0], jnp.nan)  # only the first is looked at: all must be the same

    def whole(x, y, after, dx, dparams):
        after, dparams = jax.tree.map(one, (after, dparams))
        return y.reshape(x.shape), after, dx.reshape(x.shape), dparams

    def run(x, weights, dy, params, state):
        return join(x, *lane(split(x), split(weights), split(dy), params, state))

    join = jax.jit(whole)
    return run if jax.pmap in transforms else jax.jit(run)


def of_operands_in(shardings, f, **options):
    """`f` compiled for operands that are put there first: only so do explicit axes show in their types."""
    compiled = jax.jit(f, **options)

    def put(operands):
        return map(jax.device_put, operands, shardings)

    def run(*operands):
        return compiled(*put(operands))

    run.lower = lambda *operands: compiled.lower(*put(operands))
    return run


def in_shard_map(step, check_vma, axis_type=AxisType.Auto, features=None, devices=None, **axes):
    """`shard_map` over as many leading axes of the batch as the mesh has, or the last of them over the features."""
    names = tuple(name for name in axes if name != features)
    data, vectors = P(*names, None, features) if features else P(*names), P(features)
    in_specs, out_specs = (data, P(*names), data, vectors, vectors), (data, vectors, data, vectors)
    local = partial(step, axis_name=names if len(names) > 1 else names[0])
    own = mesh(axis_type, devices, **axes)
    split = jax.shard_map(local, mesh=own, in_specs=in_specs, out_specs=out_specs, check_vma=check_vma)
    if axis_type == AxisType.Auto:
        return jax.jit(split)
    return of_operands_in([NamedSharding(own, spec) for spec in in_specs], split)


def in_partly_manual_shard_map(step, check_vma, axis_type):
    """The rows by hand, the features by the compiler."""
    own = mesh(axis_type, i=2, j=3)
    rows, everywhere = P("i"), P()
    split = jax.shard_map(
        partial(step, axis_name="i"),
        mesh=own,
        axis_names={"i"},
        in_specs=(rows, rows, rows, everywhere, everywhere),
        out_specs=(rows, everywhere, rows, everywhere),
        check_vma=check_vma,
    )
    batch, mask, vectors = (NamedSharding(own, spec) for spec in (P("i", None, "j"), rows, P("j")))
    return of_operands_in((batch, mask, batch, vectors, vectors), split)


def vmap_in_shard_map(step):
    """Unchecked: with `check_vma` on, JAX knows no collective over an axis of `vmap` in there."""

    def lane(*operands, outer, axis_name):
        return step(*operands, axis_name=(axis_name, outer))

    def local(*operands, axis_name):
        return over_lanes(partial(lane, outer=axis_name), [jax.vmap], lane=2)(*operands)

    return in_shard_map(local, False, i=4)


def vmap_of_shard_map(step, check_vma):
    """The second of two members, each with a batch and a training of its own."""
    split = in_shard_map(step, check_vma, i=8)

    def run(x, *rest):
        both = jax.tree.map(lambda a: jnp.stack([a, a]), rest)
        return jax.tree.map(lambda a: a[1], jax.vmap(split)(jnp.stack([3 - 2 * x, x]), *both))

    return jax.jit(run)


def in_scan(step, check_vma):
    """All steps in a `scan` inside `shard_map`: a function of stacked batches, params and state."""

    def local(batches, params, state):
        def one(state, batch):
            results = step(*batch, params, state, axis_name="i")
            return results[1], results

        return jax.lax.scan(one, state, batches)[1]

    data = P(None, "i")
    split = jax.shard_map(
        local, mesh=mesh(i=8), in_specs=(data, P(), P()), out_specs=(data, P(), data, P()), check_vma=check_vma
    )
    return jax.jit(split)


def over_sharded_arrays(step, axis_type, rows, vectors=EVERYWHERE, devices=None, **axes):
    """Plain `jit` over sharded arrays; no name is given."""
    own = mesh(axis_type, devices, **axes)
    batch, mask, vectors = (NamedSharding(own, spec) for spec in (rows, P(*rows[:2]), vectors))
    out = {"out_shardings": (batch, vectors, batch, vectors)} if axis_type == AxisType.Auto else {}
    return of_operands_in((batch, mask, batch, vectors, vectors), step, **out)


def ensemble(step, axis_type, members, rows):
    """The second of two members, each with a batch and a training of its own, in a `vmap` over sharded arrays."""
    own = mesh(axis_type, m=2, i=4)
    stacked, vectors = NamedSharding(own, P(members, rows)), NamedSharding(own, P(members))
    both = of_operands_in((stacked, stacked, stacked, vectors, vectors), jax.vmap(step))

    def stack(x, *rest):
        return np.stack([3 - 2 * x, x]), *jax.tree.map(lambda a: np.stack([a, a]), rest)

    def run(*operands):
        return jax.tree.map(lambda a: jnp.asarray(np.asarray(a)[1]), both(*stack(*operands)))

    run.lower = lambda *operands: both.lower(*stack(*operands))
    return run


WAYS = {
    "one device": Way(jax.jit, nothing),
    "vmap": Way(lambda step: over_lanes(step, [jax.vmap], i=8), psum),
    "nested vmap": Way(lambda step: over_lanes(step, [jax.vmap, jax.vmap], a=4, b=2), psum),
    "pmap": Way(lambda step: over_lanes(step, [jax.pmap], i=8), psum),
    "vmap in pmap": Way(lambda step: over_lanes(step, [jax.pmap, jax.vmap], a=4, b=2), psum),
    "shard_map": Way(lambda step: in_shard_map(step, True, i=8), nothing),
    "shard_map unchecked": Way(lambda step: in_shard_map(step, False, i=8), psum),
    "shard_map of two axes": Way(lambda step: in_shard_map(step, True, a=4, b=2), nothing),
    "shard_map of two axes unchecked": Way(lambda step: in_shard_map(step, False, a=4, b=2), psum),
    "vmap in unchecked shard_map": Way(vmap_in_shard_map, psum),
    "vmap of shard_map": Way(lambda step: vmap_of_shard_map(step, True), nothing),
    "vmap of unchecked shard_map": Way(lambda step: vmap_of_shard_map(step, False), psum),
    "scan in shard_map": Way(lambda step: in_scan(step, True), nothing),
    "scan in unchecked shard_map": Way(lambda step: in_scan(step, False), psum),
}


def on_meshes_of(kind, axis_type):
    """What is for automatic and for explicit meshes alike."""
    both = P("i", None, "j")
    sharded = partial(over_sharded_arrays, axis_type=axis_type)
    by_features = partial(in_shard_map, axis_type=axis_type, features="j", i=2, j=3)
    partly = partial(in_partly_manual_shard_map, axis_type=axis_type)
    found = {
        kind: Way(lambda step: sharded(step, rows=P("i"), i=8), nothing),
        f"{kind} of two axes": Way(partial(sharded, rows=P("a", "b"), a=4, b=2), nothing),
        f"{kind}, features": Way(partial(sharded, rows=both, vectors=P("j"), i=2, j=3), nothing),
        f"{kind}, features, replicated state": Way(partial(sharded, rows=both, i=2, j=3), nothing),
        f"{kind}, features in shard_map": Way(partial(by_features, check_vma=True), nothing),
        f"{kind}, features in unchecked shard_map": Way(partial(by_features, check_vma=False), psum),
        f"{kind}, partly manual": Way(partial(partly, check_vma=True), nothing),
        f"{kind}, partly manual unchecked": Way(partial(partly, check_vma=False), psum),
        f"vmap of {kind}, members": Way(partial(ensemble, axis_type=axis_type, members="m", rows=None), nothing),
        f"vmap of {kind}, rows": Way(partial(ensemble, axis_type=axis_type, members=None, rows="i"), nothing),
    }
    return found


WAYS |= on_meshes_of("automatic", AxisType.Auto) | on_meshes_of("explicit", AxisType.Explicit)
WAYS["explicit, shard_map"] = Way(lambda step: in_shard_map(step, True, AxisType.Explicit, i=8), nothing)
WAYS["explicit, shard_map unchecked"] = Way(lambda step: in_shard_map(step, False, AxisType.Explicit, i=8), psum)


def over(devices):
    """Of those above, what takes any devices."""
    all_of = {"devices": devices, "i": len(devices)}
    return {
        "shard_map": Way(lambda step: in_shard_map(step, True, **all_of), nothing),
        "shard_map unchecked": Way(lambda step: in_shard_map(step, False, **all_of), psum),
        "automatic": Way(lambda step: over_sharded_arrays(step, AxisType.Auto, P("i"), **all_of), nothing),
    }


SCANS = ("scan in shard_map", "scan in unchecked shard_map")
STEPWISE = tuple(way for way in WAYS if way not in SCANS)


@cache
def runner(way, normalize=jbn.batch_norm, line=None):
    """The way's function of (x, weights, dy, params, state), with the way's own line where none is given."""
    return WAYS[way].split(partial(step, normalize, line or WAYS[way].line))


def batch(seed=0, offset=0.0, dtype=jnp.float32, masked=False):
    """x, weights and dy; what is masked is NaN, some of the first half and all of the second, a whole shard or more."""
    rng = np.random.default_rng(seed)
    x, dy = rng.standard_normal((2, *SHAPE)).astype(np.float32)
    mask = rng.uniform(size=(*SHAPE[:2], 1)) < 0.6
    mask[:2], mask[SHAPE[0] // 2 :] = True, False
    x = (x + np.float32(offset)).astype(dtype)
    return (np.where(mask, x, dtype(np.nan)), mask, dy.astype(dtype)) if masked else (x, None, dy.astype(dtype))


def from_host(tree, spec):
    """NumPy arrays, every time: with an array that is on devices already the step would be compiled once more."""
    return jax.tree.map(np.asarray, tree)


def train(way, batches, params, state, place=from_host):
    """What every step gives, one batch after the other; `place` puts data and replicated values where they belong."""
    batches, (params, state) = place(batches, P("i")), place((params, state), P())
    if way in SCANS:
        stacked = runner(way)(jax.tree.map(lambda *parts: np.stack(parts), *batches), params, state)
        return [jax.tree.map(lambda a, index=index: a[index], stacked) for index in range(len(batches))]
    results = []
    for operands in batches:
        results.append(runner(way)(*operands, params, state))
        state = place(results[-1][1], P())
    return results


def expected(batches, params, state):
    """What `train` has to give, in float64 NumPy."""
    fields, results = [np.float64(field) for field in state], []
    for x, weights, dy in batches:
        measured = reference.moments(x, weights)
        y = reference.normalize(x, *measured[1:], *params)
        dx, dscale, dbias = reference.gradients(x, dy, params.scale, weights=weights)
        fields = reference.update(fields, (reference.number(weights, np.shape(x)), *measured[1:]))
        y = y if weights is None else np.where(weights > 0, y, 0)
        results.append((y, jbn.State(*fields), dx, jbn.Params(dscale, dbias)))
    return results


def differences(got, wanted, dtype=jnp.float32):
    """For each output the largest difference on any device, relative where the wanted number exceeds 1.

    Of `y` and `dx`, which have this dtype, and of the rest, which is float32, what rounding to it costs is taken off.
    """
    found = {}
    for name, ours, exact in zip(OUTPUTS, jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        own = jnp.dtype(dtype if name in ("y", "dx") else jnp.float32)
        found[name] = 0.0 if ours.dtype == own else np.inf
        for shard in ours.addressable_shards:
            there = np.float64(exact)[shard.index]
            apart = np.abs(np.float64(shard.data) - there) - float(jnp.finfo(own).eps) / 2 * np.abs(there)
            found[name] = float(np.maximum(found[name], np.max(apart / np.maximum(np.abs(there), 1))))
    return found


def compare(way, dtype=jnp.float32, masked=False, offset=0.0, place=from_host):
    """The largest differences from float64 in the first step and the tenth, from a running mean that is near."""
    batches, state = [batch(seed, offset, dtype, masked) for seed in range(STEPS)], jbn.init(SHAPE[-1])[1]
    state = state._replace(mean=state.mean + np.float32(offset))
    got, wanted = train(way, batches, PARAMS, state, place), expected(batches, PARAMS, state)
    first, tenth = (differences(got[index], wanted[index], dtype) for index in (0, -1))
    return {name: float(np.maximum(first[name], tenth[name])) for name in OUTPUTS}


def too_far(found, tolerance=TOLERANCE):
    """Those of the differences that exceed the tolerance, or are not numbers."""
    return {name: value for name, value in found.items() if not value <= tolerance}
