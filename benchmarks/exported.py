"""Run what one version of JAX exported with another: programs for a fixed batch and for any, evaluation and training.

python3.11 benchmarks/exported.py FOLDER      writes what its jax exports there, and runs what is there by others
python3.12 benchmarks/exported.py FOLDER
python3.11 benchmarks/exported.py FOLDER      what the second wrote
"""

import dataclasses
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import export
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

import jbn

ROWS, FEATURES = 6, 3
X = np.random.default_rng(0).normal(2, 3, (ROWS, FEATURES)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Config:
    folder: Positional[Path]


def step(x, train):
    params, state = jbn.init(FEATURES)
    _, state = jbn.batch_norm(X + 1, params, state, train=True)
    return jbn.batch_norm(x, params, state, train=train)


PROGRAMS = {name: partial(step, train=name == "training") for name in ("evaluation", "training")}


def write(folder: Path) -> None:
    for name, function in PROGRAMS.items():
        (batch,) = export.symbolic_shape("batch")
        for size, kind in ((ROWS, "fixed"), (batch, "any")):
            program = export.export(jax.jit(function), platforms=("cpu", "cuda", "tpu"))
            stored = program(jax.ShapeDtypeStruct((size, FEATURES), jnp.float32)).serialize()
            (folder / f"{jax.__version__} {name} {kind}.bin").write_bytes(stored)


def run(file: Path, function) -> str:
    """What happens to it here: at the latest when it is called, and with the right numbers."""
    try:
        program = export.deserialize(bytearray(file.read_bytes()))
    except Exception as error:
        return f"not read: {type(error).__name__}"
    try:
        found = program.call(X)
    except Exception as error:
        return f"read, and fails when it is called: {str(error).splitlines()[0][:90]}"
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found, function(X))
    return "runs"


def main(config: Config) -> None:
    config.folder.mkdir(parents=True, exist_ok=True)
    write(config.folder)
    table = Table("written by jax", "program", "batch", f"here, jax {jax.__version__}")
    for file in sorted(config.folder.glob("*.bin")):
        version, name, kind = file.stem.split(" ")
        table.add_row(version, name, kind, run(file, PROGRAMS[name]))
    Console(highlight=False, width=160).print(table)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
