# python: 3.11
# pip: equinox==0.13.8 jax==0.10.2 numpy==2.4.6
"""Equinox's BatchNorm in both modes. Its files hold leaves by order; the names are those of its attributes."""

import equinox as eqx
import jax
import jax.numpy as jnp
from make.golden import BIAS, SCALE, write


def write_mode(mode):
    layer, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(3, "batch", mode=mode)
    layer = eqx.tree_at(lambda layer: (layer.weight, layer.bias), layer, (jnp.asarray(SCALE), jnp.asarray(BIAS)))
    held = [state]
    index = layer.batch_state_index if mode == "batch" else layer.ema_state_index

    def apply(layer, x):
        return jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, held[0])

    def train(x):
        y, held[0] = apply(layer, x)
        return y

    def entries():
        eqx.tree_serialise_leaves("layer.eqx", (layer, held[0]))
        kept, state = eqx.tree_deserialise_leaves("layer.eqx", (layer, held[0]))
        mean, var = state.get(index)
        if mode == "batch":
            known = {"counter": state.get(layer.batch_counter)}
        else:
            known = {"first_time": state.get(layer.ema_first_time_index)}
        return {"weight": kept.weight, "bias": kept.bias, **known, "mean": mean, "var": var}

    def running(held):
        debias = 1 - layer.momentum ** int(held["counter"]) if mode == "batch" else 1
        return held["mean"] / debias, held["var"] / debias

    write(
        f"equinox {mode}",
        package="equinox",
        train=train,
        evaluate=lambda x: apply(eqx.nn.inference_mode(layer), x)[0],
        entries=entries,
        running=running,
        decay=layer.momentum,
        epsilon=layer.eps,
        unbiased=False,
        start=(0, 1) if mode == "batch" else "first",
        debias=mode == "batch",
        by_running=mode == "ema",
    )


write_mode("ema")
write_mode("batch")
