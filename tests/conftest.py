"""Strict promotion for the tests of the core; peers and examples run as they would in a user's program."""

from pathlib import Path

import compiling
import jax
import pytest

CORE = Path(__file__).parent
collect_ignore_glob = ["golden/make/*"]  # each needs the library that it is of
# What depends on rounding, or looks at what is compiled; the rest tells more apart than that.
COMPILED_AS_BY_USERS = (
    *("accuracy", "cost", "memory", "moments", "promises", "quick", "renorm", "residuals", "straight"),
)
if compiling.OPTIONS:
    compiling.take_options()


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


@pytest.fixture(scope="module", autouse=True)
def _compiled_quickly(request):
    """For most of the time is compiling."""
    by_users = request.path.parent.name == "peers" or request.path.stem.removeprefix("test_") in COMPILED_AS_BY_USERS
    compiling.quickly(not by_users)


@pytest.fixture
def compilations():
    """What is traced or compiled from here on: a list that grows."""
    found = []

    def listen(event, duration, **_):
        found.extend([event] * ("compile" in event or "trace" in event))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)
