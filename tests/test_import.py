"""`import jbn` loads jax alone, and a layer for a framework that is not there says what to install."""

import os
import subprocess
import sys

import pytest

import jbn

OPTIONAL = ("flax", "equinox", "haiku", "keras", "torch", "optax")


def run(program, *folders):
    """What `program` prints in a Python of its own, which looks into `folders` first."""
    package = os.path.dirname(os.path.dirname(jbn.__file__))  # noqa: PTH120
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*map(str, folders), package])}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def loaded(first, *folders):
    """Which optional packages are loaded after `first` and `import jbn`."""
    program = f"{first}\nimport jbn, sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    return set(run(program, *folders).split()) & set(OPTIONAL)


def test_nothing_but_jax():
    assert loaded("") == set()


@pytest.mark.parametrize("name", OPTIONAL)
def test_what_is_loaded_is_found(name, tmp_path):
    (tmp_path / f"{name}.py").touch()
    assert loaded(f"import {name}", tmp_path) == {name}


@pytest.mark.parametrize(("layer", "framework"), [("linen", "Flax"), ("nnx", "Flax"), ("equinox", "Equinox")])
def test_without_the_framework(layer, framework):
    program = f"""
import sys
sys.modules["{framework.lower()}"] = None
try:
    import jbn.{layer}
except ImportError as error:
    print(error)
"""
    assert run(program) == f"jbn.{layer} needs {framework}: pip install 'jbn[{framework.lower()}]'\n"
