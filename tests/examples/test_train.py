"""The CIFAR-10 program as a user runs it: killed, interrupted, resumed, refused."""

import json
import re
import signal
import sys

import jax
import numpy as np
import pytest
import train
from program import Worker, last_checkpoint, metrics


def test_a_run_leaves_what_it_promises(undisturbed):
    run, output = undisturbed
    assert "cannot be downloaded" in output and "embedded shapes" in output
    for statistics in ("running", "recalibrated"):
        assert re.search(rf"averaged params \(0.9\), {statistics} statistics: test accuracy \d+\.\d\d%", output), output
    saved = json.loads((run / "config.json").read_text())
    assert saved["config"]["depth"] == 8 and saved["dataset"].startswith("embedded shapes")
    rows = metrics(run)
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"]
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    cells = output.strip().splitlines()[-1].strip("| ").split(" | ")
    wanted = (
        r"\d+\.\d\d%",
        "ResNet-8, 4 wide, on embedded .*",
        "4 epochs, seed 0",
        r"\d+:\d\d",
        r".*, \d+ cores",
        "jax .*",
    )
    assert all(re.fullmatch(*pair) for pair in zip(wanted, cells, strict=True)), cells
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def worker():
    with Worker(devices=2) as worker:
        yield worker


def test_killed_while_writing_and_interrupted_it_ends_as_if_nothing_had_been(worker, undisturbed, tmp_path):
    run = tmp_path / "run"
    checkpoints = run / "checkpoints"
    with Worker(devices=2) as killed:
        killed.start("--run", run)
        killed.wait_for(lambda: checkpoints.is_dir() and any(checkpoints.iterdir()))  # the first one is being written

    worker.start("--resume", run)
    worker.wait_for((checkpoints / "2").is_dir)
    worker.process.send_signal(signal.SIGINT)
    status, output = worker.ended()
    assert status == 130, output
    (epoch,) = re.findall(rf"The last checkpoint is of epoch ([23]); go on with --resume {run}", output)

    assert f"Going on after epoch {epoch}." in worker.finish("--resume", run)
    whole, resumed = last_checkpoint(undisturbed[0]), last_checkpoint(run)
    assert jax.tree.structure(whole) == jax.tree.structure(resumed)
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)
    assert metrics(run) == metrics(undisturbed[0])


def test_drift_of_a_run_that_has_ended(worker, undisturbed):
    """A table with all layers, the one that is worst on the training images first; nothing else of the run changes."""
    run, _ = undisturbed
    before = last_checkpoint(run)
    output = worker.finish("--resume", run, "--drift")
    number = r"[+-]?\d+\.\d\d"
    rows = re.findall(rf"│ (\S+) +│ +({number}) +│ +{number} │ +{number} │ +({number}) ", output)
    assert {layer for layer, *_ in rows} == {"stem", *(f"block/{part}" for part in ("conv1", "conv2", "shortcut"))}
    errors = [float(error) for _, error, _ in rows]
    assert errors == sorted(errors, reverse=True) and errors[0] > 0.05  # few steps, and averaged params
    jax.tree.map(np.testing.assert_array_equal, last_checkpoint(run), before)


def test_what_is_for_accelerators(worker, tmp_path):
    """Four steps an epoch in calls of two, as three do not divide them; the trace is of what calls there are left."""
    run, folder = tmp_path / "run", tmp_path / "trace"
    small = ["--epochs", "2", "--steps-per-call", "3"]
    arguments = ["--preset", "accelerator", "--remat", "--profile", folder, "--run", run, *small]
    output = worker.finish(*arguments)
    assert "airbench, 2 wide, on embedded shapes" in output and f"A trace of 2 calls is in {folder}" in output
    assert list(folder.rglob("*.xplane.pb"))
    saved = json.loads((run / "config.json").read_text())["config"]
    assert saved["preset"] == "accelerator" and saved["views"] == 6 and saved["width"] == 2
    assert all(np.isfinite(float(metrics(run)[-1][name])) for name in ("train_loss", "test_loss"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume", "RUN", "--epochs", "5"], "resume takes epochs from .*: it is 4, and 5 was given"),
        (["--resume", "NOWHERE"], "config.json is missing"),
        (["--run", "RUN"], "holds a run already"),
        (["--data", "NOWHERE", "--run", "NEW"], "is not all of CIFAR-10: data_batch_1.bin, .* missing"),
        (["--batch", "0", "--run", "NEW"], "batch is 0; expected at least 1"),
        (["--ema", "1", "--run", "NEW"], r"ema is 1.0; expected a decay in \[0, 1\)"),
        (["--process", "1", "--run", "NEW"], "--coordinator, --processes and --process go together"),
        (
            ["--coordinator", "here:1", "--processes", "2", "--process", "2", "--run", "NEW"],
            "processes that count from 0",
        ),
        (["--distributed", "--process", "1", "--run", "NEW"], "leave --coordinator and its numbers out"),
    ],
)
def test_refusals_say_what_to_do(undisturbed, tmp_path, monkeypatch, arguments, message):
    places = {"RUN": str(undisturbed[0]), "NOWHERE": str(tmp_path / "nowhere"), "NEW": str(tmp_path / "new")}
    monkeypatch.setattr(sys, "argv", ["train.py", *(places.get(word, word) for word in arguments)])
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # Ctrl-C stays that of the tests
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        train.main()
    assert not (tmp_path / "new").exists()
