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

import airbench
import steps
from config import Config, defaults

CONFIG = Config(**defaults("airbench", "accelerator"))
IMAGES = 50_000
FIXED = 2 * 2 * 3 * airbench.WHITENING  # params that are not trained
TOTAL = CONFIG.epochs * (IMAGES // CONFIG.batch)
OPTIMIZER = airbench.make_optimizer(
    CONFIG.peak_rate,
    TOTAL,
    momentum=CONFIG.momentum,
    weight_decay=CONFIG.weight_decay,
)


def init(key: jax.Array, norm: Norm, width=CONFIG.width) -> tuple[dict, dict]:
    """Params and state, in float32. Norms have scales too, as those they are compared with do."""
    params, _ = airbench.init(key, np.zeros((2, 2, 3, airbench.WHITENING), np.float32), width)
    norms = {name: norm.init(outputs) for name, _, outputs in airbench.layers(width)}
    state = {name: state for name, (_, state) in norms.items()}
    return params | {name: params[name] | {"norm": learned} for name, (learned, _) in norms.items()}, state


def make_step(norm: Norm, mesh: Mesh, mode: str = "shard_map", batch=CONFIG.batch):
    """One step of the example's `train`, data parallel over `mesh`, to be compiled: lower(carry, totals, ...)."""

    def normalize(x, params, state, *, axis_name, activation, **_):
        return norm.apply(x, params, state, axis_name, activation)

    apply = partial(airbench.apply, normalize=normalize)
    train, _ = steps.make_steps(
        apply,
        OPTIMIZER,
        mesh,
        batch=batch,
        mean=np.full(3, 125, np.float32),
        std=np.full(3, 63, np.float32),
        smoothing=CONFIG.smoothing,
        dtype=jnp.dtype(CONFIG.dtype),
        augment=airbench.augment,
        after_step=partial(airbench.lookahead, total=TOTAL),
    )
    return SimpleNamespace(lower=lambda *operands: cast(Any, train).lower(*operands, 1))


def inputs(norm: Norm, mesh: Mesh, batch: int, size: int = 32, width=CONFIG.width) -> tuple:
    """The shapes and shardings of the step's arguments, for `batch` images in all."""

    def start():
        params, state = init(jax.random.key(0), norm, width)
        start = OPTIMIZER.init(params)
        carry = steps.Carry(params, state, start, jnp.zeros((), jnp.int32), (params, state))
        images = steps.Images(jnp.zeros((IMAGES, size, size, 3), jnp.uint8), jnp.zeros(IMAGES, jnp.int32))
        return carry, steps.Totals.zero(), images, jnp.zeros(IMAGES, jnp.int32), jax.random.key(0)

    def lie(spec, tree):
        own = NamedSharding(mesh, spec)
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=own), tree)

    carry, totals, images, *rest = jax.eval_shape(start)
    return *lie(P(), (carry, totals)), lie(P(steps.AXIS), images), *lie(P(), rest)
