"""`import jbn` and its conversions load jax alone; a layer for a framework that is not there says what to install."""

import os
import subprocess
import sys

import jbn

OPTIONAL = ("flax", "equinox", "haiku", "keras", "torch", "optax")


def run(program, *folders):
    """What `program` prints in a Python of its own, which looks into `folders` first."""
    package = os.path.dirname(os.path.dirname(jbn.__file__))  # noqa: PTH120
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*map(str, folders), package])}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def loaded(first, *folders):
    """Which optional packages are loaded after `first` and what needs none of them."""
    program = (
        f"{first}\nimport jbn.convert, jbn.presets, jbn.streams, sys\n"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    return set(run(program, *folders).split()) & set(OPTIONAL)


def test_nothing_but_jax():
    assert loaded("") == set()


def test_what_is_compiled_stays_compiled():
    """An import that adds to jax's settings, as that of jax.extend does, has everything compiled once more."""
    program = """
import jax
compiled = jax.jit(lambda x: 2 * x)
compiled(1.0)
import jbn.convert, jbn.presets, jbn.streams
params, state = jbn.init(2)
jax.jit(lambda x: jbn.batch_norm(x, params, state, train=True))(jax.numpy.ones((4, 2)))
compiled(1.0)
print(compiled._cache_size())
"""
    assert run(program) == "1\n"


def test_what_is_loaded_is_found(tmp_path):
    for name in OPTIONAL:
        (tmp_path / f"{name}.py").touch()
    assert loaded(f"import {', '.join(OPTIONAL)}", tmp_path) == set(OPTIONAL)


def test_without_the_framework():
    layers = {"linen": "Flax", "nnx": "Flax", "equinox": "Equinox"}
    program = f"""
import importlib, sys
for layer, framework in {layers}.items():
    sys.modules[framework.lower()] = None
    try:
        importlib.import_module(f"jbn.{{layer}}")
    except ImportError as error:
        print(error)
"""
    expected = [f"jbn.{layer} needs {name}: pip install 'jbn[{name.lower()}]'" for layer, name in layers.items()]
    assert run(program).splitlines() == expected
