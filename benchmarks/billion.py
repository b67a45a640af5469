"""A stream of 2^30 values whose mean wanders: what `jbn.streams` keeps of it in float32, and one `Moments` that merges.

python benchmarks/billion.py            1 minute on 2 CPU cores
"""

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

import jbn
from jbn import streams

BATCH, STEPS, WAY, SPREAD = 512, 2**21, 10.0, 2.0  # the mean goes from 0 to WAY in a straight line


@jax.jit
def run(key):
    def step(carry, index):
        stream, alone = carry
        noise = jax.random.normal(jax.random.fold_in(key, index), (BATCH, 1))
        x = WAY * index.astype(jnp.float32) / STEPS + SPREAD * noise
        return (streams.observe(stream, x), jbn.update(alone, jbn.moments(x))), None

    stream = streams.init(1)
    stream, alone = jax.lax.scan(step, (stream, stream.total), jnp.arange(STEPS))[0]
    return stream.moments, alone


if __name__ == "__main__":
    table = Table("", "count", "mean", "variance", title=f"{STEPS:,} batches of {BATCH}")
    table.add_row("expected", f"{BATCH * STEPS:,}", f"{WAY / 2:.6f}", f"{SPREAD**2 + WAY**2 / 12:.6f}")
    for name, found in zip(("jbn.streams", "Moments alone"), run(jax.random.key(0)), strict=True):
        count, mean, var = (value.item() for value in (found.count, found.mean + found.mean_low, found.var))
        table.add_row(name, f"{count:,.0f}", f"{mean:.6f}", f"{var:.6f}")
    Console().print(table)
