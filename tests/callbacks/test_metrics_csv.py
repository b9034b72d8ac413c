"""metrics.csv: one row per step, continued by a resumed run."""

import csv
from pathlib import Path

from rlhf_lightning.callbacks import MetricsCSV


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_what_is_logged_at_a_step_shares_its_row(tmp_path):
    logger = MetricsCSV(tmp_path)
    logger.log_metrics({"loss": 1.0}, step=0)
    logger.log_metrics({"lr": 0.1}, step=0)
    logger.log_metrics({"loss": 2.0}, step=1)
    logger.log_metrics({"loss": 3.0}, step=1)  # the same metric twice: nothing is overwritten
    logger.save()
    assert [(r["step"], r["loss"], r["lr"]) for r in rows(tmp_path)] == [
        ("0", "1.0", "0.1"),
        ("1", "2.0", ""),
        ("1", "3.0", ""),
    ]


def test_rows_that_are_flushed_are_whole(tmp_path):
    logger = MetricsCSV(tmp_path, flush_every_n_steps=2)
    for step in range(5):
        logger.log_metrics({"lr": 0.1}, step)
        logger.log_metrics({"loss": float(step)}, step)
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 1 + 4  # on disk before the end
    logger.save()
    assert [(r["step"], r["loss"]) for r in rows(tmp_path)] == [(str(n), str(float(n))) for n in range(5)]


def test_a_second_logger_goes_on_and_may_bring_new_columns(tmp_path):
    first = MetricsCSV(tmp_path)
    for step in range(4):
        first.log_metrics({"loss": float(step)}, step=step)
    first.save()
    second = MetricsCSV(tmp_path)
    second.forget_from(2)  # resumed from a checkpoint after two steps
    second.log_metrics({"loss": 20.0, "new": 1.0}, step=2)
    second.save()
    assert [(r["step"], r["loss"], r["new"]) for r in rows(tmp_path)] == [
        ("0", "0.0", ""),
        ("1", "1.0", ""),
        ("2", "20.0", "1.0"),
    ]


def test_a_row_that_was_cut_off_is_dropped_before_others_follow(tmp_path):
    first = MetricsCSV(tmp_path)
    for step in range(3):
        first.log_metrics({"loss": float(step)}, step=step)
    first.save()
    path = tmp_path / "metrics.csv"
    path.write_bytes(path.read_bytes()[:-3])  # killed while writing
    second = MetricsCSV(tmp_path)
    second.forget_from(2)
    second.log_metrics({"loss": 20.0}, step=2)
    second.save()
    assert [(r["step"], r["loss"]) for r in rows(tmp_path)] == [("0", "0.0"), ("1", "1.0"), ("2", "20.0")]


def test_earlier_steps_can_be_written_while_one_is_still_growing(tmp_path):
    logger = MetricsCSV(tmp_path)
    for step in range(3):
        logger.log_metrics({"lr": 0.1}, step=step)
        if step < 2:
            logger.log_metrics({"loss": float(step)}, step=step)
    logger.save_before(2)
    assert [(r["step"], r["loss"]) for r in rows(tmp_path)] == [("0", "0.0"), ("1", "1.0")]
    logger.log_metrics({"loss": 2.0}, step=2)
    logger.save()
    assert [(r["step"], r["loss"], r["lr"]) for r in rows(tmp_path)][2:] == [("2", "2.0", "0.1")]
