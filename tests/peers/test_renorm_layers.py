"""`BatchRenorm` of linen, nnx and Equinox: batch_renorm's formula, the frameworks' ways, and a step that is kept.

What it shares with `BatchNorm` is tested there.
"""

import io
import json
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx, serialization
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose, assert_array_equal

import jbn
import jbn.equinox
import jbn.linen
import jbn.nnx

GOLDEN = Path(__file__).parents[1] / "golden/renorm"
SCALE, BIAS = np.float32([0.5, -1, 2]), np.float32([0.1, 1, -3])


class Layer(NamedTuple):
    """A layer of 3 features as values and pure functions."""

    values: Any
    train: Any  # (values, x) -> y, values
    evaluate: Any  # (values, x) -> y
    state: Any  # values -> jbn.State
    steps: Any  # values -> steps


def linen(kind="BatchRenorm", *, decay=0.9, epsilon=1e-5, **options):
    layer = getattr(jbn.linen, kind)(momentum=decay, epsilon=epsilon, **options)
    values = layer.init(jax.random.key(0), jnp.zeros((2, 3)), use_running_average=False)
    values = values | {"params": {"scale": SCALE, "bias": BIAS}}

    def train(values, x):
        y, changed = layer.apply(values, x, use_running_average=False, mutable=["batch_stats"])
        return y, values | changed

    def evaluate(values, x):
        return layer.apply(values, x, use_running_average=True)

    def state(values):
        return jbn.linen.states(values["batch_stats"])

    return Layer(values, train, evaluate, state, lambda values: values["batch_stats"]["steps"])


def of_nnx(kind="BatchRenorm", *, decay=0.9, epsilon=1e-5, **options):
    layer = getattr(jbn.nnx, kind)(3, momentum=decay, epsilon=epsilon, rngs=nnx.Rngs(0), **options)
    layer.scale[...], layer.bias[...] = jnp.asarray(SCALE), jnp.asarray(BIAS)
    graph, values = nnx.split(layer)

    def train(values, x):
        layer = nnx.merge(graph, values, copy=True)
        y = layer(x, use_running_average=False)
        return y, nnx.state(layer)

    def evaluate(values, x):
        return nnx.merge(graph, values, copy=True)(x, use_running_average=True)

    def state(values):
        return jbn.nnx.states(nnx.merge(graph, values, copy=True))[""]

    return Layer(values, train, evaluate, state, lambda values: values["steps"][...])


def of_equinox(kind="BatchRenorm", *, decay=0.9, epsilon=1e-5, axis_name=(), **options):
    names = ("row", axis_name) if axis_name else "row"
    make = eqx.nn.make_with_state(getattr(jbn.equinox, kind))
    layer, values = make(3, names, momentum=decay, eps=epsilon, **options)
    layer = eqx.tree_at(lambda layer: (layer.weight, layer.bias), layer, (jnp.asarray(SCALE), jnp.asarray(BIAS)))
    values = values.set(layer.state_index, jbn.init(3, debias=False)[1])  # as the others start

    def train(values, x):
        return jax.vmap(layer, axis_name="row", in_axes=(0, None), out_axes=(0, None))(x, values)

    def evaluate(values, x):
        inference = eqx.nn.inference_mode(layer)
        return jax.vmap(inference, axis_name="row", in_axes=(0, None), out_axes=(0, None))(x, values)[0]

    def steps(values):
        return values.get(layer.steps_index)

    return Layer(values, train, evaluate, lambda values: values.get(layer.state_index), steps)


every = pytest.mark.parametrize("make", [linen, of_nnx, of_equinox])
RNG = np.random.default_rng(0)
BATCHES = RNG.normal([[[0]], [[1]], [[3]], [[2]]], 2, (4, 16, 3)).astype(np.float32)  # the mean moves
WARM = {"limits": (1.5, 0.5), "warmup_steps": 2}


def scanned(layer, values, batches):
    values, y = jax.jit(lambda values, batches: lax.scan(lambda *each: layer.train(*each)[::-1], values, batches))(
        values, batches
    )
    return y, values


def by_function(batches, limits, unbiased=False, **options):
    state, found = jbn.init(3, debias=False)[1], []
    for x, (r_max, d_max) in zip(batches, limits, strict=True):
        options |= {"r_max": r_max, "d_max": d_max, "unbiased": unbiased}
        y, state = jbn.batch_renorm(x, jbn.Params(SCALE, BIAS), state, train=True, **options)
        found.append(y)
    return jnp.stack(found), state


# Programs that differ round apart: sums of 16 values, outputs up to 8.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@every
def test_twenty_steps_are_those_of_torchrl(make):
    with np.load(GOLDEN / "torchrl.npz") as file:
        x, settings = file["x"], json.loads(str(file["late/settings"]))
        theirs = [file[f"late/{part}"] for part in ("y", "mean", "var", "evaluated")]
    layer = make(epsilon=settings["epsilon"], warmup_steps=settings["warmup_steps"], unbiased=True)
    y, values = scanned(layer, layer.values, x)
    state = layer.state(values)
    found = y, state.mean, state.var, layer.evaluate(values, x[-1])
    for ours, wanted in zip(found, (theirs[0], theirs[1][-1], theirs[2][-1], theirs[3]), strict=True):
        assert_allclose(ours, wanted, rtol=2e-5, atol=5e-5)  # see tests/test_renorm_libraries.py


def test_variables_of_sbx_are_those_of_the_layer_for_linen():
    with np.load(GOLDEN.parent / "libraries/sbx.npz") as file:
        entries = {name.removeprefix("entries/"): file[name] for name in file.files if name.startswith("entries/")}
        evaluated, x = file["evaluated"], file["x"]
    params = {name: entries.pop(name) for name in ("scale", "bias")}
    layer = linen(decay=0.99, epsilon=1e-3)
    values = {"params": params, "batch_stats": entries}
    assert_allclose(layer.evaluate(values, x[-1]), evaluated, **CLOSE)
    _, values = layer.train(values, x[-1])
    assert int(layer.steps(values)) == 5


@every
def test_the_warm_up_is_batch_norm_and_then_the_limits_hold(make):
    layer, plain = make(**WARM), make("BatchNorm")
    y, values = scanned(layer, layer.values, BATCHES)
    expected, state = by_function(BATCHES, [(1, 0), (1, 0), (1.5, 0.5), (1.5, 0.5)])
    assert_allclose(y, expected, **CLOSE)
    jax.tree.map(partial(assert_allclose, **CLOSE), layer.state(values), state)
    without, _ = scanned(plain, plain.values, BATCHES)
    assert_allclose(y[:2], without[:2], **CLOSE)
    assert np.abs(y - without)[2:].max() > 0.1
    steps = layer.steps(values)
    assert (int(steps), steps.dtype, steps.shape) == (4, jnp.int32, ())


@every
def test_limits_may_be_a_function_of_the_step_or_traced(make):
    ramp = partial(jbn.renorm_limits, start=1, r_end=3, d_end=5)
    layer = make(limits=ramp, warmup_steps=100)  # which has no part
    y, _ = scanned(layer, layer.values, BATCHES)
    assert_allclose(y, by_function(BATCHES, [ramp(step) for step in range(4)])[0], **CLOSE)

    @jax.jit
    def first(r_max, d_max):
        layer = make(limits=lambda step: (r_max, d_max))
        return layer.train(layer.values, BATCHES[2])[0]

    assert_allclose(first(1.2, 0.3), by_function(BATCHES[2:3], [(1.2, 0.3)])[0][0], **CLOSE)


@every
def test_evaluation_and_initialization_are_no_steps(make):
    layer = make(**WARM)
    assert int(layer.steps(layer.values)) == 0
    _, values = layer.train(layer.values, BATCHES[0])
    y = layer.evaluate(values, BATCHES[1])
    state = layer.state(values)
    assert_allclose(y, jbn.normalize_running(BATCHES[1], jbn.Params(SCALE, BIAS), state), **CLOSE)
    assert int(layer.steps(values)) == 1


def saved_by_flax(values, fresh):
    return serialization.from_bytes(fresh, serialization.to_bytes(values))


def saved_by_orbax(values, fresh, folder):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "checkpoint", values)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "checkpoint", fresh)


def saved_by_equinox(values, fresh):
    buffer = io.BytesIO()
    eqx.tree_serialise_leaves(buffer, values)
    buffer.seek(0)
    return eqx.tree_deserialise_leaves(buffer, fresh)


@pytest.mark.parametrize(
    ("make", "saved"),
    [
        (linen, saved_by_flax),
        (linen, saved_by_orbax),
        (of_nnx, saved_by_orbax),
        (of_equinox, saved_by_equinox),
    ],
)
def test_a_checkpoint_in_the_warm_up_goes_on_where_it_was(make, saved, tmp_path):
    saved = partial(saved, folder=tmp_path) if saved is saved_by_orbax else saved
    layer = make(**WARM)
    _, half = scanned(layer, layer.values, BATCHES[:1])
    restored = saved(half, jax.tree.map(jnp.zeros_like, half))
    assert int(layer.steps(restored)) == 1
    y, _ = scanned(layer, restored, BATCHES[1:])
    assert_array_equal(y, scanned(layer, half, BATCHES[1:])[0])
    assert np.abs(y - scanned(layer, layer.values, BATCHES[1:])[0]).max() > 0.1  # from a step of 0 it is another


@every
def test_networks_in_a_vmap_have_steps_of_their_own(make):
    layer = make(**WARM)
    _, ahead = scanned(layer, layer.values, BATCHES[:3])
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), layer.values, ahead)
    y, after = jax.vmap(layer.train, (0, None))(both, BATCHES[3])
    for index, values in enumerate((layer.values, ahead)):
        assert_allclose(y[index], layer.train(values, BATCHES[3])[0], **CLOSE)
    assert jax.vmap(layer.steps)(after).tolist() == [1, 4]


@pytest.mark.parametrize(  # JAX sums over an axis of `vmap` and one of `shard_map` at once without check_vma alone
    ("make", "check_vma"), [(linen, True), (linen, False), (of_nnx, True), (of_nnx, False), (of_equinox, False)]
)
def test_over_devices_it_is_that_of_one(make, check_vma):
    layer, alone = make(axis_name="data", **WARM), make(**WARM)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    specs = {"in_specs": (P(), P(None, "data")), "out_specs": (P(None, "data"), P()), "check_vma": check_vma}
    y, values = jax.jit(jax.shard_map(partial(scanned, layer), mesh=mesh, **specs))(layer.values, BATCHES)
    expected, wanted = scanned(alone, alone.values, BATCHES)
    assert_allclose(y, expected, **CLOSE)
    jax.tree.map(partial(assert_allclose, **CLOSE), layer.state(values), alone.state(wanted))
    assert int(layer.steps(values)) == 4


def test_statistics_of_either_layer_of_linen_are_taken_by_the_other():
    plain, layer = linen("BatchNorm"), linen(**WARM)
    _, values = plain.train(plain.values, BATCHES[0])
    y, after = layer.train(values, BATCHES[1])
    assert_allclose(y, plain.train(values, BATCHES[1])[0], **CLOSE)  # at the start of its warm-up
    assert int(layer.steps(after)) == 1
    assert_array_equal(plain.evaluate(after, BATCHES[1]), layer.evaluate(after, BATCHES[1]))


def test_a_state_of_nnx_without_steps_leaves_them():
    layer, plain = (getattr(jbn.nnx, kind)(3, rngs=nnx.Rngs(0)) for kind in ("BatchRenorm", "BatchNorm"))
    layer(BATCHES[0]), plain(BATCHES[1])
    nnx.update(layer, nnx.state(plain))
    assert_array_equal(layer.mean[...], plain.mean[...])
    assert int(layer.steps[...]) == 1


def exact(batches):
    return np.float64(batches).mean((0, 1))


def test_recalibration_of_linen_keeps_the_steps():
    layer = linen(**WARM)
    _, values = scanned(layer, layer.values, BATCHES)

    def apply(params, states, x):
        y, changed = layer.train({"params": params, "batch_stats": jbn.linen.batch_stats(states)}, x)
        return y, jbn.linen.states(changed["batch_stats"])

    found = jbn.recalibrate(apply, values["params"], jbn.linen.states(values["batch_stats"]), BATCHES[:3])
    new = jbn.linen.batch_stats(found, like=values["batch_stats"])
    assert_allclose(new["mean"], exact(BATCHES[:3]), **CLOSE)
    assert set(new) == {"mean", "var", "steps"} and int(new["steps"]) == 4


def test_recalibration_of_nnx_keeps_the_steps():
    layer = jbn.nnx.BatchRenorm(3, **WARM, rngs=nnx.Rngs(0))
    for x in BATCHES:
        layer(x)
    graph, params = nnx.split(layer)

    def apply(params, states, x):
        layer = nnx.merge(graph, params, copy=True)
        jbn.nnx.set_states(layer, states)
        return layer(x), jbn.nnx.states(layer)

    jbn.nnx.set_states(layer, jbn.recalibrate(apply, params, jbn.nnx.states(layer), BATCHES[:3]))
    assert_allclose(layer.mean[...], exact(BATCHES[:3]), **CLOSE)
    assert int(layer.steps[...]) == 4


def test_recalibration_of_equinox():
    layer, state = eqx.nn.make_with_state(jbn.equinox.BatchRenorm)(3, "row", **WARM)
    over_batch = jax.vmap(layer, axis_name="row", in_axes=(0, None), out_axes=(0, None))
    for x in BATCHES:
        _, state = over_batch(x, state)
    found = jbn.recalibrate(lambda _, state, x: over_batch(x, state), None, state, BATCHES[:3])
    assert_allclose(found.get(layer.state_index).mean, exact(BATCHES[:3]), **CLOSE)
    assert int(found.get(layer.steps_index)) == 4
