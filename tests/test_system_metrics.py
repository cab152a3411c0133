"""Figures of the machine come while a training runs, and hold up nothing."""

import threading
import time
from typing import Any

import pytest

from tests.conftest import lines_of, open_run
from utils.tracking import run as tracking_run
from utils.tracking.run import SystemMetrics, sample_system


def test_a_sample_system() -> None:
    values = sample_system()
    assert 0 <= values["cpu_utilization_percentage"] <= 100
    assert 0 < values["process_memory_usage_megabytes"] < values["system_memory_usage_megabytes"]
    assert all(isinstance(value, float | int) for value in values.values())


def test_samples_until_it_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking_run, "SYSTEM_SECONDS", 0.01)
    taken, several = [], threading.Event()

    def log(values: dict[str, float]) -> None:
        taken.append(values)
        if len(taken) == 3:
            several.set()

    metrics = SystemMetrics(log)
    assert several.wait(20)
    metrics.close()
    count = len(taken)
    time.sleep(0.05)
    assert len(taken) == count


def test_closing_does_not_wait_for_the_next_sample_system() -> None:
    metrics = SystemMetrics(lambda values: None)
    started = time.monotonic()
    metrics.close()
    assert time.monotonic() - started < 2


def test_a_training_logs_them(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking_run, "SYSTEM_SECONDS", 0.01)
    with open_run() as run:
        deadline = time.monotonic() + 20
        while not (run.output_dir / "metrics.jsonl").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert "system/cpu_utilization_percentage" in lines_of(run)[0]
    assert "system/cpu_utilization_percentage" in store.get_run(run.run_id).data.metrics
