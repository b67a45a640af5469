"""A map and its norm in evaluation, folded and apart: how far each is from float64, and what it moves through memory.

python benchmarks/folding.py        prints the table of docs/convert.md
"""

from functools import partial

import hlo
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jbn

FEATURES = 32
CONVOLVE = partial(
    lax.conv_general_dilated, window_strides=(1, 1), padding="SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
)
MAPS = {  # shapes of x and kernel, and the map
    "dense": ((1024, 64), (64, FEATURES), jnp.matmul),
    "convolution": ((8, 16, 16, 16), (3, 3, 16, FEATURES), CONVOLVE),
    "depthwise": ((8, 16, 16, FEATURES), (3, 3, 1, FEATURES), partial(CONVOLVE, feature_group_count=FEATURES)),
    "transposed": (
        (8, 8, 8, 16),
        (3, 3, 16, FEATURES),
        lambda x, kernel: lax.conv_transpose(x, kernel, (2, 2), "SAME"),
    ),
}


def row(name, dtype) -> tuple[str, ...]:
    """Name, dtype, the largest difference from float64 of both, and the bytes that both move in units of y."""
    x_shape, kernel_shape, linear = MAPS[name]
    random = np.random.default_rng(0)
    x, kernel = (jnp.asarray(random.standard_normal(shape), dtype) for shape in (x_shape, kernel_shape))
    params = jbn.Params(*random.standard_normal((2, FEATURES)).astype(np.float32))
    state = jbn.State(*random.uniform(0.5, 2, (2, FEATURES)).astype(np.float32))
    folded, bias = jbn.fold_into(kernel, None, params, state)
    programs = (
        jax.jit(lambda x: jax.nn.relu(jbn.normalize_running(linear(x, kernel), params, state))).lower(x).compile(),
        jax.jit(lambda x: jax.nn.relu(linear(x, folded) + bias)).lower(x).compile(),
    )
    with jax.enable_x64(True):
        wide = linear(jnp.asarray(np.float64(x)), jnp.asarray(np.float64(kernel)))
        exact = np.maximum(jbn.normalize_running(wide, params, jax.tree.map(np.float64, state)), 0)
    size = exact.size * jnp.dtype(dtype).itemsize
    apart = [f"{np.abs(np.float64(program(x)) - exact).max():.0e}" for program in programs]
    moved = [f"{sum(hlo.traffic(str(program.as_text())).values()) / size:.1f}" for program in programs]
    return name, jnp.dtype(dtype).name, *apart, *moved


def main() -> None:
    print(
        "| map | dtype | apart | folded | memory moved, apart | folded |",
        "| --- | --- | --- | --- | --- | --- |",
        sep="\n",
    )
    for name in MAPS:
        for dtype in (jnp.float32, jnp.bfloat16):
            print("|", " | ".join(row(name, dtype)), "|")


if __name__ == "__main__":
    main()
