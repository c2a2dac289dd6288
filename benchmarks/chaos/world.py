"""What all rounds share: the corpus, the teacher, the S3 server and the proxy before it, and what is to come out."""

import contextlib
import random
import signal
import urllib.request
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
import torch

from benchmarks.chaos.corpus import make_samples, write_folder, write_tars
from benchmarks.chaos.processes import Spoken, environment
from benchmarks.chaos.reference import Reference, environment_of, make_reference
from benchmarks.chaos.teacher import ARCH, make
from storage.remote import open_place
from teacherdump.config import DumpConfig

BUCKET = "chaos"
CORPUS_URL = f"s3://{BUCKET}/corpus"
BATCH_SIZE, SHARD_ROWS = 16, 24  # the last batch of each shard is a short one
BROKEN_SHARE, POISON_SHARE = 0.01, 0.005

Data = Literal["folder", "tars", "remote-tars"]


@dataclass(frozen=True, eq=False)
class World:
    """What all rounds share.

    Attributes:
        folder: of corpus, teacher, logs and local stores.
        server: an S3 server.
        proxy: that stands before it.
        references: what an undisturbed run gives, by the data.
        pause_s: seconds that the teacher takes longer for each batch.
        may_mount: whether a small disk may be mounted.
        shard_rows: rows of a shard.
    """

    folder: Path
    server: Spoken
    proxy: Spoken
    references: Mapping[Data, Reference]
    pause_s: float
    may_mount: bool
    shard_rows: int

    def data(self, data: Data) -> str:
        """Path or URL of a form of the corpus."""
        return CORPUS_URL if data == "remote-tars" else str(self.folder / data)

    def options(self) -> list[str]:
        """Options of `teacherdump run` that are the same for all."""
        options = ["--model", str(self.folder / "teacher.pt"), "--arch", ARCH, "--device", "cpu", "--encoding", "dense"]
        return [*options, "--batch-size", str(BATCH_SIZE), "--shard-rows", str(self.shard_rows)]


@contextlib.contextmanager
def make_world(
    folder: Path,
    datas: AbstractSet[Data],
    num_samples: int,
    generator: random.Random,
    pause_s: float,
    may_mount: bool,
    shard_rows: int,
) -> Iterator[World]:
    """Make everything in an empty folder; in the meantime this process reaches the server without the proxy.

    Args:
        folder: that is there, and empty.
        datas: forms of the corpus that are needed.
        num_samples: of the corpus.
        generator: of the corpus and the teacher.
        pause_s: seconds that the teacher takes longer for each batch.
        may_mount: whether a small disk may be mounted.
        shard_rows: rows of a shard.
    """
    logs = folder / "logs"
    logs.mkdir()
    samples = make_samples(
        num_samples, max(3, int(num_samples * BROKEN_SHARE)), max(1, int(num_samples * POISON_SHARE)), generator
    )
    torch.manual_seed(generator.randrange(1 << 32))
    torch.save(make().state_dict(), folder / "teacher.pt")
    with contextlib.ExitStack() as stack:
        server = Spoken("tests.s3", log=logs / "server.log")
        stack.callback(server.close)
        direct = f"http://127.0.0.1:{server.port}"
        urllib.request.urlopen(urllib.request.Request(f"{direct}/{BUCKET}", method="PUT"), timeout=20).close()
        proxy = Spoken("benchmarks.chaos.proxy", server.port, server.pid, log=logs / "proxy.log")
        stack.callback(_let_go, server.pid)
        stack.callback(proxy.close)
        stack.enter_context(environment_of(**environment(direct)))
        if "folder" in datas:
            write_folder(samples, folder / "folder")
        if datas & {"tars", "remote-tars"}:
            write_tars(samples, folder / "tars")
        references: dict[Data, Reference] = {}
        for data in sorted({"folder" if data == "folder" else "tars" for data in datas}):
            config = DumpConfig(
                models=(str(folder / "teacher.pt"),),
                data=str(folder / data),
                out="unused.zarr",
                arch=ARCH,
                encoding="dense",
                device="cpu",
                batch_size=BATCH_SIZE,
                shard_rows=shard_rows,
            )
            references["folder" if data == "folder" else "tars"] = make_reference(
                config, samples.kinds, folder / f"reference-{data}"
            )
        if "remote-tars" in datas:
            place = open_place(CORPUS_URL)
            for path in sorted((folder / "tars").iterdir()):
                place.put(path.name, path.read_bytes())
            references["remote-tars"] = references["tars"]  # where the files lie is nothing that a store says
        yield World(folder, server, proxy, references, pause_s, may_mount, shard_rows)


def _let_go(pid: int) -> None:
    """Let a server that a fault stopped go on, so that it can end."""
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(pid).send_signal(signal.SIGCONT)
