"""Eight virtual CPU devices for every test, a cache of what is compiled, and the names that docstring examples use."""

import importlib.util
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
# Most of the time is compiling: workers, the processes that tests start and the next run share what comes of it.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent / ".venv" / "compiled"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax
import jax.numpy as jnp
import pytest

import jbn

LAYERS = {
    "flax": ("_libraries/flax", "linen", "nnx"),
    "equinox": ("equinox",),
}  # which cannot be imported without these
collect_ignore = [
    f"jbn/{name}.py" for needed, names in LAYERS.items() if not importlib.util.find_spec(needed) for name in names
]
if not importlib.util.find_spec("torch"):
    collect_ignore.append("tests/peers/torch_resnet.py")


def pytest_configure(config):
    # What another process is writing, or cannot be written, is compiled as without a cache: JAX warns of it.
    config.addinivalue_line("filterwarnings", "ignore:Error .* persistent compilation cache:UserWarning")


@pytest.fixture(autouse=True)
def _docstring_names(doctest_namespace):
    doctest_namespace.update(jax=jax, jnp=jnp, jbn=jbn)
