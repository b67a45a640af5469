#!/usr/bin/env bash
# jax 0.12.0.1: in float32 the gradient of erf and erfc, and so of the exact GELU, cannot be traced under shard_map, which
# checks what varies over devices unless told not to. In bfloat16 it can, as can the value, and every other activation.
#
# Guess before: what jax.nn and lax offer can be differentiated wherever its value can be computed.
# Seen: "Primitive polynomial requires varying manual axes to match": with its derivative erf is computed by a polynomial
# whose coefficients are constants, and nothing marks them as the same on all devices. 0.11.2 has none of this.
#
#   findings/erf_gradient_under_shard_map.sh PYTHON               3.12 or newer
set -euo pipefail
python=${1:-python3.12}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
for version in 0.12.0.1 0.11.2; do
    "$python" -m venv "$folder/venv-$version"
    "$folder/venv-$version/bin/python" -m pip install --quiet jax=="$version" numpy==2.4.6
    "$folder/venv-$version/bin/python" - << 'END'
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P

mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
FUNCTIONS = {
    "erf": jax.lax.erf,
    "erfc": jax.lax.erfc,
    "exact gelu": partial(jax.nn.gelu, approximate=False),
    "gelu by tanh": jax.nn.gelu,
    "silu": jax.nn.silu,
    "erf_inv": jax.lax.erf_inv,
    "lgamma": jax.lax.lgamma,
}


def traced(function, dtype):
    over = jax.shard_map(function, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    try:
        jax.eval_shape(over, jax.ShapeDtypeStruct((4,), dtype))
    except ValueError as error:
        return str(error).partition(",")[0]
    return "fine"


def gradient(function):
    return jax.grad(lambda x: function(x).sum())


found = {}
for dtype in ("float32", "bfloat16"):
    for name, function in FUNCTIONS.items():
        found[name, dtype] = traced(function, dtype), traced(gradient(function), dtype)
        print(f"jax {jax.__version__} {dtype} {name}: value {found[name, dtype][0]}; gradient {found[name, dtype][1]}")
new = jax.__version__ == "0.12.0.1"
for (name, dtype), (value, of_gradient) in found.items():
    refused = new and dtype == "float32" and name in ("erf", "erfc", "exact gelu")
    assert value == "fine"
    assert of_gradient.startswith("Primitive polynomial requires varying manual axes to match") if refused else of_gradient == "fine"
END
done
