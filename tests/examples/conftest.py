"""One undisturbed run of the CIFAR-10 program, which the tests compare other runs with."""

import fcntl
import os

import program
import pytest


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """A folder that all workers of pytest-xdist see."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def launcher(shared):
    return program.Launcher(shared)


@pytest.fixture(scope="session")
def undisturbed(launcher, shared):
    """The folder of a run of one process with two devices, and what it printed."""
    run, printed = shared / "undisturbed", shared / "undisturbed.txt"
    with (shared / "undisturbed.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one worker makes it, another waits
        if not printed.exists():
            printed.write_text(program.finish(launcher.start("--run", run, "--recalibrate"))[0])
    return run, printed.read_text()
