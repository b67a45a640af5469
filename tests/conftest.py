"""Strict promotion for the tests of the core; peers and examples run as they would in a user's program."""

from pathlib import Path

import jax
import pytest

CORE = Path(__file__).parent
collect_ignore_glob = ["golden/make/*"]  # each needs the library that it is of
COMPILED_QUICKLY = (
    *("activation", "batch_norm", "debug", "documents", "drift", "export", "feature_weights", "groups", "layouts"),
    *("members", "recalibrate", "subgroups", "sync", "units"),
)


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
    """For most of the time of these is compiling, and what they tell apart is more than rounding."""
    if request.path.stem.removeprefix("test_") not in COMPILED_QUICKLY:
        yield
        return

    def compile_quickly(on):
        jax.clear_caches()  # what is there was compiled in the other way
        jax.config.update("jax_disable_most_optimizations", on)

    compile_quickly(True)
    yield
    compile_quickly(False)


@pytest.fixture
def compilations():
    """What is traced or compiled from here on: a list that grows."""
    found = []

    def listen(event, duration, **_):
        found.extend([event] * ("compile" in event or "trace" in event))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)
