#!/usr/bin/env bash
# brax 0.14.2: running_statistics.update leaves `weights` out of mean and variance in mode "ema", and uses them in the
# count alone: rows of weight 0 are measured like all others. In mode "welford" they are not.
#
# Guess before, from its source: the ema branch takes jnp.mean and jnp.var of the whole batch.
# Seen: half of the rows 100, of weight 0, and the other half 0: the mean is 0 in mode welford, and 50 in mode ema.
#
#   findings/brax_ema_weights.sh [PYTHON]            3.11
set -euo pipefail
python=${1:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet brax==0.14.2 jax==0.10.2 flax==0.12.8
cd "$folder"
"$folder/venv/bin/python" - << 'END'
from importlib.metadata import version

import jax.numpy as jnp
from brax.training.acme import running_statistics

x, weights = jnp.array([[0.0], [100.0]] * 4), jnp.array([1.0, 0.0] * 4)
found = {}
for mode in ("welford", "ema"):
    state = running_statistics.init_state(jnp.zeros(1), mode=mode)
    state = running_statistics.update(state, x, weights=weights)
    found[mode] = float(state.mean[0])
    print(f"{mode}: mean {found[mode]:g}, std {float(state.std[0]):g}, count {int(state.count)}")
print("brax", version("brax"))
assert found == {"welford": 0, "ema": 50}
END
