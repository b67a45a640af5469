"""The settings that other libraries start from: `jbn.batch_norm(x, params, state, train=True, **jbn.presets.TORCH)`.

| preset | decay | epsilon | unbiased | its name for decay | evidence at the start |
| --- | --- | --- | --- | --- | --- |
| `TORCH` | 0.9 | 1e-5 | yes | 1 - `momentum` | full: `jbn.init(features, debias=False)` |
| `FLAX`, linen and nnx | 0.99 | 1e-5 | no | `momentum` | full |
| `KERAS` | 0.99 | 1e-3 | no | `momentum` | full |
| `HAIKU` | 0.9 | 1e-5 | no | `decay_rate` | none: `jbn.init(features)` |

They are mappings that cannot be changed; one setting of another value is `TORCH | {"epsilon": 1e-3}`, and a dict to
keep in a config `dict(TORCH)`. Evaluation and `jbn.fold_into` take the epsilon alone: `epsilon=TORCH["epsilon"]`.

Examples:
  >>> import jbn.presets
  >>> params, state = jbn.init(1, debias=False)
  >>> x = jnp.array([[1.0], [3.0]])
  >>> y, state = jbn.batch_norm(x, params, state, train=True, **jbn.presets.TORCH)
  >>> print(f"{state.mean[0]:.4f}, {state.var[0]:.4f}")  # 0.9 * 0 + 0.1 * 2, 0.9 * 1 + 0.1 * 2
  0.2000, 1.1000
"""

from types import MappingProxyType
from typing import TypedDict, cast


class Preset(TypedDict):
    """Arguments of `jbn.batch_norm`."""

    decay: float
    epsilon: float
    unbiased: bool


def _preset(decay: float, epsilon: float, unbiased: bool) -> Preset:
    # A type checker looks into the arguments only of a TypedDict.
    return cast(Preset, MappingProxyType({"decay": decay, "epsilon": epsilon, "unbiased": unbiased}))


# torch.nn.BatchNorm1d, 2d and 3d and SyncBatchNorm: momentum 0.1, the weight of the new value; eps 1e-5. The running
# variance is unbiased, the one that normalizes is not.
TORCH = _preset(0.9, 1e-5, True)

# flax.linen.BatchNorm and flax.nnx.BatchNorm: momentum 0.99, epsilon 1e-5.
FLAX = _preset(0.99, 1e-5, False)

# keras.layers.BatchNormalization: momentum 0.99, epsilon 1e-3.
KERAS = _preset(0.99, 1e-3, False)

# haiku.BatchNorm: eps 1e-5. decay_rate has no default there: 0.9 is that of hk.nets.ResNet. MobileNetV1 has 0.999.
HAIKU = _preset(0.9, 1e-5, False)
