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
