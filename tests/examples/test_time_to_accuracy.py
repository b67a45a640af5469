"""What the benchmark of the time to an accuracy reads from a run's metrics."""

import report
import time_to_accuracy


def row(epoch, accuracy):
    return {**dict.fromkeys(report.COLUMNS), "epoch": epoch, "seconds": 2.5, "test_accuracy": accuracy}


def test_the_first_epoch_that_reaches_it_counts(tmp_path):
    report.write_metrics(tmp_path / "metrics.csv", [row(1, 0.5), row(2, None), row(3, 0.94), row(4, 0.96)])
    assert time_to_accuracy.seconds_until(0.94, tmp_path / "metrics.csv") == (7.5, 3)
    assert time_to_accuracy.seconds_until(0.97, tmp_path / "metrics.csv") is None
