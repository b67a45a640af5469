"""The CIFAR-10 program as a user runs it: killed, interrupted, resumed, refused."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

PROGRAM = Path(__file__).parents[2] / "examples" / "cifar10" / "train.py"
SMALL = ["--depth", "8", "--epochs", "4", "--batch", "64", "--train-images", "384"]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """One device, no network, and a cache of compiled programs that the runs share."""
    cache = tmp_path_factory.mktemp("compiled")
    return os.environ | {"XLA_FLAGS": "", "JAX_COMPILATION_CACHE_DIR": str(cache), "https_proxy": "http://127.0.0.1:1"}


@pytest.fixture(scope="module")
def start(environment, tmp_path_factory):
    cache = tmp_path_factory.mktemp("no-cifar")

    def start(*arguments) -> subprocess.Popen:
        command = [sys.executable, str(PROGRAM), *map(str, arguments)]
        if "--resume" not in arguments:
            command += ["--cache", str(cache), *SMALL]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return start


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def wait_for(process, found) -> None:
    deadline = time.monotonic() + 300
    while not found():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.005)


@pytest.fixture(scope="module")
def undisturbed(start, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    return run, finish(start("--run", run))


def last_checkpoint(run: Path) -> dict:
    with ocp.CheckpointManager(run / "checkpoints") as manager:
        assert manager.latest_step() == 4
        return manager.restore(4, args=ocp.args.Composite(carry=ocp.args.StandardRestore()))["carry"]


def metrics(run: Path) -> list[dict]:
    """The rows of metrics.csv without the columns that depend on the clock."""
    with (run / "metrics.csv").open() as file:
        return [{name: row[name] for name in row if "second" not in name} for row in csv.DictReader(file)]


def test_a_run_leaves_what_it_promises(undisturbed):
    run, output = undisturbed
    assert "cannot be downloaded" in output and "embedded shapes" in output and "test accuracy" in output
    saved = json.loads((run / "config.json").read_text())
    assert saved["config"]["depth"] == 8 and saved["dataset"].startswith("embedded shapes")
    rows = metrics(run)
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"]
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_killed_while_writing_and_interrupted_it_ends_as_if_nothing_had_been(start, undisturbed, tmp_path):
    run = tmp_path / "run"
    checkpoints = run / "checkpoints"
    process = start("--run", run)
    wait_for(process, lambda: checkpoints.is_dir() and any(checkpoints.iterdir()))  # the first one is being written
    process.send_signal(signal.SIGKILL)
    process.communicate()

    process = start("--resume", run)
    wait_for(process, lambda: (checkpoints / "2").is_dir())
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate()
    assert process.returncode == 130, output
    (epoch,) = re.findall(rf"The last checkpoint is of epoch ([23]); go on with --resume {run}", output)

    output = finish(start("--resume", run))
    assert f"Going on after epoch {epoch}." in output
    whole, resumed = last_checkpoint(undisturbed[0]), last_checkpoint(run)
    assert jax.tree.structure(whole) == jax.tree.structure(resumed)
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)
    assert metrics(run) == metrics(undisturbed[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume", "RUN", "--epochs", "5"], "resume takes epochs from .*: it is 4, and 5 was given"),
        (["--resume", "NOWHERE"], "config.json is missing"),
        (["--run", "RUN"], "holds a run already"),
        (["--data", "NOWHERE", "--run", "NEW"], "data_batch_1.bin is missing"),
        (["--epochs", "0", "--run", "NEW"], "epochs is 0; expected at least 1"),
    ],
)
def test_refusals_say_what_to_do(environment, undisturbed, tmp_path, arguments, message):
    places = {"RUN": str(undisturbed[0]), "NOWHERE": str(tmp_path / "nowhere"), "NEW": str(tmp_path / "new")}
    command = [sys.executable, str(PROGRAM), *(places.get(word, word) for word in arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert re.search(message, done.stderr), done.stderr
