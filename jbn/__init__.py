"""Batch normalization for JAX as pure functions."""

from jbn._batch_norm import batch_norm as batch_norm
from jbn._moments import merge as merge
from jbn._moments import moments as moments
from jbn._normalize import normalize_batch as normalize_batch
from jbn._normalize import normalize_running as normalize_running
from jbn._renorm import batch_renorm as batch_renorm
from jbn._renorm import renorm_limits as renorm_limits
from jbn._types import Moments as Moments
from jbn._types import Params as Params
from jbn._types import State as State
from jbn._types import init as init
from jbn._update import update as update

__version__ = "0.1.0"
