#!/usr/bin/env bash
# jax 0.12.0.1 (and 0.10.2): a `jax.checkpoint` inside the rule of a `jax.custom_jvp` is differentiable in reverse mode as
# things are, and not with `jax_remat3`, which is to be the default. Around the function it is, with both.
#
# Guess before: the place of a checkpoint makes no difference to what can be differentiated, only to what is kept.
# Seen: with jax_remat3 NotImplementedError, "must implement `transpose`", where it is in the rule: its tangent is linear
# already when it is transposed, and the new checkpoint has rules for linearizing alone. A library that keeps its
# residuals small from inside its rules breaks with that default.
#
#   findings/checkpoint_in_a_rule.sh [PYTHON]        a Python 3.12 or newer; installs jax in a folder that is removed
set -euo pipefail
python=${1:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet jax==0.12.0.1 jaxlib==0.12.0.1
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - << 'END'
import jax
import jax.numpy as jnp


def rule_with(wrap):
    @jax.custom_jvp
    def sine(x):
        return jnp.sin(x)

    @sine.defjvp
    def _(primals, tangents):
        tangent = wrap(lambda x, dot: jnp.cos(x) * dot)
        return sine(*primals), tangent(primals[0], tangents[0])

    return sine


def outcome(f):
    try:
        return [round(value, 3) for value in jax.grad(lambda x: jnp.sum(f(x)))(jnp.arange(3.0)).tolist()]
    except NotImplementedError as error:
        return f"NotImplementedError: {'must implement `transpose`' if 'transpose' in str(error) else error}"


inside, around = rule_with(jax.checkpoint), jax.checkpoint(rule_with(lambda f: f))
found = {}
for flag in (False, True):
    jax.config.update("jax_remat3", flag)
    found[flag] = outcome(inside), outcome(around)
    print(f"jax {jax.__version__}, jax_remat3={flag}: in the rule {found[flag][0]}; around it {found[flag][1]}")
right = [1.0, 0.54, -0.416]
assert found == {False: (right, right), True: ("NotImplementedError: must implement `transpose`", right)}
END
