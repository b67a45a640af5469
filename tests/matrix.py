"""Print how far every way to split a batch is from float64: `python tests/matrix.py`."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

from itertools import product

import numpy as np
import processes
import ways

OFFSETS = (0.0, 1e3)
SHOWN = ("y", "mean", "var", "dx", "dscale", "dbias")


def main():
    print(
        "The largest difference of the first step and the tenth, plain and masked, in float32, for x around 0 and 1e3."
    )
    print(f"{'':34}", *(f"{name:>6}" for name in SHOWN * len(OFFSETS)))
    for way in ways.WAYS:
        cases = product(OFFSETS, (False, True))
        show(way, [(offset, ways.compare(way, masked=masked, offset=offset)) for offset, masked in cases])
    rows = [row for part in processes.launch() for row in part]
    for (count, devices), way in product(processes.FORMS, ("shard_map", "shard_map unchecked", "automatic")):
        found = [
            (offset, differences)
            for form, name, dtype, _, offset, differences in rows
            if (form, name, dtype) == ([count, devices], way, "float32")
        ]
        show(f"{count} x {devices}, {way}", found)


def show(way, found):
    largest = (np.max([each[name] for at, each in found if at == offset]) for offset, name in product(OFFSETS, SHOWN))
    print(f"{way:34}", *(f"{value:6.0e}" for value in largest), flush=True)


if __name__ == "__main__":
    main()
