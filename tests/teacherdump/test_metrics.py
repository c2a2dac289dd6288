"""Figures for Prometheus, asked for over HTTP while a run is under way."""

import socket
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from storage.errors import PathError
from storage.records import QuarantineEntry, Seal
from teacherdump import dump as dump_module
from teacherdump.config import DumpConfig
from teacherdump.metrics import Metrics
from teacherdump.report import ShardReport
from teacherdump.run import run
from teacherdump.stages import Queues

Build = Callable[..., DumpConfig]


def figures_at(address: str) -> dict[str, float]:
    with urllib.request.urlopen(address, timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return {name: float(value) for line in lines if line[0] != "#" for name, _, value in [line.rpartition(" ")]}


def report(shard: int, seconds_teacher: float = 1.0, worker: str = "local") -> ShardReport:
    refused = (QuarantineEntry(shard * 10, "key", "reason"),)
    seal = Seal(shard, shard * 10, shard * 10 + 10, "", {}, {}, refused)
    return ShardReport(seal, 500, 2.0, seconds_teacher, 0.5, 1.5, worker)


def test_a_run_gives_its_figures_while_it_is_under_way(
    config: Build, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said: list[str] = []
    found: list[dict[str, float]] = []
    write = dump_module.write_shard

    def ask(*args: Any) -> Any:
        found.append(figures_at(next(text for text in said if text.startswith("metrics")).split(" ", 1)[1]))
        return write(*args)

    monkeypatch.setattr(dump_module, "write_shard", ask)
    run(config(metrics_port=0), said.append)
    assert said[0].startswith("metrics: http://127.0.0.1:")
    assert [figures["logitstore_dump_rows_total"] for figures in found] == [32.0 * shard for shard in range(7)]
    assert [figures["logitstore_dump_rows_left"] for figures in found] == [200 - 32.0 * shard for shard in range(7)]
    last = found[-1]
    assert last["logitstore_dump_shards_total"] == 6
    assert last["logitstore_dump_bytes_total"] > 0
    assert last["logitstore_dump_refused_rows_total"] == 0
    assert 0 < last["logitstore_dump_device_busy_share"] <= 1
    assert last["logitstore_dump_shards_in_flight"] >= 1
    for stage in ("read", "teacher", "write"):
        assert last[f'logitstore_dump_stage_seconds_total{{stage="{stage}"}}'] > 0
    assert {"logitstore_dump_read_ahead_batches", "logitstore_dump_write_behind_shards"} <= set(last)
    with pytest.raises(OSError, match="refused"):
        figures_at(said[0].split(" ", 1)[1])  # it ends with the run


def test_rows_without_targets_are_counted() -> None:
    with Metrics(0, "127.0.0.1", 30, Queues(), lambda: 4) as metrics:
        for shard in range(2):
            metrics.add(report(shard))
        found = figures_at(metrics.address)
    assert (found["logitstore_dump_rows_total"], found["logitstore_dump_refused_rows_total"]) == (20, 2)
    assert (found["logitstore_dump_bytes_total"], found["logitstore_dump_rows_left"]) == (1000, 10)
    assert found["logitstore_dump_shards_in_flight"] == 4


def test_the_busy_share_is_the_mean_of_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("teacherdump.metrics.time.perf_counter", lambda: now[0])
    with Metrics(0, "127.0.0.1", 30, Queues(), lambda: 0) as metrics:
        assert metrics.busy_share() == 0
        for shard in range(2):
            now[0] += 1.0
            metrics.add(report(shard, 1.0, worker=f"worker-{shard}"))
        assert metrics.busy_share() == pytest.approx(2.0 / 2.0 / 2)
        for shard in range(2, 12):
            now[0] += 2.0
            metrics.add(report(shard, 1.0, worker="worker-0"))
        assert metrics.busy_share() == pytest.approx(0.5)


def test_a_port_that_is_taken_is_refused_before_anything_is_written(config: Build, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(PathError, match=rf"metrics: expected a port that is free, got 127.0.0.1:{port}: .*in use"):
            run(config(metrics_port=port))
    assert not (tmp_path / "out.zarr").exists()


def test_without_the_library_one_line_says_what_to_install(config: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(PathError, match=r"metrics: expected prometheus-client, got none; .*'logitstore\[metrics\]'"):
        run(config(metrics_port=0))


def test_a_host_without_a_port_and_ports_that_can_not_be_are_refused(config: Build) -> None:
    with pytest.raises(
        ValueError, match=r"metrics_host: expected metrics_port beside it, got '0\.0\.0\.0' alone; give"
    ):
        config(metrics_host="0.0.0.0")
    with pytest.raises(ValueError, match="metrics_port: expected 0 to 65535, got 65536"):
        config(metrics_port=65536)
