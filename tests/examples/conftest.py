"""One undisturbed run of the CIFAR-10 program, which the tests compare other runs with."""

import program
import pytest


@pytest.fixture(scope="session")
def launcher(tmp_path_factory):
    return program.Launcher(tmp_path_factory.mktemp("launcher"))


@pytest.fixture(scope="session")
def undisturbed(launcher, tmp_path_factory):
    """The folder of a run of one process with two devices, and what it printed."""
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    return run, program.finish(launcher.start("--run", run, "--recalibrate"))[0]
