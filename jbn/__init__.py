"""Batch normalization for JAX as pure functions."""

from jbn._batch_norm import batch_norm
from jbn._drift import Drift, drift
from jbn._fold import fold, fold_into
from jbn._measure import moments
from jbn._merge import merge, merge_states
from jbn._normalize import normalize_batch, normalize_running
from jbn._recalibrate import recalibrate
from jbn._renorm import batch_renorm, renorm_limits
from jbn._start import empty_moments, init
from jbn._types import Moments, Params, State
from jbn._update import update

__all__ = [
    "Drift",
    "Moments",
    "Params",
    "State",
    "batch_norm",
    "batch_renorm",
    "drift",
    "empty_moments",
    "fold",
    "fold_into",
    "init",
    "merge",
    "merge_states",
    "moments",
    "normalize_batch",
    "normalize_running",
    "recalibrate",
    "renorm_limits",
    "update",
]

__version__ = "0.1.0"
