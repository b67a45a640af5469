"""The settings that other libraries start from: `jbn.batch_norm(x, params, state, train=True, **jbn.presets.TORCH)`.

| preset | decay | epsilon | unbiased | its name for decay | evidence at the start |
| --- | --- | --- | --- | --- | --- |
| `TORCH` | 0.9 | 1e-5 | yes | 1 - `momentum` | full: `jbn.init(features, debias=False)` |
| `FLAX`, linen and nnx | 0.99 | 1e-5 | no | `momentum` | full |
| `KERAS` | 0.99 | 1e-3 | no | `momentum` | full |
| `HAIKU` | 0.9 | 1e-5 | no | `decay_rate` | none: `jbn.init(features)` |

`of("paddle")` has those of any library in docs/libraries.md. Haiku's decay_rate has no default: 0.9 is that of
hk.nets.ResNet, and MobileNetV1 has 0.999.

They are mappings that cannot be changed; one setting of another value is `TORCH | {"epsilon": 1e-3}`, and a dict to
keep in a config `dict(TORCH)`. Evaluation needs the epsilon alone, and `jbn.fold_into` takes nothing else of them:
`epsilon=TORCH["epsilon"]`.

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

from jbn._libraries.rows import row


class Preset(TypedDict):
    """Arguments of `jbn.batch_norm`."""

    decay: float
    epsilon: float
    unbiased: bool


def of(library: str) -> Preset:
    """The default settings of a library, by its name as in `jbn.convert.from_library`.

    Where nothing moves, as in "torchvision frozen", decay is 1. "e3nn" has the epsilon that goes with its converted
    params.

    Raises:
      ValueError: no such library.

    Examples:
      >>> import jbn.presets
      >>> dict(jbn.presets.of("chainer"))
      {'decay': 0.9, 'epsilon': 2e-05, 'unbiased': True}
    """
    of_library = row(library)
    settings = {"decay": of_library.decay, "epsilon": of_library.added, "unbiased": of_library.unbiased}
    return cast(Preset, MappingProxyType(settings))  # a type checker looks into the arguments only of a TypedDict


TORCH, FLAX, KERAS, HAIKU = map(of, ("torch", "flax", "keras", "haiku"))
