#!/usr/bin/env bash
# jax 0.12.0.1: after the first import of flax 0.12.12, orbax-checkpoint, equinox 0.13.8, dm-haiku or of jax.extend itself,
# everything that `jit` has compiled is traced and compiled once more when it is called again. So a training that imports
# its library for checkpoints when it first saves compiles its step twice.
#
# Guess before: importing a library leaves what is compiled alone; a call with equal arguments finds it.
# Seen: jax.extend loads Pallas, which adds two settings to those that a compiled program is kept under, and no key of before has
# them. The same of jax.experimental.pallas, but not of optax or chex. With 0.11.2 nothing is compiled again.
#
#   findings/late_import_compiles_again.sh PYTHON                 3.12 or newer
set -euo pipefail
python=${1:-python3.12}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
cat > late.py << 'END'
import importlib
import sys

import jax

compiled = jax.jit(lambda x: 2 * x)
compiled(1.0)
for name in ("json", "optax", "chex", sys.argv[1]):
    assert compiled._cache_size() == 1, name
    importlib.import_module(name)
    compiled(1.0)
again = compiled._cache_size() == 2
print(f"jax {jax.__version__}: behind a late import of {sys.argv[1]}, compiled again: {again}")
assert again == (jax.__version__ == "0.12.0.1")
compiled(1.0)
assert compiled._cache_size() == 1 + again  # once, not with every call
END
for version in 0.12.0.1 0.11.2; do
    "$python" -m venv "$folder/$version"
    "$folder/$version/bin/python" -m pip install --quiet jax=="$version" numpy==2.4.6 flax==0.12.12 orbax-checkpoint==0.12.8 \
        equinox==0.13.8 dm-haiku==0.0.17 optax==0.2.8 chex==0.1.92
    for name in jax.extend jax.experimental.pallas flax.linen orbax.checkpoint equinox haiku; do
        "$folder/$version/bin/python" late.py "$name"
    done
done
