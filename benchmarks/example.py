"""The training step of examples/cifar10 with its preset for accelerators, with any batch norm."""

import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from resnet50 import Norm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "cifar10"))

import model
import steps
from config import PRESETS, Config

CONFIG = Config(**PRESETS["accelerator"])
IMAGES = 50_000
OPTIMIZER = steps.make_optimizer(
    CONFIG.peak_rate,
    CONFIG.epochs * (IMAGES // CONFIG.batch),
    momentum=CONFIG.momentum,
    weight_decay=CONFIG.weight_decay,
)


def init(key: jax.Array, norm: Norm, depth=CONFIG.depth, width=CONFIG.width) -> tuple[dict, dict]:
    """Params and state, in float32."""
    params, _ = model.init(key, depth, width)
    norms = {name: norm.init(unit["norm"].scale.size) for name, unit in params.items() if "norm" in unit}
    state = {name: state for name, (_, state) in norms.items()}
    return params | {name: params[name] | {"norm": learned} for name, (learned, _) in norms.items()}, state


def make_step(norm: Norm, mesh: Mesh, mode: str = "shard_map", batch=CONFIG.batch, depth=CONFIG.depth):
    """One step of the example's `train`, data parallel over `mesh`, to be compiled: lower(carry, totals, ...)."""

    def normalize(x, params, state, *, axis_name, activation, **_):
        return norm.apply(x, params, state, axis_name, activation)

    apply = partial(model.apply, depth=depth, normalize=normalize)
    statistics = {"mean": np.full(3, 125, np.float32), "std": np.full(3, 63, np.float32)}
    settings = {name: getattr(CONFIG, name) for name in ("smoothing", "cutout")}
    train, _ = steps.make_steps(
        apply, OPTIMIZER, mesh, batch=batch, dtype=jnp.dtype(CONFIG.dtype), **statistics, **settings
    )
    return SimpleNamespace(lower=lambda *operands: cast(Any, train).lower(*operands, 1))


def inputs(norm: Norm, mesh: Mesh, batch: int, size: int = 32, depth=CONFIG.depth, width=CONFIG.width) -> tuple:
    """The shapes and shardings of the step's arguments, for `batch` images in all."""

    def start():
        params, state = init(jax.random.key(0), norm, depth, width)
        carry = steps.Carry(params, state, OPTIMIZER.init(params), jnp.zeros((), jnp.int32))
        images = steps.Images(jnp.zeros((IMAGES, size, size, 3), jnp.uint8), jnp.zeros(IMAGES, jnp.int32))
        return carry, steps.Totals.zero(), images, jnp.zeros(IMAGES, jnp.int32), jax.random.key(0)

    def lie(spec, tree):
        own = NamedSharding(mesh, spec)
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=own), tree)

    carry, totals, images, *rest = jax.eval_shape(start)
    return *lie(P(), (carry, totals)), lie(P(steps.AXIS), images), *lie(P(), rest)
