"""Other libraries' arrays as jbn's and back: the files of tests/golden, which need no peer, and what is refused."""

import conversion
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import jbn
from jbn import convert

sources = pytest.mark.parametrize("name", conversion.SOURCES)
FULL = ("torch", "flax", "keras")  # their initial 0 and 1 count as data
# float32 outputs up to 10, of sums of 8 values; Haiku's variance is E[x^2] - E[x]^2
ROUNDING = 2e-6


@sources
def test_evaluation_and_next_step_are_those_of_the_source(name):
    found = conversion.compare(name)
    print(found)
    assert found.output < ROUNDING
    assert found.running_mean < ROUNDING
    # Equinox: a difference of values near 1 over 1 - 0.99^5
    assert found.running_var < (1e-5 if name == "equinox_batch" else ROUNDING)
    if name != "equinox_batch":
        assert found.evaluation < ROUNDING
        assert found.evaluation_after < ROUNDING


@sources
def test_evaluation_is_that_of_float64(name):
    found = conversion.compare(name)
    # Equinox: a variance of 0.25 is within 1e-6 / (1 - 0.99^4) after its four roundings near 1; outputs up to 10
    assert found.jbn_exact < (5e-4 if name == "equinox_batch" else 1e-5)


def test_equinox_in_mode_batch_evaluates_by_another_variance_itself():
    found = conversion.compare("equinox_batch")
    assert found.source_exact > 1
    assert found.evaluation > 1


@pytest.mark.parametrize("name", FULL)
def test_without_the_initial_values(name):
    """What is left is the debiased average of the batches alone, as from jbn.init and the same steps."""
    golden, (convert_entries, preset, _) = conversion.load(name), conversion.SOURCES[name]
    steps, decay = len(golden["history"]), preset["decay"]
    _, state = convert_entries(conversion.nested(golden, "entries."), steps=steps, decay=decay)
    mean, var = conversion.exact(golden["history"], preset, "none")
    amplified = 5e-7 / (1 - decay**steps)  # four roundings of a value near 1
    assert_allclose(state.mean, mean, atol=amplified, rtol=1e-6)
    assert_allclose(state.var, var, atol=amplified, rtol=1e-6)
    assert_allclose(state.weight, 1 - decay**steps, rtol=1e-6)

    fresh = jbn.init(3)[1]
    for batch in (*golden["history"], golden["x"]):
        fresh = jbn.update(fresh, jbn.moments(batch), decay=decay, unbiased=preset["unbiased"])
    state = jbn.update(state, jbn.moments(golden["x"]), decay=decay, unbiased=preset["unbiased"])
    jax.tree.map(lambda ours, other: assert_allclose(ours, other, atol=amplified, rtol=1e-6), state, fresh)


def test_a_constant_feature_has_no_negative_variance():
    rounded = np.float32([0.99**2 * (1 - 1e-6)])  # a few roundings down
    _, state = convert.from_flax(None, {"mean": np.zeros(1, "f4"), "var": rounded}, steps=2, decay=0.99)
    assert state.var.tolist() == [0]


@pytest.mark.parametrize("name", FULL)
def test_no_steps_are_no_evidence(name):
    arrays = {"torch": convert.TORCH, "flax": convert.FLAX, "keras": convert.KERAS}[name][2:]
    entries = dict(zip(arrays, (np.zeros(2, "f4"), np.ones(2, "f4")), strict=True))
    given = (None, entries) if name == "flax" else (entries,)
    _, state = getattr(convert, f"from_{name}")(*given, steps=0, decay=0.9)
    jax.tree.map(assert_array_equal, state, jbn.init(2)[1])
    _, state = getattr(convert, f"from_{name}")(*given)
    jax.tree.map(assert_array_equal, state, jbn.init(2, debias=False)[1])


def entries_of(name):
    return conversion.nested(conversion.load(name), "entries.")


@pytest.mark.parametrize("name", FULL)
def test_there_and_back(name):
    entries = entries_of(name)
    params, state = conversion.SOURCES[name].convert(entries)
    if name == "torch":
        back = convert.to_torch(params, state, steps=4)
    elif name == "flax":
        learned, running = convert.to_flax(params, state)
        back = {f"params.{name}": value for name, value in learned.items()}
        back |= {f"batch_stats.{name}": value for name, value in running.items()}
    else:
        back = {f"bn1/{name}": value for name, value in convert.to_keras(params, state).items()}
    assert back.keys() == entries.keys()
    for name, value in entries.items():
        assert_array_equal(back[name], value)
        assert back[name].dtype == value.dtype


def haiku_parts():
    return [conversion.nested(entries_of("haiku"), f"{part}.") for part in ("params", "mean_ema", "var_ema")]


@pytest.mark.parametrize("shape", [None, (1, 3), (1, 1, 1, 3), (1, 3, 1)])
def test_there_and_back_to_haiku(shape):
    params, state = convert.from_haiku(*haiku_parts(), decay=0.9)
    assert_allclose(state.weight, 1 - 0.9**4, rtol=1e-6)
    for part, back in zip(haiku_parts(), convert.to_haiku(params, state, decay=0.9, shape=shape), strict=True):
        assert back.keys() == part.keys()
        for name, value in part.items():
            assert_allclose(np.ravel(back[name]), np.ravel(value), rtol=1e-6)  # hidden, from average
            assert name == "counter" or back[name].shape == (shape or (1, 3))
    jax.tree.map(assert_array_equal, convert.from_haiku(*back_of(params, state, 0.9), decay=0.9), (params, state))


def back_of(params, state, decay):
    return convert.to_haiku(params, state, decay=decay)


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.99, 0.999])
@pytest.mark.parametrize("steps", [0, 1, 2, 7, 150])
def test_haiku_counts_the_steps_that_there_were(decay, steps):
    params, state = jbn.init(2)
    for _ in range(steps):
        state = jbn.update(state, jbn.moments(jnp.array([[1.0, 2.0], [3.0, 5.0]])), decay=decay)
    _, mean_ema, var_ema = back_of(params, state, decay)
    assert mean_ema["counter"] == var_ema["counter"]
    if decay**steps > 1e-5:  # else the weight in float32 does not tell how many
        assert mean_ema["counter"] == steps
    _, again = convert.from_haiku(None, mean_ema, var_ema, decay=decay)
    # 0.999 in float32, by which the state was moved, is 5e-8 off, beside 1 - 0.999
    jax.tree.map(lambda ours, other: assert_allclose(ours, other, rtol=1e-4), again, state)


def test_full_evidence_is_so_many_steps_of_haiku_that_it_is_full_again():
    params, state = jbn.init(2, debias=False)
    _, mean_ema, var_ema = back_of(params, state, 0.99)
    assert 1000 < mean_ema["counter"] < 3000
    assert_array_equal(convert.from_haiku(None, mean_ema, var_ema, decay=0.99)[1].weight, 1)


def test_a_fresh_haiku_layer():
    """Its averages are those of the batch it was initialized with."""
    ema = {"hidden": np.zeros((1, 2), "f4"), "average": np.full((1, 2), 7, "f4"), "counter": np.int32(0)}
    _, state = convert.from_haiku({}, ema, ema, decay=0.9)
    jax.tree.map(assert_array_equal, state, jbn.init(2)[1])


def test_a_fresh_equinox_layer():
    arrays = {"weight": np.ones(2, "f4"), "bias": None, "momentum": 0.9}
    entries = arrays | {"mean": np.full(2, np.nan, "f4"), "var": np.zeros(2, "f4"), "first_time": np.array(True)}
    (params, state) = conversion.from_equinox("ema", entries)
    assert params.bias is None
    jax.tree.map(assert_array_equal, state, jbn.init(2)[1])
    entries = arrays | {"mean": np.zeros(2, "f4"), "var": np.ones(2, "f4"), "counter": np.array(0)}
    jax.tree.map(assert_array_equal, conversion.from_equinox("batch", entries)[1], jbn.init(2)[1])


def test_several_feature_axes():
    fields = {"mean": np.zeros((2, 3), "f4"), "var": np.ones((2, 3), "f4")}
    params, state = convert.from_flax({"scale": np.ones((2, 3), "f4")}, fields)
    assert params.scale.shape == state.weight.shape == (2, 3)
    ema = convert.to_haiku(params, state, decay=0.9, shape=(1, 2, 1, 3))
    assert ema[1]["hidden"].shape == (1, 2, 1, 3)
    assert convert.from_haiku(*ema, decay=0.9)[1].mean.shape == (2, 3)


def aligned(size):
    """Ones at an address that jax.device_put shares rather than copies on CPU."""
    memory = np.ones(4 * size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    array = memory[start : start + 4 * size].view(np.float32)
    array[...] = 1
    return array


def test_arrays_are_copied():
    entries = {name: aligned(4096) for name in convert.TORCH}
    params, state = convert.from_torch(entries)
    expected = jax.tree.map(np.array, (params, state))
    for value in entries.values():
        value[...] = 77
    jax.tree.map(assert_array_equal, (params, state), expected)
    back = convert.to_torch(params, state)
    for value in back.values():
        value[...] = 77  # and they can be written to
    jax.tree.map(assert_array_equal, (params, state), expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_statistics_are_wide_and_params_keep_their_dtype(dtype):
    with jax.enable_x64(True):
        entries = {name: np.array([1.5, 0.25]).astype(jnp.dtype(dtype)) for name in convert.TORCH}
        params, state = convert.from_torch(entries)
        assert params.scale.dtype == params.bias.dtype == dtype
        wide = "float64" if dtype == "float64" else "float32"
        assert state.mean.dtype == state.var.dtype == state.weight.dtype == wide
        for field in (*params, *state[:2]):
            assert field.tolist() == [1.5, 0.25]
        back = convert.to_torch(params, state)
        assert back["weight"].dtype == ("float32" if dtype == "bfloat16" else dtype)
        assert convert.to_keras(params, state)["gamma"].dtype == dtype


NAMES = ["gamma", "model/bn1/gamma", "bn1/gamma:0", "gamma:0"]


@pytest.mark.parametrize("pattern", NAMES)
def test_names_of_keras(pattern):
    arrays = {name: np.full(2, number, "f4") for number, name in enumerate(convert.KERAS)}
    arrays = {pattern.replace("gamma", name): value for name, value in reversed(arrays.items())}  # never by order
    params, state = convert.from_keras(arrays)
    assert [float(field[0]) for field in (*params, *state)] == [0, 1, 2, 3, 1]


def test_every_batch_norm_of_a_state_dict():
    running = {"running_mean": np.zeros(2, "f4"), "running_var": np.ones(2, "f4")}
    entries = running | {"weight": np.full(2, 2, "f4"), "bias": np.ones(2, "f4"), "num_batches_tracked": np.array(3)}
    state_dict = {"conv.weight": np.ones((2, 2, 3, 3), "f4"), "bn.extra": np.ones(1)}
    state_dict |= {f"bn.{name}": value for name, value in entries.items()}
    state_dict |= {"norm.weight": np.ones(2, "f4"), "norm.bias": np.ones(2, "f4")}  # a layer norm
    state_dict |= {f"blocks.0.bn.{name}": value for name, value in running.items()}
    state_dict |= {"half.running_mean": np.ones(2, "f4")}
    layers, unused = convert.find_torch(state_dict)
    assert list(layers) == ["bn", "blocks.0.bn"]
    assert unused == ("conv.weight", "bn.extra", "norm.weight", "norm.bias", "half.running_mean")
    assert layers["bn"][0].scale.tolist() == [2, 2]
    assert layers["blocks.0.bn"][0] == (None, None)
    assert list(convert.find_torch(entries).layers) == [""]
    layers = convert.find_torch(running, steps=0, decay=0.9).layers
    assert layers[""][1].weight.tolist() == [0, 0]
    with pytest.raises(ValueError, match=r"'bn': the shapes differ: .*weight \[3\]"):
        convert.find_torch(state_dict | {"bn.weight": np.ones(3, "f4")})


RUNNING = {"running_mean": np.zeros(2, "f4"), "running_var": np.ones(2, "f4")}
EMA = {"hidden": np.full((1, 2), 0.1, "f4"), "average": np.ones((1, 2), "f4"), "counter": np.array(1)}
REFUSED = {
    "no running statistics": (
        lambda: convert.from_torch({"weight": np.ones(2, "f4"), "running_mean": None, "running_var": None}),
        r"entries has weight, running_mean \(None\), running_var \(None\); expected running_mean, running_var and, "
        r"where the layer has them, weight, bias, num_batches_tracked \(missing: running_mean, running_var\).*"
        r"track_running_stats=False.*jbn\.recalibrate",
    ),
    "a whole network": (
        lambda: convert.from_torch({f"{at}.{name}": value for at in "ab" for name, value in RUNNING.items()}),
        r"several entries named running_mean: .*is for find_torch\.$",
    ),
    "unknown": (lambda: convert.from_torch(RUNNING | {"scale": 1}), r"unknown: scale\).*find_torch"),
    "a network": (
        lambda: convert.from_flax({"bn1": {}}, {"bn1": {}}),
        r"entries has bn1; .*scale, bias \(missing: mean, var; unknown: bn1",
    ),
    "nothing": (lambda: convert.from_keras([]), r"weights has nothing; expected moving_mean, moving_variance"),
    "without names": (lambda: convert.from_keras([np.ones(2)]), r"ndarray without a name; .*get_weights"),
    "two layers": (lambda: convert.from_keras({"a/gamma": 1, "b/gamma": 1}), r"several .* gamma: 'a/gamma', 'b/gamma'"),
    "renorm": (
        lambda: convert.from_keras(dict.fromkeys((*convert.KERAS, "moving_stddev"), np.ones(2, "f4"))),
        r"unknown: moving_stddev\)\. With renorm=True",
    ),
    "shapes": (
        lambda: convert.from_torch(RUNNING | {"weight": np.ones(3, "f4")}),
        r"running_mean \[2\], running_var \[2\], weight \[3\]; expected one value per feature",
    ),
    "counts": (
        lambda: convert.from_torch(RUNNING | {"running_var": np.ones(2, int)}),
        r"entries\['running_var'\] is int64\[2\]; expected a floating-point array",
    ),
    "not an array": (lambda: convert.from_torch(RUNNING | {"bias": "zeros"}), r"\['bias'\] is <U5\[\]; expected"),
    "not a mapping": (lambda: convert.from_torch([1]), r"entries is a list; expected a mapping"),
    "steps alone": (
        lambda: convert.from_torch(RUNNING, steps=3),
        r"steps is 3 and decay is None; expected both.*neither",
    ),
    "decay alone": (lambda: convert.from_torch(RUNNING, decay=0.9), r"steps is None and decay is 0\.9; expected both"),
    "steps": (lambda: convert.from_torch(RUNNING, steps=1.5, decay=0.9), r"steps is 1\.5; expected a whole number"),
    "decay": (lambda: convert.from_torch(RUNNING, steps=1, decay=1.0), r"decay is 1\.0; expected a number in \[0, 1\)"),
    "the decay of another": (
        lambda: convert.from_torch(RUNNING | {"running_var": np.float32([0.5, 2])}, steps=3, decay=0.99),
        r"0\.9703 of the initial variance 1 is left, and the least running variance is 0\.5; .*PyTorch's momentum",
    ),
    "haiku's decay": (
        lambda: convert.from_haiku({}, EMA, EMA, decay=0.99),
        r"hidden / average is 0\.01 after 1.* 0\.1;",
    ),
    "haiku's counters": (
        lambda: convert.from_haiku({}, EMA | {"counter": 0}, EMA, decay=0.9),
        r"mean_ema\.counter is 0 and var_ema\.counter is 1; expected the same",
    ),
    "haiku's counter": (
        lambda: convert.from_haiku({}, {"hidden": 0.0, "average": 0.0}, EMA, decay=0.9),
        r"mean_ema\.counter, var_ema\.counter and, .*\(missing: mean_ema\.counter\)",
    ),
    "weights that differ": (
        lambda: back_of(*jbn.init(2)[:1], jbn.State(jnp.zeros(2), jnp.ones(2), jnp.array([0.5, 1.0])), 0.9),
        r"state\.weight is from 0\.5 to 1; Haiku has one counter",
    ),
    "haiku's shape": (
        lambda: convert.to_haiku(*jbn.init(2), decay=0.9, shape=(1, 3)),
        r"shape is \[1, 3\] and the features are \[2\]",
    ),
    "equinox": (
        lambda: convert.from_equinox(jbn, None),
        r"layer is a builtins.module; expected an equinox\.nn\.BatchNorm",
    ),
    "a checkpoint": (
        lambda: convert.find_torch({"epoch": 3, "state_dict": {"bn.running_mean": np.zeros(2)}}),
        r"state_dict has mappings in 'state_dict'; .* checkpoint\['state_dict'\]",
    ),
    "a network of torch": (lambda: convert.find_torch(object()), r"are model.state_dict\(\)"),
    "a layer of torch": (lambda: convert.from_torch(object()), r"Pass layer.state_dict\(\)"),
    "steps that are not counted": (  # of a layer that loaded its statistics
        lambda: convert.from_torch(RUNNING | {"running_var": np.float32([4, 1])}, steps=0, decay=0.9),
        r"steps is 0, and the running statistics are not the initial mean 0 and variance 1",
    ),
    **{
        f"variance {var}": (
            lambda var=var: convert.from_torch(RUNNING | {"running_var": np.float32([1, var])}),
            r"running_var has 1 of . values such as .*; expected finite variances",
        )
        for var in (-1.0, np.nan)
    },
    "params first": (lambda: convert.to_flax(*reversed(jbn.init(2))), r"state is a Params; expected a jbn\.State"),
}


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(call, message):
    with pytest.raises((TypeError, ValueError), match=f"(?s){message}"):
        call()


@sources
def test_golden_files_are_small(name):
    assert (conversion.GOLDEN / f"{name}.npz").stat().st_size < 10_000


def test_the_weight_of_a_debiased_layer():
    stats = {"mean": np.ones(2, np.float32), "var": np.ones(2, np.float32), "weight": np.float32([0.25, 0.5])}
    np.testing.assert_array_equal(convert.from_flax(None, stats)[1].weight, [0.25, 0.5])
