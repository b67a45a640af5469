#!/usr/bin/env bash
# optax 0.2.8 with dm-haiku 0.0.17 (and jax 0.10.2): optax.incremental_update of a Haiku state makes a float of its
# counter: int32 3 and 4, averaged with 0.1, are float32 3.1.
#
# Guess before: an integer is taken over as it is, or the dtype of the old tree is kept.
# Seen: the counter is 3.1, a float32, and Haiku goes on with it without an error: `average` is hidden / (1 -
# decay^4.1) from the next step on. A carry of lax.scan refuses it, as its dtype has changed; Equinox's `first_time`,
# a bool, becomes 0.1.
#
#   findings/averaged_counter.sh [PYTHON]            a Python 3.11 or newer
set -euo pipefail
python=${1:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet optax==0.2.8 dm-haiku==0.0.17 jax==0.10.2 jaxlib==0.10.2
cd "$folder"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - << 'END'
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax

network = hk.without_apply_rng(hk.transform_with_state(lambda x: hk.BatchNorm(True, True, 0.9)(x, is_training=True)))
x = jnp.asarray(np.random.default_rng(0).normal(5, 1, (8, 3)), jnp.float32)
params, state = network.init(None, x)
for _ in range(3):
    _, state = network.apply(params, state, x)
_, newer = network.apply(params, state, x)
averaged = optax.incremental_update(newer, state, 0.1)
counter = averaged["batch_norm/~/mean_ema"]["counter"]
_, after = network.apply(params, averaged, x)
mean = after["batch_norm/~/mean_ema"]
ratio = float((mean["average"] / mean["hidden"]).mean())
flag = optax.incremental_update(jnp.array(False), jnp.array(True), 0.9)
print(f"optax {optax.__version__}, haiku {hk.__version__}: {counter.dtype} {counter}, then {mean['counter']}")
print(f"a bool that was False: {flag}")
print(f"average / hidden {ratio:.4f}, 1 / (1 - 0.9^4.1) is {1 / (1 - 0.9**4.1):.4f}")
assert counter.dtype == flag.dtype == jnp.float32 and abs(counter - 3.1) < 1e-6 and abs(flag - 0.1) < 1e-6
assert abs(ratio - 1 / (1 - 0.9**4.1)) < 1e-4
try:
    jax.lax.scan(lambda carry, x: (optax.incremental_update(newer, carry, 0.1), None), state, None, length=2)
except TypeError as error:
    print("scan:", str(error).splitlines()[0])
else:
    raise AssertionError("scan takes it")
END
