"""Recalibrated states against float64 NumPy: one layer after the other, each over all the data."""

import gc
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose, assert_array_equal

import jbn

WIDTHS = (3, 4, 4, 5)
RANDOM = np.random.default_rng(0)
KERNELS = [RANDOM.normal(0, 1, shape).astype(np.float32) for shape in pairwise(WIDTHS)]
NORMS = [
    jbn.Params(*RANDOM.uniform(low, 2, (2, width)).astype(np.float32))
    for low, width in zip((0.5, 0.5, -1), WIDTHS[1:], strict=True)
]
PARAMS = list(zip(KERNELS, NORMS, strict=True))
STATES = [jbn.init(width)[1] for width in WIDTHS[1:]]
ROWS = RANDOM.normal(2, 3, (256, WIDTHS[0])).astype(np.float32)
ROWS[:100] += 4  # the batches differ
CUTS = {"equal": [32] * 8, "ragged": [2, 2, 124, 128]}
train = partial(jbn.batch_norm, train=True)


def apply(params, states, x, mask=None, axis_name=None, layer=train):
    """A network that knows nothing of recalibration, of as many layers as there are states."""
    after = []
    for (kernel, norm), state in zip(params[: len(states)], states, strict=True):
        x, state = layer(x @ kernel, norm, state, weights=mask, axis_name=axis_name)
        x, after = jnp.tanh(x), [*after, state]
    return x, after


def cut(sizes):
    return np.split(ROWS, np.cumsum(sizes)[:-1])


def expected(rows=ROWS, params=PARAMS):
    """The states in float64: each layer over all rows, after layers that evaluate with what was found for them."""
    x, found = np.float64(rows), []
    for kernel, norm in params:
        x = x @ np.float64(kernel)
        mean, var = x.mean(0), x.var(0, ddof=1)
        found.append(jbn.State(mean, var, np.ones(())))
        x = np.tanh((x - mean) / np.sqrt(var + 1e-5) * np.float64(norm.scale) + np.float64(norm.bias))
    return found


def assert_states(states, wanted, tolerance=1e-5):
    """In standard deviations, and relative to the variance; float32 through all layers."""
    for state, exact in zip(states, wanted[: len(states)], strict=True):
        spread = np.sqrt(exact.var)
        assert_allclose(state.mean / spread, exact.mean / spread, rtol=0, atol=tolerance)
        assert_allclose(state.var, exact.var, rtol=tolerance)
        assert_array_equal(state.weight, exact.weight)


@pytest.mark.parametrize("sizes", CUTS.values(), ids=CUTS)
def test_exact_however_the_data_is_cut(sizes):
    states = STATES if sizes == CUTS["equal"] else STATES[:2]  # each size of a batch is compiled
    states = jbn.recalibrate(apply, PARAMS, states, cut(sizes))
    assert_states(states, expected())
    assert {field.dtype for field in jax.tree.leaves(states)} == {jnp.dtype("float32")}


def test_the_first_layers_are_exact_after_as_many_passes():
    wanted = expected()
    for passes in (1, 2):
        states = jbn.recalibrate(apply, PARAMS, STATES, cut(CUTS["equal"]), passes=passes)
        assert_states(states[:passes], wanted[:passes])
        with pytest.raises(AssertionError):
            assert_states(states[passes:], wanted[passes:])


def test_one_pass_is_the_algorithm_of_the_paper():
    x, measured = [np.float64(part) for part in cut(CUTS["equal"])], []
    for kernel, norm in PARAMS:
        x = [part @ np.float64(kernel) for part in x]
        joint = np.concatenate(x)
        measured.append(jbn.State(joint.mean(0), joint.var(0), np.ones(())))
        x = [(part - part.mean(0)) / np.sqrt(part.var(0) + 1e-5) for part in x]
        x = [np.tanh(part * np.float64(norm.scale) + np.float64(norm.bias)) for part in x]
    states = jbn.recalibrate(apply, PARAMS, STATES, cut(CUTS["equal"]), passes=1, unbiased=False)
    assert_states(states, measured)


def test_the_states_passed_in_do_not_matter_and_a_program_is_compiled_once(compilations):
    batches, seen = cut(CUTS["equal"]), []

    def anew():
        seen.append("pass")
        return iter(batches)

    bad = [jbn.State(state.mean + 30, state.var * 1e4, state.weight) for state in STATES]
    states = jbn.recalibrate(apply, PARAMS, bad, anew)
    assert len(seen) == 3  # in as many passes as there are layers
    seen.clear()
    compilations.clear()
    again = jbn.recalibrate(apply, PARAMS, states, anew, passes=100)
    jax.tree.map(assert_array_equal, again, states)
    assert len(seen) == 4  # nothing changed in the fourth
    assert not compilations
    stacked = jbn.recalibrate(apply, PARAMS, STATES, jnp.stack(batches))
    jax.tree.map(assert_array_equal, stacked, states)


def test_masked_rows_and_masked_batches_are_not_there():
    """Masked rows are NaN: nothing reads them."""
    mask = RANDOM.uniform(size=256) < 0.6
    mask[64:96] = False
    batches = list(zip(cut(CUTS["equal"]), np.split(mask, 8), strict=True))
    batches = [(np.where(present[:, None], rows, np.nan), present) for rows, present in batches]

    def masked(params, states, batch):
        return apply(params, states, *batch)

    states = jbn.recalibrate(masked, PARAMS, STATES[:2], batches)
    assert_states(states, expected(ROWS[mask]))
    for nothing in ([], [(batches[0][0], np.zeros(32, bool))]):
        jax.tree.map(assert_array_equal, jbn.recalibrate(masked, PARAMS, states, nothing), states)


def test_a_batch_with_a_nan_is_left_out():
    batches = cut(CUTS["equal"])
    batches[2] = np.where(batches[2] > 8, np.nan, batches[2])
    states = jbn.recalibrate(apply, PARAMS, STATES, batches)
    assert_states(states, expected(np.concatenate(batches[:2] + batches[3:])))
    only = jbn.recalibrate(apply, PARAMS, states, batches[2:3])
    jax.tree.map(assert_array_equal, only, states)


def composed(x, params, state, **pooling):
    """What `batch_norm` composes, written by hand."""
    y, moments = jbn.normalize_batch(x, params, **pooling)
    return y, jbn.update(state, moments, decay=0.99)


@pytest.mark.parametrize("layer", [partial(train, groups=4), partial(jbn.batch_renorm, train=True)])
def test_variants_of_the_layer(layer):
    states = jbn.recalibrate(partial(apply, layer=layer), PARAMS, STATES[:2], cut(CUTS["equal"]))
    assert_states(states, expected())


def test_a_layer_composed_by_hand_accumulates():
    states = jbn.recalibrate(partial(apply, layer=composed), PARAMS, STATES[:2], cut([256]))
    assert_states(states, expected(), 1e-2)  # normalized by its own batch, whose variance divides by 256, not 255


def test_an_update_by_hand_that_is_gated():
    def gated(params, state, batch):
        x, amount = batch
        y, moments = jbn.normalize_batch(x, params)
        return y, jbn.update(state, moments, amount=amount)

    parts = np.split((ROWS @ KERNELS[0]).astype(np.float32), 4)
    state = jbn.recalibrate(gated, NORMS[0], STATES[0], list(zip(parts, np.float32([1, 0, 1, 0]), strict=True)))
    taken = np.float64(np.concatenate(parts[::2]))
    assert_allclose(state.mean, taken.mean(0), rtol=1e-5)
    assert_allclose(state.var, taken.var(0, ddof=1), rtol=1e-5)


def test_frozen_layers_and_what_is_no_state_stay_as_they_are():
    def frozen_first(params, states, x):
        (kernel, norm), *rest = params[:2]
        x, first = jbn.batch_norm(x @ kernel, norm, states["first"], train=False)
        x, new = apply(rest, states["rest"], jnp.tanh(x))
        return x, {"first": first, "rest": new, "steps": states["steps"] + 1}

    wanted = expected()
    first = jax.tree.map(np.float32, wanted[0])
    given = {"first": first, "rest": STATES[1:2], "steps": jnp.asarray(7)}
    states = jbn.recalibrate(frozen_first, PARAMS, given, cut(CUTS["equal"]))
    jax.tree.map(assert_array_equal, states["first"], first)
    assert_states(states["rest"], wanted[1:])
    assert states["steps"] == 7


def test_layers_stacked_in_a_scan():
    params = [(KERNELS[1], NORMS[0]), (KERNELS[1], NORMS[1])]
    stacked_params, stacked = (jax.tree.map(lambda *layers: jnp.stack(layers), *each) for each in (params, STATES[:2]))

    def scanned(params, states, x):
        def layer(x, each):
            kernel, norm, state = each
            x, state = jbn.batch_norm(x @ kernel, norm, state, train=True)
            return jnp.tanh(x), state

        return jax.lax.scan(layer, x, (*params, states))

    rows = RANDOM.normal(1, 2, (64, 4)).astype(np.float32)
    states = jbn.recalibrate(scanned, stacked_params, stacked, rows.reshape(4, 16, 4))
    assert_states([jbn.State(*(field[layer] for field in states)) for layer in range(2)], expected(rows, params))


def test_in_shard_map():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.shard_map(
        partial(apply, axis_name="data"), mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=(P("data"), P())
    )
    everywhere, rows = jax.NamedSharding(mesh, P()), jax.NamedSharding(mesh, P("data"))
    states = jbn.recalibrate(
        split, *jax.device_put((PARAMS, STATES[:2]), everywhere), jax.device_put(cut(CUTS["equal"]), rows)
    )
    assert_states(states, expected())


def logged(params, states, x):
    """Reports what a training loop would."""
    y, new = apply(params, states, x)
    return {"y": y, "mean": [state.mean for state in new], "var": new[0].var.max(), "kind": type(new[0]).__name__}, new


def rebuilt(params, states, x):
    """Taken apart and made anew, by hand and by `tree.map`, gated and cast."""
    states = [jbn.State(mean=state.mean, var=state.var, weight=state.weight) for state in states]
    y, new = apply(params, states, x)
    new = [jbn.State(*map(jnp.asarray, state)) for state in new]
    good = jnp.isfinite(y).all()
    new = jax.tree.map(lambda after, before: jnp.where(good, after, before), new, states)
    return y, jax.tree.map(lambda field: field.astype(jnp.float32), new)


class Network:
    """A network as an object, with methods to apply it."""

    def __init__(self):
        self.teacher = jnp.zeros(2_500_000)

    def apply(self, params, states, x):
        return apply(params, states, x + self.teacher[0])

    __call__ = apply

    @partial(jax.jit, static_argnums=0)
    def compiled(self, params, states, x):
        return apply(params, states, x)


class Plain(tuple):
    """What is called and cannot be referred to weakly."""

    __slots__ = ()

    def __call__(self, params, states, x):
        return apply(params, states, x)


def of_closure():
    teacher = jnp.zeros(2_500_000)
    return lambda params, states, x: apply(params, states, x + teacher[0])


WRITTEN = {
    "logged": lambda: logged,
    "rebuilt": lambda: rebuilt,
    "jit": lambda: jax.jit(apply),
    "remat": lambda: jax.checkpoint(apply),
    "closure": of_closure,
    "partial": lambda: partial(apply, layer=partial(jbn.batch_norm, train=True, decay=0.99)),
    "bound method": lambda: Network().apply,
    "compiled method": lambda: Network().compiled,
    "object": Network,
    "object without weak references": Plain,
}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_network_as_it_is_written(name, compilations):
    """Called again nothing is compiled, but for objects and methods, which may have changed."""
    network = WRITTEN[name]()
    owner = getattr(network, "__self__", None)  # noqa: F841  a method does not keep an object that has no other name
    states = STATES[: 2 if network in (logged, rebuilt) else 1]  # those that do something with their states
    found = jbn.recalibrate(network, PARAMS, states, cut([128, 128]))
    assert_states(found, expected())
    assert compilations
    if "object" not in name and "method" not in name:
        compilations.clear()
        jax.tree.map(assert_array_equal, jbn.recalibrate(network, PARAMS, states, cut([128, 128])), found)
        assert not compilations


def test_what_the_network_makes_of_its_states_is_kept():
    def clipped(params, states, x):
        y, new = apply(params, states, x)
        return y, [state._replace(var=jnp.maximum(state.var, 15)) for state in new]

    (state,) = jbn.recalibrate(clipped, PARAMS, STATES[:1], cut([128, 128]))
    assert_allclose(state.var, np.maximum(expected()[0].var, 15), rtol=1e-5)
    assert (state.var == 15).any() and (state.var > 15).any()


def test_what_the_network_sees_of_its_states():
    """Before each layer what normalizes, after it what was found so far: of all batches at the end."""
    seen = []

    def watched(params, states, x):
        y, new = apply(params, states, x)
        jax.debug.callback(lambda *args: seen.append(args), states[0].mean, new[0].mean, new[0].var)
        return y, new

    rows = np.float64(ROWS @ KERNELS[0])
    (state,) = jbn.recalibrate(watched, PARAMS, STATES[:1], cut([128, 128]))
    jax.effects_barrier()
    assert len(seen) == 2
    for (before, mean, var), until in zip(seen, (128, 256), strict=True):
        assert_array_equal(before, STATES[0].mean)
        assert_allclose(mean, rows[:until].mean(0), rtol=1e-5)
        assert_allclose(var, rows[:until].var(0, ddof=1), rtol=1e-5)
    assert_array_equal(state.mean, seen[-1][1])


@pytest.mark.parametrize("in_axes", [0, jbn.State(0, 0, 0)], ids=["0", "State(0, 0, 0)"])
def test_an_ensemble_whose_axes_are_named_by_a_state(in_axes):
    three = [jax.tree.map(lambda a: jnp.stack([a, a, a]), tree) for tree in (NORMS[0], STATES[0])]
    x = np.stack([ROWS @ KERNELS[0]] * 3) + np.arange(3, dtype=np.float32)[:, None, None]
    member = lambda params, state, x: jbn.batch_norm(x, params, state, train=True)  # noqa: E731
    ensemble = jax.vmap(member, in_axes=(0, in_axes, 0), out_axes=(0, in_axes))
    state = jbn.recalibrate(ensemble, *three, [x[:, :100], x[:, 100:]])
    assert_allclose(state.mean, np.float64(x).mean(1), rtol=1e-5)
    assert_allclose(state.var, np.float64(x).var(1, ddof=1), rtol=1e-5)
    assert_array_equal(state.weight, np.ones((3, WIDTHS[1])))


@pytest.mark.parametrize(
    ("axis_type", "by_hand"), [(jax.sharding.AxisType.Auto, True), (jax.sharding.AxisType.Explicit, False)]
)
def test_features_sharded_by_specs_of_a_state(axis_type, by_hand):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(axis_type,) * 2)
    specs = P("data", "model"), jbn.Params(P("model"), P("model")), jbn.State(P("model"), P("model"), P("model"))
    x = (ROWS @ KERNELS[0]).astype(np.float32)

    def network(params, state, x):
        return jbn.batch_norm(x, params, state, train=True, axis_name="data" if by_hand else None)

    put = lambda tree, spec: jax.tree.map(lambda a, s: jax.device_put(a, jax.NamedSharding(mesh, s)), tree, spec)  # noqa: E731
    split = jax.shard_map(network, mesh=mesh, in_specs=(specs[1], specs[2], specs[0]), out_specs=(specs[0], specs[2]))
    operands = put(NORMS[0], specs[1]), put(STATES[0], specs[2]), [put(part, specs[0]) for part in np.split(x, 2)]
    state = jbn.recalibrate(split if by_hand else network, *operands)
    assert_allclose(state.mean, np.float64(x).mean(0), rtol=1e-5)
    assert_allclose(state.var, np.float64(x).var(0, ddof=1), rtol=1e-5)


def live():
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


@pytest.mark.parametrize("make", [of_closure, lambda: Network().apply], ids=["closure", "method"])
def test_functions_and_what_they_hold_are_freed(make):
    def once():
        network = make()
        owner = getattr(network, "__self__", None)  # noqa: F841
        jbn.recalibrate(network, PARAMS, STATES[:1], cut([256]))

    once()
    before = live()
    once()
    assert live() - before < 1e6  # each holds 10 MB


def test_an_object_that_has_changed_is_measured_as_it_is():
    """As a network that is trained in place: nothing of its first call is kept."""

    class Changing:
        scale = 1.0

        def apply(self, params, states, x):
            return apply(params, states, self.scale * x)

        __call__ = apply

    for pick in (lambda network: network, lambda network: partial(network.apply)):
        network = Changing()
        first = jbn.recalibrate(pick(network), PARAMS, STATES[:1], cut([256]))
        network.scale = 3.0
        second = jbn.recalibrate(pick(network), PARAMS, STATES[:1], cut([256]))
        assert_allclose(second[0].mean, 3 * np.asarray(first[0].mean), rtol=1e-5)
    assert (np.asarray(jbn.drift(network, PARAMS, first, cut([256]))[0].error) > 1).all()


def test_a_method_is_traced_once_for_the_first_pass_and_once_for_all_others():
    class Counting:
        traced = 0

        def apply(self, params, states, x):
            self.traced += 1
            return apply(params, states, x)

    network = Counting()
    jbn.recalibrate(network.apply, PARAMS, STATES[:2], cut([128, 128]), passes=3)
    assert network.traced == 2


def test_an_object_that_forwards_to_another_is_called_itself():
    class Wrapper:
        def __init__(self, inner):
            self.inner = inner

        def __call__(self, params, states, x):
            return self.inner(params, states, 10 * x)

        def __getattr__(self, name):
            return getattr(self.inner, name)

    (state,) = jbn.recalibrate(Wrapper(Network().apply), PARAMS, STATES[:1], cut([256]))
    assert_allclose(state.mean, 10 * (ROWS @ KERNELS[0]).mean(0), rtol=1e-4)


def test_methods_of_one_object_are_not_taken_for_each_other():
    class Two:
        def half(self, params, states, x):
            return apply(params, states, x / 2)

        def whole(self, params, states, x):
            return apply(params, states, x)

    two = Two()
    first, second = (jbn.recalibrate(f, PARAMS, STATES[:1], cut([256]))[0] for f in (two.half, two.whole))
    assert_allclose(2 * np.asarray(first.mean), second.mean, rtol=1e-5)
    assert_states([second], expected())


def test_states_keep_their_dtypes():
    with jax.enable_x64(True):
        wide = [jax.tree.map(lambda leaf: leaf.astype(jnp.float64), STATES[0])]
        (state,) = jbn.recalibrate(apply, PARAMS[:1], wide, cut(CUTS["equal"]))
    assert {leaf.dtype for leaf in state} == {jnp.dtype("float64")}
    assert_allclose(state.var, expected()[0].var, rtol=1e-6)  # of float32 batches


def test_refusals():
    batches = cut(CUTS["equal"])
    with pytest.raises(TypeError, match=r"batches is a generator.*3 passes; pass a list.*lambda: loader\(\)"):
        jbn.recalibrate(apply, PARAMS, STATES, (batch for batch in batches))
    jbn.recalibrate(apply, PARAMS, STATES, iter(batches), passes=1)
    spent = iter(batches)
    with pytest.raises(ValueError, match=r"pass 2 found no batches: .* anew"):
        jbn.recalibrate(apply, PARAMS, STATES, lambda: spent)
    with pytest.raises(ValueError, match=r"measured nothing: apply the network with train=True"):
        jbn.recalibrate(partial(apply, layer=partial(jbn.batch_norm, train=False)), PARAMS, STATES, batches)
    with pytest.raises(TypeError, match=r"gave back a list; expected the pair"):
        jbn.recalibrate(lambda *args: apply(*args)[1], PARAMS, STATES, batches)
    with pytest.raises(TypeError, match=r"new states \(tuple\) in another structure .* given \(list\)"):
        jbn.recalibrate(lambda *args: (None, tuple(apply(*args)[1])), PARAMS, STATES, batches)
    with pytest.raises(TypeError, match=r"states is a list without a jbn.State in it; is the order right\?"):
        jbn.recalibrate(apply, STATES, PARAMS, batches)
    for wrong in ({"x": batches[0]}, "batches", 3, None):
        with pytest.raises(TypeError, match=r"batches is a (dict|str|int|NoneType); expected a list of batches"):
            jbn.recalibrate(apply, PARAMS, STATES, wrong)
    with pytest.raises(TypeError, match=r"apply is a list; expected a function apply\(params, states, batch\)"):
        jbn.recalibrate(PARAMS, apply, STATES, batches)
    with pytest.raises(TypeError, match=r"gave back a array; expected the pair"):
        jbn.recalibrate(lambda *args: apply(*args)[0], PARAMS, STATES, batches)
    with pytest.raises(ValueError, match=r"passes is 0; expected an int of at least 1"):
        jbn.recalibrate(apply, PARAMS, STATES, batches, passes=0)


def test_refusals_of_states_that_lose_what_was_measured():
    def without(params, states, x):
        y, new = apply(params, states, x)
        return y, [jbn.State(state.mean, state.var) for state in new]

    def by_weight(params, states, x):
        states = [state._replace(mean=jnp.where(state.weight > 0, state.mean, 0.0)) for state in states]
        return apply(params, states, x)

    batches = cut([256])
    with pytest.raises(TypeError, match=r"a State with a weight of shape \[\] .* hand weight on"):
        jbn.recalibrate(without, PARAMS, STATES, batches)
    with pytest.raises(Exception) as caught:
        jbn.recalibrate(by_weight, PARAMS, STATES, batches)
    assert any("`weight` is [*features, 1, 9 or 10]" in note for note in caught.value.__notes__)
    last = jax.vmap(lambda n, s, x: jbn.batch_norm(x, n, s, train=True), in_axes=(None, -1, None), out_axes=(0, -1))
    stacked = jax.tree.map(lambda a: jnp.stack([a] * 3, -1), STATES[0])
    with pytest.raises(Exception) as caught:
        jbn.recalibrate(last, NORMS[0], stacked, [ROWS @ KERNELS[0]])
    assert any("stack states along their first" in note for note in caught.value.__notes__)
    for error in (caught.value, *caught.value.__notes__):
        assert not {"Measuring", "Held", "_survey"} & set(str(error).replace("`", " ").split())


def test_one_array_of_rows_is_named():
    with pytest.raises(ValueError, match=r"one value per feature") as caught:
        jbn.recalibrate(apply, PARAMS, STATES, ROWS)
    assert any("batches is an array [256, 3]" in note and "[batches]" in note for note in caught.value.__notes__)


def test_states_that_are_merged_while_they_are_measured():
    def target(params, states, x):
        y, new = apply(params, states, x)
        return y, jbn.merge_states(states, new)

    with pytest.raises(TypeError, match=r"states\[0\]\[0\] is a State that is being measured: merge it outside"):
        jbn.recalibrate(target, PARAMS, STATES, cut([256]))


def test_a_variance_as_the_network_or_the_caller_says():
    biased = partial(apply, layer=partial(jbn.batch_norm, train=True, unbiased=False))
    var = expected()[0].var
    for network, options, wanted in (
        (apply, {}, var),
        (biased, {}, var * 255 / 256),
        (apply, {"unbiased": False}, var * 255 / 256),
        (biased, {"unbiased": True}, var),
    ):
        (state,) = jbn.recalibrate(network, PARAMS, STATES[:1], cut([128, 128]), **options)
        assert_allclose(state.var, wanted, rtol=1e-5)
    first, _ = jbn.recalibrate(biased, PARAMS, STATES[:2], cut([128, 128]))  # in two passes
    assert_allclose(first.var, var * 255 / 256, rtol=1e-5)


def tied(params, state, x, steps=3):
    """One state at several depths."""
    for _ in range(steps):
        x, state = jbn.batch_norm(jnp.tanh(x @ SQUARE), params, state, train=True)
    return x, state


SQUARE = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
TIED_BATCHES = np.random.default_rng(1).normal(2, 3, (8, 32, 4)).astype(np.float32)


@pytest.mark.parametrize("steps", [2, 3])
def test_a_state_at_several_depths_settles(steps):
    """It is that of what reaches the layer when it normalizes by it, in float64."""
    params, fresh = jbn.init(4)
    state = jbn.recalibrate(partial(tied, steps=steps), params, fresh, TIED_BATCHES)
    h, seen = np.float64(TIED_BATCHES.reshape(-1, 4)), []
    for _ in range(steps):
        seen.append(np.tanh(h @ SQUARE))
        h = (seen[-1] - np.float64(state.mean)) / np.sqrt(np.float64(state.var) + 1e-5)
    seen = np.concatenate(seen)
    assert_allclose((state.mean - seen.mean(0)) / seen.std(0), 0, atol=2e-6)
    assert_allclose(state.var, seen.var(0, ddof=1), rtol=4e-6)


def test_what_does_not_settle_says_so(monkeypatch):
    monkeypatch.setattr("jbn._networks.recalibrate.TIED", 3)
    params, fresh = jbn.init(4)
    with pytest.warns(UserWarning, match="used several times in one call of apply has not settled in 3 passes"):
        jbn.recalibrate(tied, params, fresh, TIED_BATCHES)
    jbn.recalibrate(tied, params, fresh, TIED_BATCHES, passes=2)  # as was asked for
    with pytest.raises(TypeError, match="which can be gone through once, and there may be 3 passes"):
        jbn.recalibrate(tied, params, fresh, iter(TIED_BATCHES))
