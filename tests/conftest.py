"""Strict promotion for the tests of the core; peers and examples run as they would in a user's program."""

from pathlib import Path

import jax
import pytest

CORE = Path(__file__).parent


@pytest.fixture(autouse=True)
def _strict(request):
    if request.path.parent != CORE:
        yield
        return
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def _x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def _compiled_quickly():
    """For tests of what is computed to some digits, by programs that run once: most of their time is compiling."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def compilations():
    """What is traced or compiled from here on: a list that grows."""
    found = []

    def listen(event, duration, **_):
        found.extend([event] * ("compile" in event or "trace" in event))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)
