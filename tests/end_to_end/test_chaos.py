"""The network of failures, in short; and that it would notice what it looks for."""

import dataclasses
import http.client
import json
import random
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks.chaos.__main__ import chaos, figures
from benchmarks.chaos.check import problems
from benchmarks.chaos.corpus import Samples, make_samples, write_folder, write_tars
from benchmarks.chaos.faults import AT_THE_PROXY, Tally, proxy_fault
from benchmarks.chaos.processes import Spoken
from benchmarks.chaos.reference import Reference, environment_of, make_reference, read_all
from benchmarks.chaos.rounds import Pace, Round
from benchmarks.chaos.teacher import ARCH, Fragile
from storage.console import progress
from storage.writer import StoreWriter
from teacherdump.config import DumpConfig
from teacherdump.dump import dump_shard
from teacherdump.source import open_source, prepare
from tests.s3 import S3Server

CUT = (OSError, http.client.IncompleteRead)
DIED = "the worker that ran this sample died, 2 times"


@dataclasses.dataclass(frozen=True)
class Whole:
    """An undisturbed run, and what it gave."""

    config: DumpConfig
    reference: Reference
    samples: Samples


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    import torch

    folder = tmp_path_factory.mktemp("whole")
    samples = make_samples(60, 3, 2, random.Random(4))
    write_folder(samples, folder / "images")
    torch.manual_seed(0)
    torch.save(Fragile(0, kills=False).state_dict(), folder / "teacher.pt")
    config = DumpConfig(
        models=(str(folder / "teacher.pt"),),
        data=str(folder / "images"),
        out=str(folder / "out.zarr"),
        arch=ARCH,
        device="cpu",
        batch_size=8,
        shard_rows=20,
    )
    return Whole(config, make_reference(config, samples.kinds, folder / "reference"), samples)


def dumped(whole: Whole, path: Path, without: dict[int, str]) -> str:
    """A finished store in which some rows were left out."""
    config = dataclasses.replace(whole.config, out=str(path))
    with environment_of(CHAOS_SPARE="1"):
        job = prepare(open_source(config), lambda _: None)
    with StoreWriter.open(path, job.manifest) as writer, progress(60, "rows", "dumping", quiet=True) as bar:
        for shard in writer.owed_shards():
            dump_shard(job, writer, shard, bar, without)
        writer.finalize()
    return str(path)


def test_a_store_without_the_deadly_row_alone_holds(whole: Whole, tmp_path: Path) -> None:
    out = dumped(whole, tmp_path / "out.zarr", {whole.reference.deadly_row: DIED})
    keys = {str(path.relative_to(out)) for path in Path(out).rglob("*") if path.is_file()}
    assert problems(out, whole.reference, keys) == []


def test_a_loss_too_much_is_noticed(whole: Whole, tmp_path: Path) -> None:
    innocent = next(row for row in range(60) if row not in whole.reference.refused)
    out = dumped(whole, tmp_path / "out.zarr", {whole.reference.deadly_row: DIED, innocent: DIED})
    text = "\n".join(problems(out, whole.reference))
    assert "expected the content digest" in text
    assert f"expected a target for row {innocent}, got it quarantined: {DIED}" in text
    assert f"got 1 others, such as [{innocent}]" in text


def test_a_loss_without_its_reason_is_noticed(whole: Whole, tmp_path: Path) -> None:
    out = dumped(whole, tmp_path / "out.zarr", {whole.reference.deadly_row: "broken"})
    (problem,) = problems(out, whole.reference)
    assert "expected a reason that tells of 'deadly', got 'broken'" in problem


def test_a_loss_that_nobody_names_is_noticed(whole: Whole, tmp_path: Path) -> None:
    out = dumped(whole, tmp_path / "out.zarr", {})
    text = "\n".join(problems(out, whole.reference))
    assert f"in the quarantine, got none for [{whole.reference.deadly_row}]" in text


def test_damage_and_strangers_and_a_missing_end_are_noticed(whole: Whole, tmp_path: Path) -> None:
    out = Path(dumped(whole, tmp_path / "out.zarr", {whole.reference.deadly_row: DIED}))
    keys = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert "got ['left.partial'] more" in problems(str(out), whole.reference, keys | {"left.partial"})[0]
    values = out / "values" / "c" / "1" / "0"
    shutil.copy(out / "values" / "c" / "0" / "0", values)
    assert any("values" in problem for problem in problems(str(out), whole.reference))
    (out / "final.json").unlink()
    assert problems(str(out), whole.reference) == [f"{out}: expected a finalized store, got one that is not"]
    assert "the store can't be read" in problems(str(tmp_path / "none.zarr"), whole.reference)[0]


def test_the_corpus_has_each_kind_of_loss_in_both_forms(tmp_path: Path, whole: Whole) -> None:
    assert sorted(whole.samples.kinds.values()) == sorted(
        ["deadly", "empty", "not an image", "poison", "poison", "truncated"]
    )
    write_tars(whole.samples, tmp_path / "tars")
    assert [path.name for path in (tmp_path / "tars").iterdir()] == ["train-0000.tar"]
    status = whole.reference.arrays["status"]
    losses = [row for row, kind in whole.reference.refused.items() if kind != "deadly"]
    assert sorted(losses) == np.flatnonzero(status != 0).tolist() or len(losses) == 5
    assert len(read_all(whole.config.out.replace("out.zarr", "reference/spared.zarr"))["status"]) == 60


@pytest.fixture(scope="module")
def proxy(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Spoken]:
    port = int(s3_server.endpoint.rpartition(":")[2])
    spoken = Spoken(
        "benchmarks.chaos.proxy", port, s3_server.process.pid, log=tmp_path_factory.mktemp("proxy") / "proxy.log"
    )
    yield spoken
    spoken.close()


def request(port: int, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
    """Status and body; a connection that breaks raises."""
    asked = urllib.request.Request(f"http://127.0.0.1:{port}/bucket/{path}", body, method=method)
    asked.add_header("Content-Type", "application/octet-stream")
    try:
        with urllib.request.urlopen(asked, timeout=20) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def hits(proxy: Spoken) -> list[tuple[int, int]]:
    """What the proxy reports next."""
    deadline = time.monotonic() + 10
    while not (found := [(value["id"], value["hits"]) for value in proxy.heard()]):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


def arm(proxy: Spoken, number: int, **fault: object) -> None:
    proxy.say({"id": number, **fault})
    time.sleep(0.1)


def test_the_proxy_hands_on_what_nothing_breaks(proxy: Spoken, s3_server: S3Server) -> None:
    body = random.Random(0).randbytes(100_000)
    assert request(proxy.port, "PUT", "plain", body)[0] == 200
    assert request(proxy.port, "GET", "plain") == (200, body)
    assert request(proxy.port, "HEAD", "plain") == (200, b"")
    assert request(proxy.port, "GET", "none")[0] == 404


def test_the_proxy_breaks_as_many_requests_as_it_is_told(proxy: Spoken) -> None:
    request(proxy.port, "PUT", "some", b"x" * 1000)
    arm(proxy, 1, kind="error", status=503, requests=2)
    assert [request(proxy.port, "GET", "some")[0] for _ in range(3)] == [503, 503, 200]
    assert hits(proxy) == [(1, 2)]
    arm(proxy, 2, kind="cut-answer")
    assert request(proxy.port, "PUT", "other", b"y")[0] == 200  # of another kind
    with pytest.raises(CUT):
        request(proxy.port, "GET", "some")
    assert hits(proxy) == [(2, 1)]
    arm(proxy, 3, kind="error", patience_s=0.1)
    assert hits(proxy) == [(3, 0)]
    arm(proxy, 5, kind="error", spare=2)
    arm(proxy, 6, kind="error")
    assert [request(proxy.port, "GET", "some")[0] for _ in range(5)] == [500, 200, 200, 500, 200]
    assert hits(proxy) == [(5, 1), (6, 1)]
    arm(proxy, 4, kind="error")
    proxy.say({"kind": "calm"})
    assert hits(proxy) == [(4, 0)]


def test_the_proxy_loses_requests_on_both_sides_of_the_deed(proxy: Spoken) -> None:
    arm(proxy, 1, kind="cut-request")
    with pytest.raises(CUT):
        request(proxy.port, "PUT", "half", b"z" * 50_000)
    time.sleep(0.1)
    assert request(proxy.port, "GET", "half")[0] == 404
    arm(proxy, 2, kind="lost-answer")
    with pytest.raises(CUT):
        request(proxy.port, "PUT", "done", b"z" * 50_000)
    assert request(proxy.port, "GET", "done") == (200, b"z" * 50_000)
    arm(proxy, 3, kind="late-error", status=500)
    assert request(proxy.port, "PUT", "late", b"z")[0] == 500
    assert request(proxy.port, "GET", "late") == (200, b"z")
    assert [number for number, count in (*hits(proxy),) if count] == [1, 2, 3]


def test_the_proxy_makes_the_server_full_stopped_and_gone_for_a_while(proxy: Spoken) -> None:
    request(proxy.port, "PUT", "some", b"x" * 1000)
    arm(proxy, 1, kind="full", seconds=0.3)
    assert request(proxy.port, "PUT", "more", b"xx")[0] == 507
    assert request(proxy.port, "GET", "some")[0] == 200
    assert hits(proxy) == [(1, 1)]
    assert request(proxy.port, "PUT", "more", b"xx")[0] == 200
    arm(proxy, 2, kind="stop", seconds=0.4)
    begun = time.monotonic()
    assert request(proxy.port, "GET", "some")[0] == 200
    assert time.monotonic() - begun > 0.3
    assert hits(proxy) == [(2, 1)]
    arm(proxy, 3, kind="refuse", seconds=0.4)
    with pytest.raises(CUT):
        request(proxy.port, "GET", "some")
    with pytest.raises(OSError, match="refused"):
        request(proxy.port, "GET", "some")
    assert hits(proxy) == [(3, 1)]
    assert request(proxy.port, "GET", "some")[0] == 200


def test_every_kind_of_fault_is_one_that_the_proxy_knows() -> None:
    from benchmarks.chaos.proxy import COUNTED, LASTING

    for kind in AT_THE_PROXY:
        fault = proxy_fault(kind, random.Random(1))
        assert fault["kind"] in COUNTED + LASTING
        json.dumps(fault)


def test_a_fault_that_hit_nothing_is_none() -> None:
    tally = Tally()
    first, second = tally.arm("slow"), tally.arm("slow")
    tally.heard(first, 3)
    assert (tally.num_faults, tally.num_armed) == (1, 1)
    tally.heard(second, 0)
    tally.add("worker-killed", 0)
    assert (tally.num_faults, tally.num_armed, tally.missed.total(), tally.requests["slow"]) == (1, 0, 2, 3)


@pytest.mark.slow
def test_whatever_dies_on_the_way_the_store_is_that_of_an_undisturbed_run(tmp_path: Path) -> None:
    """A short round of `make chaos`: two workers, an S3 server behind the proxy, and a sample that kills its worker."""
    (outcome,) = chaos(
        tmp_path,
        [Round("workers", num_workers=2)],
        num_faults=10,
        seconds=8,
        num_samples=32,
        seed=23,
        pause_s=0.02,
        pace=Pace(request_s=0.3, process_s=6, patience_s=240),
        shard_rows=2,
    )
    assert outcome.problems == []
    assert outcome.tally.num_faults >= 3
    assert outcome.num_quarantined == 5
    assert outcome.num_deaths >= 3  # of the deadly sample, until it is found
    text = json.dumps(figures([outcome], 32, 23, 1.0))
    assert "AWS" not in text
    assert "chaos-secret" not in (tmp_path / "round-0-workers" / "driver-0.log").read_text()
