#!/usr/bin/env bash
# e3nn-jax 0.21.0 with flax 0.12.8: a block of features that e3nn knows to be zero (a chunk that is None, as many of
# its functions return) is not what the same zeros are: batch norm gives 0 for it, not the bias, and sets its running
# statistics to 0 and 1.
#
# Guess before: the same output, faster; a running mean that goes a tenth of the way to 0.
# Seen: 0 in training and in evaluation, where zeros that are stored give the bias and (0 - mean) / std. Running mean
# and variance of the block are set to 0 and 1 at once, also with use_running_average=True where batch_stats is
# mutable: what was learned from all batches before is lost with one in which the block was left out.
#
#   findings/e3nn_zero_block.sh [PYTHON]             a Python 3.11 or newer
set -euo pipefail
python=${1:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet e3nn-jax==0.21.0 flax==0.12.8 jax==0.10.2 jaxlib==0.10.2
cd "$folder"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - << 'END'
import e3nn_jax as e3nn
import jax
import jax.numpy as jnp
import numpy as np

layer = e3nn.flax.BatchNorm()
x = jnp.asarray(np.random.default_rng(0).normal(3, 2, (64, 5)), jnp.float32)
variables = layer.init(jax.random.key(0), e3nn.IrrepsArray("2x0e + 1x1o", x), use_running_average=True)
params = {"weights": jnp.ones(3), "biases": jnp.array([1.0, 2.0])}
stats = variables["batch_stats"]
for _ in range(100):
    _, after = layer.apply(
        {"params": params, "batch_stats": stats},
        e3nn.IrrepsArray("2x0e + 1x1o", x),
        use_running_average=False,
        mutable="batch_stats",
    )
    stats = after["batch_stats"]


def outcome(known, evaluate):
    zeros = x.at[:, :2].set(0)
    block = e3nn.IrrepsArray("2x0e + 1x1o", zeros, zero_flags=(known, False))
    y, after = layer.apply(
        {"params": params, "batch_stats": stats}, block, use_running_average=evaluate, mutable="batch_stats"
    )
    return tuple(np.round(each, 2).tolist() for each in (y.array[0, :2], *after["batch_stats"].values()))


print(f"e3nn-jax {e3nn.__version__}: running", {name: np.round(value, 2).tolist() for name, value in stats.items()})
for evaluate in (False, True):
    for known in (False, True):
        y, mean, var = found = outcome(known, evaluate)
        print(f"evaluate={evaluate}, known to be zero={known}: y {y}, running mean {mean}, variance {var[:2]}")
        if known:
            assert (y, mean, var[:2]) == ([0, 0], [0, 0], [1, 1])
        else:
            assert min(mean) > 2 and (y == [1, 2] if not evaluate else max(y) < 1)
END
