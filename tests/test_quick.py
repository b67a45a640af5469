"""What one runs after every edit, `make quick`: a little of everything, each beside something that is not jbn."""

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose

import jbn.convert
import jbn.presets

RANDOM = np.random.default_rng(0)
X, DY, TANGENT = RANDOM.normal(2, 3, (3, 16, 4)).astype(np.float32)
MASK = np.arange(16) % 5 > 0
PARAMS = jbn.Params(*RANDOM.uniform(0.5, 2, (2, 4)).astype(np.float32))
STATE = jbn.init(4)[1]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # sums of 16 values of up to 10


def loss(x, params, weights=None, axis_name=None):
    y, state = jbn.batch_norm(x, params, STATE, train=True, weights=weights, axis_name=axis_name)
    return jnp.sum(jnp.sin(y)), (y, state)


def textbook(x, params, weights):
    return jnp.sum(jnp.sin(reference.textbook(x, *params, 1e-5, weights[:, None])))


def test_values_state_and_every_derivative_masked():
    @jax.jit
    def ours(x, params):
        gradient = jax.grad(lambda x, params: loss(x, params, MASK)[0], (0, 1))
        return loss(x, params, MASK)[1], gradient(x, params), jax.jvp(gradient, (x, params), (TANGENT, params))[1]

    @jax.jit
    def wanted(x, params):
        gradient = jax.grad(lambda x, params: textbook(x, params, jnp.float32(MASK)), (0, 1))
        return gradient(x, params), jax.jvp(gradient, (x, params), (TANGENT, params))[1]

    (y, state), *derivatives = ours(np.where(MASK[:, None], X, np.nan), PARAMS)
    count, mean, var = reference.moments(X, MASK)
    exact = np.where(MASK[:, None], reference.normalize(X, mean, var, *PARAMS), 0)
    assert_allclose(y, exact, **CLOSE)
    assert_allclose(state.mean, mean, **CLOSE)
    assert_allclose(state.var, var * count / (count - 1), **CLOSE)
    assert_allclose(state.weight, 0.1, rtol=1e-6)
    jax.tree.map(lambda got, want: assert_allclose(got, want, rtol=1e-4, atol=1e-4), derivatives, [*wanted(X, PARAMS)])


def test_eight_devices():
    mesh = jax.make_mesh((8,), ("i",), axis_types=(AxisType.Auto,))

    def local(x, params):
        (_, (y, state)), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(x, params, axis_name="i")
        return y, state, gradients

    split = jax.shard_map(local, mesh=mesh, in_specs=(P("i"), P()), out_specs=(P("i"), P(), (P("i"), P())))
    program = jax.jit(split).lower(X, PARAMS).compile()
    got = program(X, PARAMS)
    assert len(hlo.collectives(program.as_text())) == 2  # the sums of each pass in one
    (_, (y, state)), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(X, PARAMS)
    jax.tree.map(lambda ours, one: assert_allclose(ours, one, **CLOSE), got, (y, state, gradients))


def test_every_kind_of_weights_and_a_state_that_has_evidence():
    """One program: y, the state after a step and the gradient of x, beside float64 and the closed form."""
    real = RANDOM.uniform(0.5, 2, 16).astype(np.float32) * MASK
    kinds = {"none": None, "mask": MASK, "repeats": 1 + np.arange(16) % 3, "real": real, "by feature": X > 1}
    state = jbn.State(np.float32([1, 2, 3, 2]), np.float32([4, 9, 16, 1]), np.float32([0.5, 1, 0.25, 1]))
    options = {"decay": 0.7, "epsilon": 1e-2, "train": True}

    @jax.jit
    def ours(x, dy):
        def of(weights, unbiased):
            run = lambda x: jbn.batch_norm(x, PARAMS, state, weights=weights, unbiased=unbiased, **options)  # noqa: E731
            y, pullback, after = jax.vjp(run, x, has_aux=True)
            return y, after, pullback(dy)[0]

        return {kind: of(weights, kind != "none") for kind, weights in kinds.items()}

    for kind, (y, after, dx) in ours(X, DY).items():
        weights = kinds[kind]
        count, mean, var = reference.moments(X, weights)
        number = reference.number(weights, X.shape) if kind == "real" else count
        there = reference.full_weights(X, weights) > 0
        exact = np.where(there, reference.normalize(X, mean, var, *PARAMS, 1e-2), 0)
        moved = reference.update(state, (number, mean, var), decay=0.7, unbiased=kind != "none")
        assert_allclose(y, exact, **CLOSE, err_msg=kind)
        jax.tree.map(lambda got, want: assert_allclose(got, want, **CLOSE), tuple(after), moved)
        shares = np.where(there, DY, 0)
        wanted = reference.gradients(X, shares, PARAMS.scale, 1e-2, weights)[0]
        assert_allclose(dx, wanted, rtol=1e-4, atol=1e-4, err_msg=kind)


def test_groups_renormalization_and_channels_first():
    state = jbn.State(np.float32([1, 2, 3, 2]), np.float32([4, 9, 16, 1]), np.float32([1, 1, 1, 0]))

    @jax.jit
    def ours(x):
        train = {"params": PARAMS, "state": state, "train": True}
        return (
            *(jbn.batch_norm(x, **train, groups=4, interleaved=interleaved)[0] for interleaved in (False, True)),
            jbn.batch_renorm(x, **train, r_max=1.2, d_max=0.3)[0],
            jbn.batch_norm(x.reshape(4, 4, 4).swapaxes(1, 2), **train, feature_axis=1, activation=jax.nn.silu)[0],
        )

    contiguous, interleaved, renormalized, first = ours(X)
    cut = X.reshape(4, 4, 4)
    apart = np.stack([reference.normalize(part, *reference.moments(part)[1:], *PARAMS) for part in cut])
    assert_allclose(contiguous, apart.reshape(X.shape), **CLOSE)
    apart = [reference.normalize(part, *reference.moments(part)[1:], *PARAMS) for part in cut.swapaxes(0, 1)]
    assert_allclose(interleaved, np.stack(apart, 1).reshape(X.shape), **CLOSE)
    plain = reference.normalize(X, *reference.moments(X)[1:], *PARAMS)
    wanted = reference.renormalize(X, PARAMS, state, 1.2, 0.3)[0]
    assert_allclose(renormalized, np.where(state.weight > 0, wanted, plain), **CLOSE)
    assert_allclose(first, (plain / (1 + np.exp(-plain))).reshape(4, 4, 4).swapaxes(1, 2), **CLOSE)


def test_measured_apart_and_moved_by_hand():
    a, b, empty = (jbn.moments(part, weights=w) for part, w in ((X[:5], None), (X[5:], None), (X, X > 99)))
    count, mean, var = reference.moments(X)
    whole = jbn.merge(a, empty, b)
    jax.tree.map(lambda got, want: assert_allclose(got, want, rtol=1e-6), whole[:3], (np.full(4, count), mean, var))
    total = jbn.update(jbn.update(jbn.empty_moments(STATE), a), b)
    jax.tree.map(lambda got, want: assert_allclose(got, want, rtol=1e-6), total[:3], whole[:3])
    held = jbn.update(STATE, a, amount=np.array([0, 1, 1, 1]))
    assert held.weight[0] == 0 and held.mean[0] == 0 and held.mean[1] == a.mean[1]
    broken = jbn.update(held, b._replace(mean=b.mean * np.float32([1, np.nan, 1, 1])))
    assert broken.mean[1] == held.mean[1] and broken.mean[2] != held.mean[2]
    target, online = (jbn.State(of.mean, of.var, np.float32([1, 1, 1, 0])) for of in (a, b))
    soft = jbn.merge_states(target, online, shares=[3, 1])
    mean = 0.75 * np.float64(a.mean) + 0.25 * np.float64(b.mean)
    var = 0.75 * (a.var + (a.mean - mean) ** 2) + 0.25 * (b.var + (b.mean - mean) ** 2)
    assert_allclose(soft.mean[:3], mean[:3], rtol=1e-6)
    assert_allclose(soft.var[:3], var[:3], rtol=1e-6)
    assert soft.mean[3] == a.mean[3] and soft.weight[3] == 0


def test_evaluation_in_bfloat16_and_what_is_kept():
    state = jbn.State(np.float32([1, 2, 3, 2]), np.float32([4, 9, 16, 1]))
    x = np.where(MASK[:, None], X, np.nan).astype(jnp.bfloat16)

    def evaluate(x, state):
        return jnp.sum(jbn.normalize_running(x, PARAMS, state, weights=MASK, epsilon=1e-2).astype(jnp.float32))

    (dx, dstate), y = (
        jax.grad(evaluate, (0, 1))(x, state),
        jbn.batch_norm(x, PARAMS, state, train=False, epsilon=1e-2, weights=MASK)[0],
    )
    exact = np.where(MASK[:, None], reference.normalize(np.float64(x), *state[:2], *PARAMS, 1e-2), 0)
    assert y.dtype == dx.dtype == jnp.bfloat16
    assert_allclose(np.float64(y), exact, rtol=2**-8, atol=1e-6)
    assert_allclose(np.float64(dx), MASK[:, None] * PARAMS.scale / np.sqrt(state.var + 1e-2), rtol=2**-8)
    assert not any(map(np.any, dstate))

    def kept(x):
        return jax.tree.leaves(jax.vjp(lambda x: jbn.batch_norm(x, PARAMS, state, train=True), x)[1])

    assert [leaf.dtype for leaf in jax.eval_shape(kept, x) if leaf.size > 16] == [jnp.bfloat16]


def test_a_network_measured_and_folded():
    """Two norms with a square between them, two batches, one of them masked in part."""
    batches = [(X, MASK), (2 * DY + 1, np.ones(16, bool))]

    def apply(params, states, batch):
        h, first = jbn.batch_norm(batch[0], params, states[0], train=True, weights=batch[1])
        return h, (first, jbn.batch_norm(h * h, params, states[1], train=True, weights=batch[1])[1])

    first, second = jbn.recalibrate(apply, PARAMS, (STATE, STATE), batches)
    x = np.concatenate([x[mask] for x, mask in batches]).astype(np.float64)
    h = reference.normalize(x, x.mean(0), x.var(0, ddof=1), *PARAMS) ** 2
    for state, of in ((first, x), (second, h)):
        assert_allclose(state.mean, of.mean(0), rtol=1e-5)
        assert_allclose(state.var, of.var(0, ddof=1), rtol=1e-5)
    found, _ = jbn.drift(apply, PARAMS, (STATE, STATE), batches)
    assert_allclose(found.shift, x.mean(0) / np.sqrt(1 + 1e-5), rtol=1e-5)
    assert_allclose(found.ratio, np.sqrt((x.var(0, ddof=1) + 1e-5) / (1 + 1e-5)), rtol=1e-5)
    kernel, bias = RANDOM.normal(size=(3, 4)).astype(np.float32), np.float32([1, 2, 3, 4])
    folded = jbn.fold_into(kernel, bias, PARAMS, first)
    exact = reference.normalize(X[:, :3] @ np.float64(kernel) + bias, *first[:2], *PARAMS)
    assert_allclose(X[:, :3] @ np.asarray(folded[0]) + np.asarray(folded[1]), exact, **CLOSE)


def test_a_far_and_a_broken_feature():
    x = X + np.float32([0, 300, 0, 0])
    y, state = jbn.batch_norm(x, PARAMS, STATE._replace(mean=jnp.array([0.0, 0, np.nan, 0])), train=True)
    evaluated, _ = jbn.batch_norm(x, PARAMS, state, train=False)
    assert_allclose(evaluated, y, atol=0.2)  # by a variance that is unbiased, 16 / 15
    assert_allclose(state.mean, np.float64(x).mean(0), rtol=1e-5)


@pytest.mark.parametrize(
    ("message", "options"),
    [
        (r"params.scale has shape \[3\]; expected \[4\]", {"params": jbn.init(3)[0]}),
        (r"decay is 2; expected a number in \[0, 1\]", {"decay": 2}),
        (r"epsilon is -1; expected a number that is not negative", {"epsilon": -1}),
        (r"axis_name is 'i', and no axis 'i' is bound", {"axis_name": "i"}),
        (r"feature_axis is 5 and x has shape \[16, 4\]", {"feature_axis": 5}),
        (r"weights has shape \[3\] and x has shape \[16, 4\]", {"weights": np.ones(3)}),
        (r"groups is 3 and axis 0 of x has size 16", {"groups": 3}),
        (r"x has shape \[1, 4\], which is one value per feature", {"x": X[:1]}),
        (r"train is None; expected a Python bool", {"train": None}),
        (r"state is a Params; expected a jbn.State", {"state": PARAMS}),
        (r"state.mean is bfloat16, which cannot hold", {"state": jbn.State(jnp.zeros(4, jnp.bfloat16), np.ones(4))}),
    ],
)
def test_errors(message, options):
    given = {"x": X, "params": PARAMS, "state": STATE, "train": True} | options
    with pytest.raises((TypeError, ValueError, NameError), match=message):
        jbn.batch_norm(**given)


def test_the_entries_of_another_library():
    start, decay = {"running_mean": np.zeros(4, np.float32), "running_var": np.ones(4, np.float32)}, 0.9
    moved = {name: decay * of + 0.1 * np.float32(3) for name, of in start.items()}
    params, state = jbn.convert.from_torch(moved | {"weight": PARAMS.scale}, steps=1, decay=decay)
    assert params.bias is None and jbn.presets.TORCH["decay"] == decay
    jax.tree.map(
        lambda got, want: assert_allclose(got, want, rtol=1e-6), tuple(state), (*np.full((2, 4), 3.0), np.full(4, 0.1))
    )
    assert_allclose(jbn.convert.to_torch(params, state)["weight"], PARAMS.scale)


def test_an_export():
    exported = jax.export.export(jax.jit(lambda x: jbn.normalize_running(x, PARAMS, STATE)))(X)
    again = jax.export.deserialize(exported.serialize()).call(X)
    assert_allclose(again, reference.normalize(X, np.zeros(4), np.ones(4), *PARAMS), **CLOSE)


def test_a_layer():
    nn = pytest.importorskip("flax.linen")
    import jbn.linen

    options = {"use_running_average": False, "momentum": 0.9}
    variables = nn.BatchNorm(**options).init(jax.random.key(0), X)
    ours, theirs = (
        of(**options).apply(variables, X, mutable=["batch_stats"]) for of in (jbn.linen.BatchNorm, nn.BatchNorm)
    )
    jax.tree.map(lambda a, b: assert_allclose(a, b, **CLOSE), ours, theirs)


def test_a_training():
    target = np.sin(X).sum(-1, keepdims=True)

    def step(carry, _):
        params, state = carry

        def loss(params):
            y, after = jbn.batch_norm(X, params["norm"], state, train=True, activation=jnp.tanh)
            return jnp.mean((y @ params["kernel"] - target) ** 2), after

        (value, state), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        return (jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients), state), value

    start = {"norm": PARAMS, "kernel": np.zeros((4, 1), np.float32)}, STATE
    (_, state), values = jax.jit(lambda start: jax.lax.scan(step, start, None, length=50))(start)
    assert values[-1] < 0.8 * values[0]  # least squares of tanh leaves two thirds
    assert_allclose(state.weight, 1 - 0.9**50, rtol=1e-5)
