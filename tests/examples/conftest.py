"""What makes the tests of the example quick, and a run of it that they compare others with."""

import fcntl
import os

import model
import program
import pytest


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """The folder of a run of one process with two devices, and what it printed."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base  # all workers of pytest-xdist see it
    run, printed = shared / "undisturbed", shared / "undisturbed.txt"
    with (shared / "undisturbed.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one worker makes it, another waits
        if not printed.exists():
            with program.Worker(devices=2) as worker:
                printed.write_text(worker.finish("--run", run, "--recalibrate"))
    return run, printed.read_text()


@pytest.fixture(scope="module")
def small():
    """Networks are a stem and one block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "blocks", lambda depth, width=16: [("block", width, 4 * width, 2)])
        yield
