"""The CIFAR-10 program in processes of its own: started, waited for, and what they leave.

A process runs one command after the other, each in a module of its own: much of a command's time is Python's start.
"""

import ast
import csv
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))  # where pytest looks already

import compiling
import jax
import numpy as np
import orbax.checkpoint as ocp
import processes

PROGRAM = Path(__file__).parents[2] / "examples" / "cifar10" / "train.py"
SETTINGS = {"depth": 8, "width": 4, "epochs": 4, "batch": 32, "train-images": 192, "peak-rate": 0.02, "ema": 0.9}
SMALL = [word for name, value in (SETTINGS | {"evaluate-every": 4}).items() for word in (f"--{name}", value)]
AIRBENCH = ["--width", 2, "--batch", 32, "--train-images", 128]
SECONDS = 300  # no wait in these tests is longer
END = "\0"  # stands before the exit status of a command


class Worker:
    """A process with that many devices and without network."""

    def __init__(self, devices: int, **variables: str):
        environment = os.environ | variables | compiling.environment(devices)
        environment |= {"https_proxy": "http://127.0.0.1:1", "no_proxy": "127.0.0.1"}
        self.output, self.seen = tempfile.TemporaryFile(), 0  # noqa: SIM115
        streams = {"stdin": subprocess.PIPE, "stdout": self.output, "stderr": subprocess.STDOUT}
        self.process = subprocess.Popen([sys.executable, "-u", __file__], env=environment, text=True, **streams)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()
        self.output.close()

    def start(self, *arguments, replaced=()) -> None:
        """Start a command; until it ends, the names of pairs in `replaced` have other values."""
        if "--run" in arguments:  # with --resume, the settings are there
            run = Path(arguments[arguments.index("--run") + 1])
            small = AIRBENCH if "accelerator" in arguments else SMALL
            arguments = (*small, "--cache", run.parent / "no-cifar", *arguments)
        self.process.stdin.write(f"{([*map(str, arguments)], replaced)}\n")
        self.process.stdin.flush()

    def printed(self) -> str:
        return os.pread(
            self.output.fileno(), 1 << 20, self.seen
        ).decode()  # the process goes on where it is in the file

    def ended(self) -> tuple[int, str]:
        """Exit status and output of the command, or of the process, when it has ended."""
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            died, printed = self.process.poll(), self.printed()
            output, _, status = printed.partition(END)
            if status.endswith("\n"):
                self.seen += len(printed.encode())
                return int(status), output
            if died is not None:
                return died, output
            time.sleep(0.02)
        raise TimeoutError(self.printed())

    def finish(self, *arguments) -> str:
        """What a command that ends well prints."""
        self.start(*arguments)
        status, output = self.ended()
        assert status == 0, output
        return output

    def wait_for(self, found: Callable[[], bool]) -> None:
        deadline = time.monotonic() + SECONDS
        while not found():
            assert self.process.poll() is None and END not in self.printed(), self.printed()
            assert time.monotonic() < deadline, self.printed()
            time.sleep(0.005)


class Pair(ExitStack):
    """Two processes of one device that train together, with these environment variables."""

    def __init__(self, **variables: str):
        super().__init__()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.together = ("--coordinator", f"127.0.0.1:{free.getsockname()[1]}", "--processes", 2, "--process")
        self.both = self.first, self.second = [self.enter_context(Worker(1, **variables)) for _ in range(2)]

    def start(self, *arguments, second=(), replaced=()) -> None:
        """Start a command in both; `second` and `replaced` are for the second one alone."""
        self.first.start(*arguments, *self.together, 0)
        self.second.start(*arguments, *second, *self.together, 1, replaced=replaced)

    def ended(self) -> list[tuple[int, str]]:
        return [worker.ended() for worker in self.both]

    def finish(self, *arguments) -> list[str]:
        self.start(*arguments)
        (first, output), (second, other) = self.ended()
        assert first == second == 0, output + other
        return [output, other]


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


def serve() -> None:
    """Run the commands that `Worker.start` writes, with few images and a network of one block."""
    sys.path.insert(0, str(PROGRAM.parent))
    import checkpoints
    import cluster
    import data
    import model

    if jax.config.jax_share_binary_between_hosts:
        processes.take_programs()
    save = checkpoints.Checkpoints.save

    def save_slowly(self, carry, history):
        save(self, carry, history)
        time.sleep(len(history) % 2 == 0)  # a second behind every other, for what tests do to the process

    checkpoints.Checkpoints.save = save_slowly
    data.embedded.__defaults__ = (256, 128, 0)  # to draw, and to evaluate on
    model.blocks = lambda depth, width=16: [("block", width, 4 * width, 2)]
    for line in sys.stdin:
        arguments, replaced = ast.literal_eval(line)
        sys.argv = [str(PROGRAM), *arguments]
        status = 0
        with ExitStack() as stack:
            for name, value in replaced:
                stack.enter_context(mock.patch(name, value))
            try:
                runpy.run_path(str(PROGRAM), run_name="__main__")
            except SystemExit as end:
                status = end.code
                if isinstance(status, str):
                    status = print(status) or 1  # as Python does
            except BaseException:
                traceback.print_exc()
                status = 1
        if jax.distributed.is_initialized():
            cluster.join = lambda _: None  # these two have met
        print(f"{END}{status}")


if __name__ == "__main__":
    serve()
