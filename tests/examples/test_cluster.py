"""The CIFAR-10 program in two processes: one result, no process left waiting, one configuration."""

import shutil
import signal
import time
from functools import partial

import jax
import numpy as np
import pytest
from program import SECONDS, finish, last_checkpoint, metrics, wait_for


@pytest.fixture(scope="module")
def together(launcher, tmp_path_factory):
    """The folder of an undisturbed run of two processes with one device each."""
    run = tmp_path_factory.mktemp("runs") / "together"
    outputs = finish(*launcher.start_two("--run", run))
    assert "test accuracy" in outputs[0] and "accuracy" not in outputs[1]
    return run


def assert_same_training(run, other, tolerance):
    for ours, theirs in zip(metrics(run), metrics(other), strict=True):
        np.testing.assert_allclose(float(ours["train_loss"]), float(theirs["train_loss"]), rtol=tolerance)
    close = partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance)
    jax.tree.map(close, last_checkpoint(run), last_checkpoint(other))


def test_two_processes_train_as_one(together, undisturbed):
    """24 steps; as many devices share each batch in the one as in the two, so little but the order of sums differs."""
    assert_same_training(together, undisturbed[0], 1e-5)


def test_a_killed_process_ends_the_other_and_the_run_goes_on(launcher, together, tmp_path):
    run = tmp_path / "run"
    first, second = launcher.start_two("--run", run)
    wait_for(first, lambda: (run / "checkpoints" / "2").is_dir())
    second.send_signal(signal.SIGKILL)
    killed = time.monotonic()
    output, _ = first.communicate(timeout=SECONDS)
    print(f"The other process ended {time.monotonic() - killed:.1f} s later.")
    assert time.monotonic() - killed < 30
    second.communicate()
    assert first.returncode == 1
    assert "another process is lost" in output and f"--resume {run}" in output, output

    assert "Going on after epoch" in finish(*launcher.start_two("--resume", run))[0]
    jax.tree.map(np.testing.assert_array_equal, last_checkpoint(run), last_checkpoint(together))


def test_a_process_that_hangs_ends_the_other(launcher, tmp_path):
    run = tmp_path / "run"
    first, second = launcher.start_two("--run", run)
    wait_for(first, lambda: (run / "checkpoints" / "1").is_dir())
    second.send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    output, _ = first.communicate(timeout=SECONDS)
    print(f"The other process ended {time.monotonic() - stopped:.1f} s later.")
    second.kill()
    second.communicate()
    assert time.monotonic() - stopped < 90  # the heartbeat's 20 s, and as much for the news to get around
    # JAX ends the process, or what waits for the other raises first and the program says how to go on.
    by_program = f"training cannot go on without it. Start all again with --resume {run}"
    said = by_program if first.returncode == 1 else "another task died"
    assert first.returncode != 0 and said in output, output


@pytest.mark.parametrize(("processes", "devices"), [(1, 1), (2, 2)])
def test_a_checkpoint_does_not_depend_on_the_layout(launcher, together, undisturbed, tmp_path, processes, devices):
    """A run of two processes is gone on with by one, and a run of one by two with two devices each."""
    source, run = together if processes == 1 else undisturbed[0], tmp_path / "run"
    shutil.copytree(source, run)
    shutil.rmtree(run / "checkpoints" / "4")
    start = launcher.start_two if processes == 2 else lambda *args, **options: [launcher.start(*args, **options)]
    output = finish(*start("--resume", run, devices=devices))[0]
    assert "Going on after epoch 3" in output
    assert ("recalibrated statistics: test accuracy" in output) == (source == undisturbed[0])  # which asks for it
    # Six steps on another number of devices: what rounding differs by at the start, about 1e-7, training makes more of.
    assert_same_training(run, source, 1e-2)


@pytest.mark.parametrize(
    ("second", "before", "message"),
    [
        (["--peak-rate", "0.2"], "", "process 0 has peak_rate 0.02 and process 1 has 0.2; start all alike"),
        ([], "import data\ndata.embedded.__defaults__ = (256, 128, 1)", "process 1 has embedded shapes (seed 1"),
        ([], "import jax\njax.__version__ = '0.0.1'", "and process 1 has 0.0.1; start all alike"),
        (["--data", "/nowhere"], "", "process 1: /nowhere/data_batch_1.bin is missing"),
    ],
    ids=["configuration", "data", "jax", "no data"],
)
def test_processes_that_differ_are_refused(launcher, tmp_path, second, before, message):
    for process in launcher.start_two("--run", tmp_path / "run", second=second, before=before):
        output, _ = process.communicate(timeout=SECONDS)
        assert process.returncode == 1 and message in output, output
    assert not (tmp_path / "run").exists()
