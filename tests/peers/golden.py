"""Write tests/golden: what a layer of each library holds after four steps, and what it makes of the next batch.

python tests/peers/golden.py

history  [steps, batch, features]   the batches before
x, entries.*                        the next batch, and what the layer holds before it
evaluation                          of x by that
output, running_mean, running_var   the training step on x, and what the layer holds then
evaluation_after                    of x by that
"""

import os
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import keras
import numpy as np

FOLDER = Path(__file__).parents[1] / "golden"
FEATURES = 3
SCALE, BIAS = np.array([0.5, -1.0, 2.0], np.float32), np.array([0.1, 1.0, -3.0], np.float32)


def batches(steps=5):
    """Their mean and spread move from step to step, and from feature to feature."""
    rng = np.random.default_rng(0)
    return [rng.normal([0, 0.5 * step, -1], [1 + step, 1, 0.5], (8, FEATURES)).astype("f4") for step in range(steps)]


def record(train, evaluate, entries, running):
    """`train(x)` and `evaluate(x)` give outputs; `entries()` and `running()` what the layer holds, as it is then."""

    def copy(value):
        return np.asarray(value).copy()

    *history, x = batches()
    for batch in history:
        train(batch)
    found = {f"entries.{name}": copy(value) for name, value in entries().items()}
    found |= {"history": np.stack(history), "x": x, "evaluation": copy(evaluate(x)), "output": copy(train(x))}
    found["running_mean"], found["running_var"] = (copy(value).reshape(FEATURES) for value in running())
    return found | {"evaluation_after": copy(evaluate(x))}


def of_torch():
    import torch

    layer = torch.nn.BatchNorm1d(FEATURES)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(SCALE))
        layer.bias.copy_(torch.from_numpy(BIAS))
    return record(
        lambda x: layer.train()(torch.from_numpy(x)).detach(),
        lambda x: layer.eval()(torch.from_numpy(x)).detach(),
        layer.state_dict,
        lambda: (layer.running_mean, layer.running_var),
    )


def of_flax():
    layer = nn.BatchNorm(use_running_average=None)
    held = dict(layer.init(jax.random.key(0), np.ones((2, FEATURES)), use_running_average=True))
    held["params"] = {"scale": jnp.asarray(SCALE), "bias": jnp.asarray(BIAS)}

    def train(x):
        y, after = layer.apply(held, x, use_running_average=False, mutable="batch_stats")
        held.update(after)
        return y

    return record(
        train,
        lambda x: layer.apply(held, x, use_running_average=True),
        lambda: {f"{kind}.{name}": value for kind in held for name, value in held[kind].items()},
        lambda: (held["batch_stats"]["mean"], held["batch_stats"]["var"]),
    )


def of_keras():
    layer = keras.layers.BatchNormalization(name="bn1")
    layer.build((None, FEATURES))
    layer.gamma.assign(SCALE)
    layer.beta.assign(BIAS)
    return record(
        lambda x: layer(x, training=True),
        lambda x: layer(x, training=False),
        lambda: {variable.path: variable for variable in layer.weights},
        lambda: (layer.moving_mean, layer.moving_variance),
    )


def of_haiku():
    network = hk.transform_with_state(lambda x, train: hk.BatchNorm(True, True, decay_rate=0.9)(x, train))
    network = hk.without_apply_rng(network)
    _, state = network.init(None, np.ones((2, FEATURES), np.float32), True)
    params = {"batch_norm": {"scale": jnp.asarray(SCALE)[None], "offset": jnp.asarray(BIAS)[None]}}
    held = [state]

    def train(x):
        y, held[0] = network.apply(params, held[0], x, True)
        return y

    def entries():
        parts = {"params": params["batch_norm"]} | {name.rpartition("/")[2]: ema for name, ema in held[0].items()}
        return {f"{part}.{name}": value for part, fields in parts.items() for name, value in fields.items()}

    return record(
        train,
        lambda x: network.apply(params, held[0], x, False)[0],
        entries,
        lambda: [held[0][f"batch_norm/~/{name}_ema"]["average"] for name in ("mean", "var")],
    )


def of_equinox(mode):
    layer, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(FEATURES, "batch", mode=mode)
    layer = eqx.tree_at(lambda layer: (layer.weight, layer.bias), layer, (jnp.asarray(SCALE), jnp.asarray(BIAS)))
    held = [state]
    index = layer.batch_state_index if mode == "batch" else layer.ema_state_index

    def apply(layer, x):
        return jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, held[0])

    def train(x):
        y, held[0] = apply(layer, x)
        return y

    def entries():
        mean, var = held[0].get(index)
        first = {} if mode == "batch" else {"first_time": held[0].get(layer.ema_first_time_index)}
        counter = {"counter": held[0].get(layer.batch_counter)} if mode == "batch" else {}
        held_now = {"weight": layer.weight, "bias": layer.bias, "mean": mean, "var": var}
        return held_now | first | counter | {"momentum": layer.momentum}

    return record(train, lambda x: apply(eqx.nn.inference_mode(layer), x)[0], entries, lambda: held[0].get(index))


SOURCES = {
    "torch": of_torch,
    "flax": of_flax,
    "keras": of_keras,
    "haiku": of_haiku,
    "equinox_ema": lambda: of_equinox("ema"),
    "equinox_batch": lambda: of_equinox("batch"),
}

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, make in SOURCES.items():
        np.savez(FOLDER / f"{name}.npz", **make())
