"""What the benchmark that keeps records makes of finished runs, and what it refuses."""

import json

import pytest
import record
import report


@pytest.fixture
def runs(tmp_path):
    """Two finished runs of two epochs of 25 steps."""
    folders = []
    for seed, accuracy in enumerate((0.941, 0.945)):
        run = tmp_path / str(seed)
        run.mkdir()
        (run / "config.json").write_text(
            json.dumps({"config": {"train_images": None, "batch": 2000}, "dataset": "CIFAR-10 (MD5 of all 0)"})
        )
        rows = [{**dict.fromkeys(report.COLUMNS), "epoch": epoch, "seconds": 60.5} for epoch in (1, 2)]
        rows[1]["test_accuracy"] = accuracy
        report.write_metrics(run / "metrics.csv", rows)
        row = f"| {accuracy:.2%} | a network on CIFAR-10 | 2 epochs, seed {seed} | 2:01 | a machine | jax 1, Python 3 |"
        (run / "log.txt").write_text(f"a network; 272,474 params; results in {run}\n{row}\n")
        folders.append(run)
    return folders


def test_a_record_says_what_was_done_and_found(runs):
    config = record.Config("fast", seeds=(0, 1), target=0.942, note="A note.")
    text = record.text(config, ["--network", "airbench", "--data", "/some/where"], runs, "abc1234")
    assert "A note." in text and "**94.30 %** of the test images of CIFAR-10 (MD5 of all 0), median of 2 seeds" in text
    assert "| 0 | 94.10 % | 2:01 | not |" in text and "| 1 | 94.50 % | 2:01 | epoch 2 of 2, step 50 |" in text
    assert "--name fast --seeds 0 1 --target 0.942 -- --network airbench --data FOLDER`" in text
    assert "- commit: abc1234" in text and text.count("results in FOLDER") == 2 and "jax " in text


def test_the_table_has_the_best_first(runs, tmp_path):
    for name, seeds in {"one": (0,), "two": (1,), "both": (0, 1)}.items():
        config = record.Config(name, seeds=seeds)
        (tmp_path / f"2000-01-01-{name}.md").write_text(record.text(config, [], [runs[seed] for seed in seeds], "abc"))
    (tmp_path / "index.md").write_text("No record.")
    head, line, *rows = record.table(tmp_path)
    assert line.count("---") == head.count(" | ") + 1
    assert [row.split(" | ")[3] for row in rows] == ["94.50 %", "94.30 %", "94.10 %"]
    first = "| [2000-01-01-two](2000-01-01-two.md) | a network, 2 epochs | 272,474 | 94.50 % | 1 | 2:01 | "
    assert rows[0] == first + "a machine | jax 1, Python 3 |"


def test_the_page_has_the_table():
    page = (record.Config.folder / "index.md").read_text()
    assert "\n".join(record.table(record.Config.folder)) in page  # as `python benchmarks/record.py` prints it


def test_a_record_is_never_written_again(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(record, "committed", lambda: "abc1234")
    config = record.Config("fast", seeds=(0, 1), runs=tmp_path, folder=tmp_path / "records")
    (tmp_path / "fast").mkdir()
    for run in runs:
        run.rename(tmp_path / "fast" / run.name)
    record.main(config, [])
    (path,) = config.folder.iterdir()
    assert path.name.endswith("-fast.md")
    with pytest.raises(SystemExit, match="never written again"):
        record.main(config, [])


def test_a_run_is_all_of_one_commit(tmp_path):
    run = tmp_path / "new"
    record.belongs_to(run, "abc1234")
    record.belongs_to(run, "abc1234")
    with pytest.raises(SystemExit, match="is of commit abc1234, and this is def5678"):
        record.belongs_to(run, "def5678")


def test_what_is_not_committed_makes_no_record(monkeypatch):
    answers = {"status": " M jbn/_fold.py", "rev-parse": "abc1234"}
    monkeypatch.setattr(
        record.subprocess, "run", lambda words, **_: record.subprocess.CompletedProcess(words, 0, answers[words[1]])
    )
    with pytest.raises(SystemExit, match=r"commit it first:\nM jbn/_fold.py"):
        record.committed()
    answers["status"] = ""
    assert record.committed() == "abc1234"
