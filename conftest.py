"""Eight virtual CPU devices for every test, and the names that docstring examples use."""

import importlib.util
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import pytest

import jbn

LAYERS = {"flax": ("_flax", "linen", "nnx"), "equinox": ("equinox",)}  # which cannot be imported without these
collect_ignore = [
    f"jbn/{name}.py" for needed, names in LAYERS.items() if not importlib.util.find_spec(needed) for name in names
]


@pytest.fixture(autouse=True)
def _docstring_names(doctest_namespace):
    doctest_namespace.update(jax=jax, jnp=jnp, jbn=jbn)
