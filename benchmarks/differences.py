"""Measure what sets jbn apart from its peers, one number each; a peer that is not installed is named and left out.

python benchmarks/differences.py
"""

import importlib.util
import os
import platform
from functools import partial

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import jbn

FEATURES, EPSILON = 64, 1e-5
console = Console(highlight=False, width=140)


def with_jbn(x, before=1):
    """As `batch_norm` does after so many other batches of such data; the variance is that which y is normalized by."""
    params, state = jbn.init(x.shape[-1])
    for _ in range(before):
        _, state = jbn.batch_norm(x[::-1] - 0.1, params, state, train=True)
    y, measured = jbn.normalize_batch(x, params, center=state.mean)
    return y, measured.var


def without_center(x):
    y, measured = jbn.normalize_batch(x, jbn.init(x.shape[-1])[0])
    return y, measured.var


def with_flax(x, fast=True):
    from flax import linen as nn

    layer = nn.BatchNorm(use_running_average=False, momentum=0.0, use_fast_variance=fast)
    variables = layer.init(jax.random.key(0), x)
    y, variables = layer.apply(variables, x, mutable=["batch_stats"])
    return y, variables["batch_stats"]["var"]


def with_haiku(x):
    import haiku as hk

    layer = hk.transform_with_state(lambda x: hk.BatchNorm(True, True, 0.0)(x, is_training=True))
    params, state = layer.init(jax.random.key(0), x)
    y, state = layer.apply(params, state, None, x)
    return y, state["batch_norm/~/var_ema"]["average"]


def with_keras(x):
    import keras

    layer = keras.layers.BatchNormalization(momentum=0.0, epsilon=EPSILON)
    y = layer(x, training=True)
    return y, layer.non_trainable_variables[1].value


def with_torch(x):
    import torch

    layer = torch.nn.BatchNorm1d(x.shape[-1], momentum=1.0)
    y = layer(torch.from_numpy(np.array(x))).detach().numpy()
    return y, layer.state_dict()["running_var"].numpy() * (len(x) - 1) / len(x)


IMPLEMENTATIONS = {
    "jbn": with_jbn,
    "jbn, first step": partial(with_jbn, before=0),
    "jbn, no center": without_center,
    "flax": with_flax,
    "flax, two-pass": partial(with_flax, fast=False),
    "haiku": with_haiku,
    "keras": with_keras,
    "torch": with_torch,
}


def accuracy(names) -> Table:
    """Largest error of variance and output, against float64 on the same float32 numbers."""
    table = Table("mean / std", *names, title="relative error of the variance / error of the output, whose std is 1")
    noise = np.random.default_rng(0).standard_normal((4096, FEATURES))
    for offset in (0.0, 3.0, 1e2, 1e3, 1e4, 1e5):
        x = jnp.asarray(offset + noise, jnp.float32)
        exact = np.asarray(x, np.float64)
        mean, var = exact.mean(0), exact.var(0)
        cells = []
        for name in names:
            y, found = IMPLEMENTATIONS[name](x)
            output = np.abs(np.asarray(y) - (exact - mean) / np.sqrt(var + EPSILON)).max()
            cells.append(f"{np.abs(np.asarray(found) / var - 1).max():.0e} / {output:.0e}")
        table.add_row(f"{offset:.0e}", *cells)
    return table


def kept(function, x) -> float:
    """Bytes kept for the backward pass, for each value of `x`."""
    _, backward = jax.vjp(function, x)
    return sum(leaf.nbytes for leaf in jax.tree.leaves(backward)) / x.size


def memory(names) -> Table:
    table = Table("x", *names, title="bytes kept for the backward pass, per value of x")
    for dtype in (jnp.float32, jnp.bfloat16):
        x = jnp.ones((1024, FEATURES), dtype)
        table.add_row(
            jnp.dtype(dtype).name, *(f"{kept(lambda x, f=IMPLEMENTATIONS[name]: f(x)[0], x):.2f}" for name in names)
        )
    return table


def states() -> Table:
    """Masks: four devices with 8, 1, 2 and 5 valid rows, a NaN in a masked row, a batch that is masked whole.

    Then running statistics, with the defaults of each: after a batch with a NaN, and after a first batch of variance 4.
    """
    from flax import linen as nn

    random = np.random.default_rng(0)
    x = jnp.asarray(random.standard_normal((4, 8, 1)) + np.arange(4).reshape(4, 1, 1), jnp.float32)
    mask = jnp.arange(8) < jnp.array([8, 1, 2, 5])[:, None]
    params, state = jbn.init(1)

    def peer(x, mask, axis_name=None):
        layer = nn.BatchNorm(use_running_average=False, momentum=0.0, axis_name=axis_name)
        variables = {"params": {"scale": jnp.ones(1), "bias": jnp.zeros(1)}}
        y, updated = layer.apply(variables, x, mask=mask[..., None], mutable=["batch_stats"])
        return y, *jax.tree.leaves(updated)

    def ours(x, mask, axis_name=None):
        y, new = jbn.batch_norm(x, params, state, train=True, weights=mask, axis_name=axis_name, unbiased=False)
        return y, new.mean, new.var

    def gradient(layer):
        poisoned = x[0].at[7].set(jnp.nan)
        valid = jnp.arange(8) < 7

        def loss(x):
            return jnp.sum(jnp.where(valid[:, None], layer(x, valid)[0], 0.0) ** 3)

        return int(jnp.sum(jnp.isnan(jax.grad(loss)(poisoned)[:7])))

    exact = np.asarray(x, np.float64)[np.asarray(mask)]
    table = Table("", "exact", "jbn", "flax", title="masks and running statistics")
    results = [jax.vmap(lambda x, m, f=f: f(x, m, "i"), axis_name="i")(x, mask) for f in (ours, peer)]
    table.add_row("mean over 4 devices", f"{exact.mean():.3f}", *(f"{float(r[1][0, 0]):.3f}" for r in results))
    table.add_row("variance over 4 devices", f"{exact.var():.3f}", *(f"{float(r[2][0, 0]):.3f}" for r in results))
    table.add_row("NaN gradients of 7 valid rows", "0", str(gradient(ours)), str(gradient(peer)))
    nothing = [float(f(x[0], jnp.zeros(8, bool))[1][0]) for f in (ours, peer)]
    table.add_row("running mean after an all-masked batch", "0", *(f"{value:g}" for value in nothing))
    all_valid = jnp.ones(8, bool)
    with_nan = [float(f(x[0].at[0].set(jnp.nan), all_valid)[1][0]) for f in (ours, peer)]
    table.add_row("running mean after a batch with a NaN", "0", *(f"{value:g}" for value in with_nan))
    first = 2 * jnp.tile(jnp.array([[-1.0], [1.0]]), (512, 1))
    _, state = jbn.batch_norm(first, params, state, train=True)
    layer = nn.BatchNorm(use_running_average=False)
    _, updated = layer.apply(layer.init(jax.random.key(0), first), first, mutable=["batch_stats"])
    found = float(state.var[0]), float(jax.tree.leaves(updated)[1][0])
    table.add_row("running variance after a first batch of variance 4", "4", *(f"{value:.3f}" for value in found))
    return table


def renorm_differences(r_max: float, d_max: float) -> np.ndarray:
    """Of y and the running mean [6 steps, 2], the largest difference from Keras's `renorm=True`.

    Keras averages the deviation where jbn averages the variance: each step starts from the statistics of Keras.
    """
    import keras

    clipping = {"rmax": r_max, "rmin": 1 / r_max, "dmax": d_max}
    layer = keras.layers.BatchNormalization(epsilon=1e-3, renorm=True, renorm_momentum=0.8, renorm_clipping=clipping)
    layer.build((None, FEATURES))
    for weight, ends in zip(layer.trainable_weights, ((0.5, 2), (-1, 1)), strict=True):
        weight.assign(np.linspace(*ends, FEATURES))
    params = jbn.Params(*(weight.value for weight in layer.trainable_weights))
    rule = partial(jbn.batch_renorm, train=True, r_max=r_max, d_max=d_max, decay=0.8, epsilon=1e-3)
    random, found = np.random.default_rng(0), []
    for step in range(6):
        x = jnp.asarray((1 + step) * (1 + random.standard_normal((32, FEATURES))), jnp.float32)
        state = jbn.State(layer.renorm_mean.value, layer.renorm_stddev.value**2 - 1e-3, jnp.ones(()))
        y, state = rule(x, params, state)
        found.append([jnp.abs(y - layer(x, training=True)).max(), jnp.abs(state.mean - layer.renorm_mean.value).max()])
    return np.array(found)


def renormalized() -> Table:
    table = Table("output", "running mean", title="batch renormalization: largest difference from Keras in six steps")
    table.add_row(*(f"{value:.0e}" for value in renorm_differences(1.5, 0.5).max(0)))
    return table


def layers(kernels, states, x):
    """Linear layers, each normalized and then `tanh`, for `recalibrate`."""
    after = []
    for kernel, state in zip(kernels, states, strict=True):
        x, state = jbn.batch_norm(x @ kernel, jbn.Params(None, None), state, train=True)
        x, after = jnp.tanh(x), [*after, state]
    return x, after


def updated_by_torch(kernels, batches) -> list[tuple[np.ndarray, np.ndarray]]:
    """Mean and variance of each of `layers` by PyTorch's `update_bn`."""
    import torch

    norms, parts = [torch.nn.BatchNorm1d(kernel.shape[1]) for kernel in kernels], []
    for kernel, norm in zip(kernels, norms, strict=True):
        linear = torch.nn.Linear(*kernel.shape, bias=False)
        linear.weight.data = torch.from_numpy(kernel.T.copy())
        parts += [linear, norm, torch.nn.Tanh()]
    torch.optim.swa_utils.update_bn(map(torch.from_numpy, batches), torch.nn.Sequential(*parts))
    found = [norm.state_dict() for norm in norms]
    return [(state["running_mean"].numpy(), state["running_var"].numpy()) for state in found]


def recalibrated() -> Table:
    """Statistics of two layers over the same 256 rows in two cuts, beside PyTorch's `update_bn`, against float64."""
    random = np.random.default_rng(0)
    rows = random.normal(2, 3, (256, 3)).astype(np.float32)
    rows[:100] += 4  # the batches differ
    kernels = [random.standard_normal(shape).astype(np.float32) for shape in ((3, 8), (8, 5))]
    exact, x = [], rows.astype(np.float64)
    for kernel in kernels:
        x = x @ kernel
        exact.append(x.var(0, ddof=1))
        x = np.tanh((x - x.mean(0)) / np.sqrt(exact[-1] + EPSILON))

    table = Table("cut of 256 rows", *(f"{who}, layer {layer}" for who in ("jbn", "torch") for layer in (1, 2)))
    table.title = "recalibrated: largest relative error of the variance"
    for name, sizes in {"8 x 32": [32] * 8, "2, 2, 4, .., 128": [2, 2, 4, 8, 16, 32, 64, 128]}.items():
        batches = np.split(rows, np.cumsum(sizes)[:-1])
        ours = jbn.recalibrate(layers, kernels, [jbn.init(8)[1], jbn.init(5)[1]], batches)
        found = [state.var for state in ours] + [var for _, var in updated_by_torch(kernels, batches)]
        errors = (np.abs(np.asarray(var) / right - 1).max() for var, right in zip(found, exact * 2, strict=True))
        table.add_row(name, *(f"{error:.0e}" for error in errors))
    return table


def main() -> None:
    names = [name for name in IMPLEMENTATIONS if importlib.util.find_spec(name.split(",")[0])]
    for name in IMPLEMENTATIONS.keys() - set(names):
        console.print(f"{name} is not installed and left out")
    console.print(
        f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, {platform.machine()}; jax {jax.__version__}"
    )
    console.print(accuracy(names))
    console.print(memory([name for name in names if name != "torch" and "," not in name]))
    if "flax" in names:
        console.print(states())
    if "keras" in names:
        console.print(renormalized())
    if "torch" in names:
        console.print(recalibrated())


if __name__ == "__main__":
    main()
