"""The stored top-1, and how often it meets the hard target."""

from pathlib import Path

import numpy as np
import pytest

from storage.corpus import open_corpus
from storage.encodings import Dense, TopK
from storage.reader import open_store
from studenttrain.top1 import meet_hard_targets, stored_top1
from tests.studenttrain.runs import make_ground, teacher_logits


@pytest.mark.parametrize("encoding", [Dense("float32"), Dense("float16"), TopK(1), TopK(3)])
def test_the_stored_top1_is_the_teachers(tmp_path: Path, encoding: Dense | TopK) -> None:
    ground = make_ground(tmp_path, encoding=encoding, refused=(9, 70))
    expected = teacher_logits(np.load(ground.data)["x"]).argmax(1)
    expected[[9, 70]] = -1
    assert stored_top1(open_store(ground.targets), 0, 96).tolist() == expected.tolist()
    assert stored_top1(open_store(ground.targets), 5, 77).tolist() == expected[5:77].tolist()


def test_uint8_values_give_the_top1_within_a_step(tmp_path: Path) -> None:
    ground = make_ground(tmp_path, encoding=Dense("uint8"))
    logits = teacher_logits(np.load(ground.data)["x"])
    top1 = stored_top1(open_store(ground.targets), 0, 96)
    chosen = np.take_along_axis(logits, top1[:, None], 1)[:, 0]
    assert (logits.max(1) - chosen <= (logits.max(1) - logits.min(1)) / 255).all()


def test_rows_that_are_not_sealed_have_no_top1(tmp_path: Path) -> None:
    ground = make_ground(tmp_path, shards=(1,), finalize=False)
    top1 = stored_top1(open_store(ground.targets), 8, 40)
    assert (top1[:8] == -1).all()
    assert (top1[8:24] >= 0).all()
    assert (top1[24:] == -1).all()


def test_the_meeting_counts_rows_with_a_hard_target(tmp_path: Path) -> None:
    ground = make_ground(tmp_path, refused=(0,))
    hard = np.load(ground.data)["y"].astype(np.int32)
    hard[50:] = -1
    met = meet_hard_targets(open_store(ground.targets), hard)
    top1 = teacher_logits(np.load(ground.data)["x"]).argmax(1)
    assert met.num_rows == 49
    assert met.num_met == (top1[1:50] == hard[1:50]).sum()
    assert str(met).endswith(f"({met.num_met} of 49 rows), out of 96 that are sealed")


def test_a_large_store_is_sampled(tmp_path: Path) -> None:
    ground = make_ground(tmp_path, num_samples=960)
    hard = open_corpus(ground.data).hard_targets
    assert hard is not None
    met = meet_hard_targets(open_store(ground.targets), hard, max_bytes=8 * 16 * 10)
    assert met.num_rows == 80
    assert (
        str(meet_hard_targets(open_store(ground.targets), np.full(960, -1, np.int32)))
        == "no sealed row has a hard target"
    )
