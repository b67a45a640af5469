#!/usr/bin/env bash
# brax 0.14.2: running_statistics, which PPO and SAC normalize observations by, takes features of mean 1e5 and standard
# deviation 1, seen 512 rows at a time, to have one of 1e-6, its least, or of 6: what is normalized is a million times too
# large, or a sixth.
#
# Guess before: float32 keeps seven digits of a mean of 1e5, so the standard deviation is off by some percent.
# Seen: 1e-6 to 6.6 over 20 such features after 15 batches, 0.5 to 1.3 at mean 1e4; at mean 1e3 it is right. The first
# batch is squared as (x - 0) (x - mean): what float32 rounds away of the mean counts 1e5 times for every row.
#
#   findings/brax_far_mean.sh [PYTHON]               3.11
set -euo pipefail
python=${1:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet brax==0.14.2 jax==0.10.2 flax==0.12.8 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - << 'END'
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
from brax.training.acme import running_statistics


def spread(mean, batch):
    """The least and largest of 20 features, after 15 batches of 512 or as many rows."""
    x = np.float32(np.random.default_rng(0).normal(mean, 1, (7680, 20)))
    state = running_statistics.init_state(jnp.zeros(20))
    update = jax.jit(running_statistics.update)
    for rows in x.reshape(-1, batch, 20):
        state = update(state, rows)
    y = np.asarray(running_statistics.normalize(jnp.asarray(x[-batch:]), state))
    std = np.asarray(state.std)
    print(f"mean {mean:g}, {batch} rows at a time: std {std.min():.3g} to {std.max():.3g}, of the values "
          f"{x.std(0, dtype=np.float64).min():.3f} to {x.std(0, dtype=np.float64).max():.3f}; largest output {np.abs(y).max():.3g}")
    return std.min(), std.max()


print("brax", version("brax"))
assert 0.95 < min(spread(0, 512)) and max(spread(1e3, 512)) < 1.05
low, high = spread(1e4, 512)
assert low < 0.9 or high > 1.1
low, high = spread(1e5, 512)
assert low < 1e-5 and high > 3
spread(1e5, 8)
END
