"""How a scale is stored, where that is not as itself: what it means, and back. float64 in and out.

| kind | scale |
| --- | --- |
| plain | stored |
| fixed | 1, whatever is stored |
| softplus | log(1 + exp(stored)) + epsilon |
| relu | max(stored, 0) + 1e-6 |
| blended | stored / sqrt(1 - epsilon) |

Of what is blended the library divides by sqrt((1 - epsilon) var + epsilon), which is sqrt(1 - epsilon) times
sqrt(var + epsilon / (1 - epsilon)).
"""

import numpy as np

from jbn._libraries.library import Library


def meant(library: Library, stored: np.ndarray | None, like: np.ndarray) -> np.ndarray | None:
    """The scale that `stored` means; `like` has its shape where there is none."""
    if library.scale == "fixed" or (stored is None and library.scale != "blended"):
        return None
    if library.scale == "blended":
        scale = (np.ones(like.shape) if stored is None else _wide(stored)) / np.sqrt(1 - library.epsilon)
    elif library.scale == "softplus":
        scale = np.logaddexp(0, _wide(stored)) + library.epsilon
    elif library.scale == "relu":
        scale = np.maximum(_wide(stored), 0) + 1e-6
    else:
        return stored
    return scale.astype(like.dtype if stored is None else stored.dtype)


def stored(library: Library, scale: np.ndarray | None, like: np.ndarray) -> np.ndarray | None:
    """What the library stores for `scale`; `like` has its shape where there is none."""
    if library.scale == "plain":
        return scale
    dtype = like.dtype if scale is None else scale.dtype
    wide = np.ones(like.shape) if scale is None else _wide(scale)
    if library.scale == "fixed":
        if np.any(wide != 1):
            raise ValueError(
                f"params.scale has values such as {wide[wide != 1].flat[0]:.6g}; {library.title} takes it as 1, "
                f"whatever is stored. Pass the name of a layer that has a scale, or move it into the map behind."
            )
        return wide.astype(dtype)
    if library.scale == "blended":
        return (wide * np.sqrt(1 - library.epsilon)).astype(dtype)
    softplus = library.scale == "softplus"
    least = library.epsilon if softplus else 1e-6
    over = wide - least
    if np.any(over <= 0 if softplus else over < -1e-6 * least):  # 1e-6 in float32 is less than that
        raise ValueError(
            f"params.scale has values such as {wide.min():.6g}; expected more than {least:.6g}: {library.title} stores "
            f"it as {library.scale}, which cannot give less."
        )
    return (over + np.log(-np.expm1(-over)) if softplus else np.maximum(over, 0)).astype(dtype)


def _wide(array) -> np.ndarray:
    return np.asarray(array, np.float64)
