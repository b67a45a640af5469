"""The CIFAR-10 program as processes of its own: started, waited for, and what they leave."""

import csv
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

PROGRAM = Path(__file__).parents[2] / "examples" / "cifar10" / "train.py"
SMALL = [
    "--depth",
    "8",
    "--epochs",
    "4",
    "--batch",
    "32",
    "--train-images",
    "192",
    "--peak-rate",
    "0.02",
    "--evaluate-every",
    "4",
    "--ema",
    "0.9",
]
FEW_IMAGES = "import data\ndata.embedded.__defaults__ = (256, 128, 0)"  # to draw, and to evaluate on
SECONDS = 300  # no wait in these tests is longer


COUNT = "--xla_force_host_platform_device_count"
# Most of the time is compiling.
QUICK = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"


class Launcher:
    """Starts the program without network, with a cache of compiled programs that all runs share."""

    def __init__(self, folder: Path):
        self.cache = folder / "no-cifar"
        self.environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "https_proxy": "http://127.0.0.1:1",
            "no_proxy": "127.0.0.1",
            "TF_CPP_MIN_LOG_LEVEL": "3",  # what XLA says of its cache can fill the pipe, from which nobody reads
        }

    def quick(self, devices: int = 1) -> dict[str, str]:
        """The environment of a process that compiles as little as can be."""
        return self.environment | {"XLA_FLAGS": f"{COUNT}={devices} {QUICK}"}

    def start(self, *arguments, devices: int = 2, before: str = "") -> subprocess.Popen:
        """One process with a small data set, which runs the Python statements in `before` first."""
        settings = [] if "--resume" in arguments else [*SMALL, "--cache", str(self.cache)]
        code = f"import runpy, sys\nsys.path.insert(0, {str(PROGRAM.parent)!r})\n{FEW_IMAGES}\n{before}\n"
        code += f"runpy.run_path({str(PROGRAM)!r}, run_name='__main__')"
        return subprocess.Popen(
            [sys.executable, "-c", code, *settings, *map(str, arguments)],
            env=self.quick(devices),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def start_two(self, *arguments, devices: int = 1, before: str = "", second=()) -> list[subprocess.Popen]:
        """Two processes that train together; `second` and `before` are for the second one alone."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            together = ("--coordinator", f"127.0.0.1:{free.getsockname()[1]}", "--processes", 2, "--process")
        return [
            self.start(*arguments, *together, 0, devices=devices),
            self.start(*arguments, *second, *together, 1, devices=devices, before=before),
        ]


def finish(*processes: subprocess.Popen) -> list[str]:
    """What `processes` printed, when all have ended well."""
    outputs = [process.communicate(timeout=SECONDS)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    return outputs


def wait_for(process: subprocess.Popen, found) -> None:
    deadline = time.monotonic() + SECONDS
    while not found():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.005)


def last_checkpoint(run: Path) -> dict:
    """The carry after the last epoch as NumPy arrays, whatever devices it was written from."""
    handlers = {"carry": ocp.PyTreeCheckpointHandler(), "history": ocp.JsonCheckpointHandler()}
    with ocp.CheckpointManager(run / "checkpoints", item_handlers=handlers) as manager:
        assert manager.latest_step() == 4
        tree = manager.item_metadata(4)["carry"].tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return manager.restore(4, args=ocp.args.Composite(carry=ocp.args.PyTreeRestore(restore_args=as_numpy)))["carry"]


def metrics(run: Path) -> list[dict]:
    """The rows of metrics.csv without the columns that depend on the clock."""
    with (run / "metrics.csv").open() as file:
        return [{name: row[name] for name in row if "second" not in name} for row in csv.DictReader(file)]
