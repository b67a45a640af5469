"""Batch normalization for JAX as pure functions: state goes in and comes out.

Start:          `init` makes `Params` (learned) and `State` (running statistics)
Every day:      `batch_norm` in training and evaluation; `batch_renorm` for small batches, with `renorm_limits`
In two parts:   `normalize_batch` or `normalize_running`, and `update` of the running statistics
Measure:        `moments` of a batch, `merge` of several; `empty_moments` to accumulate
Whole networks: `recalibrate` to exact statistics, `drift` from them, `merge_states` of several runs
Inference:      `fold` and `fold_into` the linear map before
By name:        `jbn.linen`, `jbn.nnx`, `jbn.equinox` (layers); `jbn.convert`, `jbn.presets` (other libraries' arrays
                and settings); `jbn.streams` (observations, rewards and tables as they come)

All take features last (`feature_axis`), statistics in float32, masks and weights (`weights`), and pool over named axes
of devices (`axis_name`). `help(jbn.batch_norm)` has the formula, every argument and an example.
"""

from jbn._batch_norm import batch_norm
from jbn._fold import fold, fold_into
from jbn._merge_states import merge_states
from jbn._moments import merge, moments
from jbn._networks.drift import Drift, drift
from jbn._networks.recalibrate import recalibrate
from jbn._normalize import normalize_batch, normalize_running
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
