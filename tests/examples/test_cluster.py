"""The CIFAR-10 program in two processes: one result, no process left waiting, one configuration.

All tests but the one that kills a process share one pair; the last one ends it.
"""

import shutil
import signal
import time
from functools import partial

import jax
import numpy as np
import pytest
from processes import sharing_programs
from program import Pair, Worker, last_checkpoint, metrics

# Up to twelve steps on other devices: what rounding differs by at the start, about 1e-7, training makes more of.
ON_OTHER_DEVICES = 1e-2


@pytest.fixture(scope="module")
def variables(tmp_path_factory):
    return sharing_programs(tmp_path_factory.mktemp("programs"))


@pytest.fixture(scope="module")
def pair(variables):
    with Pair(**variables) as pair:
        yield pair


@pytest.fixture(scope="module")
def together(pair, tmp_path_factory):
    """The folder of an undisturbed run of the two."""
    run = tmp_path_factory.mktemp("runs") / "together"
    first, second = pair.finish("--run", run, "--recalibrate")
    assert "recalibrated statistics: test accuracy" in first and "accuracy" not in second
    return run


@pytest.mark.parametrize(
    ("second", "replaced", "message"),
    [
        (["--peak-rate", "0.2"], [], "process 0 has peak_rate 0.02 and process 1 has 0.2; start all alike"),
        ([], [("data.embedded.__defaults__", (256, 128, 1))], "process 1 has embedded shapes (seed 1"),
        ([], [("jax.__version__", "0.0.1")], "and process 1 has 0.0.1; start all alike"),
        (["--data", "/nowhere"], [], "process 1: /nowhere is not all of CIFAR-10: data_batch_1.bin"),
    ],
    ids=["configuration", "data", "jax", "no data"],
)
def test_processes_that_differ_are_refused(pair, tmp_path, second, replaced, message):
    pair.start("--run", tmp_path / "run", second=second, replaced=replaced)
    for status, output in pair.ended():
        assert status == 1 and message in output, output
    assert not (tmp_path / "run").exists()


def assert_same_training(run, other, tolerance):
    for ours, theirs in zip(metrics(run), metrics(other), strict=True):
        np.testing.assert_allclose(float(ours["train_loss"]), float(theirs["train_loss"]), rtol=tolerance)
    close = partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance)
    jax.tree.map(close, last_checkpoint(run), last_checkpoint(other))


def test_two_processes_train_as_one(together, undisturbed):
    """24 steps; as many devices share each batch in the one as in the two, so little but the order of sums differs."""
    assert_same_training(together, undisturbed[0], 1e-5)


def lost(worker, signal_to_other, other, within):
    """Exit status and output of a process that has lost the other one."""
    other.process.send_signal(signal_to_other)
    since = time.monotonic()
    status, output = worker.ended()
    print(f"The other process ended {time.monotonic() - since:.1f} s later.")
    assert time.monotonic() - since < within and worker.process.poll() is not None
    return status, output


def test_a_killed_process_ends_the_other_and_the_run_goes_on(pair, variables, together, tmp_path):
    """On as many devices bit for bit, and in one process with more of them."""
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    with Pair(**variables) as killed:
        killed.start("--run", run, "--recalibrate")
        killed.first.wait_for((run / "checkpoints" / "2").is_dir)
        status, output = lost(killed.first, signal.SIGKILL, killed.second, within=30)
    assert status == 1 and "another process is lost" in output and f"--resume {run}" in output, output
    shutil.copytree(run, elsewhere)

    assert "Going on after epoch" in pair.finish("--resume", run)[0]
    jax.tree.map(np.testing.assert_array_equal, last_checkpoint(run), last_checkpoint(together))

    with Worker(devices=4) as worker:
        output = worker.finish("--resume", elsewhere)
    assert "Going on after epoch" in output
    assert "recalibrated statistics: test accuracy" in output  # which was asked for at the start
    assert_same_training(elsewhere, together, ON_OTHER_DEVICES)


def test_two_go_on_with_a_run_of_one_and_one_that_hangs_ends_the_other(pair, undisturbed, tmp_path):
    """It hangs behind the last checkpoint, and the other one goes on to evaluate."""
    run = tmp_path / "run"
    shutil.copytree(undisturbed[0], run)
    shutil.rmtree(run / "checkpoints" / "4")
    pair.start("--resume", run)
    pair.first.wait_for((run / "checkpoints" / "4").is_dir)
    # The heartbeat's 20 s, and as much for the news to get around.
    status, output = lost(pair.first, signal.SIGSTOP, pair.second, within=90)
    # JAX ends the process, or what waits for the other raises first and the program says how to go on.
    by_program = f"training cannot go on without it. Start all again with --resume {run}"
    said = by_program if status == 1 else "another task died"
    assert status != 0 and said in output, output
    assert "Going on after epoch 3" in output
    assert_same_training(run, undisturbed[0], ON_OTHER_DEVICES)
