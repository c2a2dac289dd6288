import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.corpus import check_digests, matching, open_corpus, sample_digests, verify_corpus, verify_hard_targets
from storage.errors import CorpusMismatchError, MismatchError
from storage.reader import Store, open_store
from tests.builders import image_bytes, random_pixels, write_idx, write_image_folder, write_npz, write_store


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes of eight images."""
    return write_image_folder(tmp_path / "images", per_class=8)


@pytest.fixture(params=["s.zarr", "s.h5"])
def store(folder: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Store:
    """A store that was made from the folder."""
    return open_store(write_store(tmp_path / request.param, open_corpus(folder)))


class Bar:
    done = 0

    def advance(self, count: int) -> None:
        self.done += count


def refused(store: Store, folder: Path, message: str) -> None:
    for pool in (None, ThreadPoolExecutor(2)):
        with pytest.raises(CorpusMismatchError, match=message) as caught:
            verify_corpus(store, open_corpus(folder), pool=pool)
        assert "\n" not in str(caught.value)


def test_the_corpus_that_the_store_was_made_from_is_accepted(store: Store, folder: Path) -> None:
    bar = Bar()
    verify_corpus(store, open_corpus(folder), bar)
    verify_hard_targets(store, open_corpus(folder))
    assert bar.done == 24


def test_a_copy_in_another_place_under_other_names_is_accepted(store: Store, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "ant" / "000.png").rename(tmp_path / "copy" / "ant" / "0000.png")
    verify_corpus(store, open_corpus(tmp_path / "copy"))


def test_a_replaced_sample_is_named(store: Store, folder: Path) -> None:
    (folder / "bee" / "003.png").write_bytes(image_bytes(random_pixels(8, 8, 3, seed=99)))
    refused(
        store,
        folder,
        r"s\.(zarr|h5): row 11 \('bee/003.png'\): expected the sample that it was made from \(digest [0-9a-f]{16}\), "
        r"got digest [0-9a-f]{16} in the corpus '.*images': the sample was replaced, or the order changed; use the",
    )


def test_a_sample_that_can_not_be_read_any_more_is_named(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = open_corpus(folder)
    (folder / "bee" / "003.png").unlink()
    with pytest.raises(
        CorpusMismatchError, match=r"row 11 .*, got none in the corpus .*: the sample can't be read any more"
    ):
        verify_corpus(store, corpus)


def test_two_swapped_samples_are_named(store: Store, folder: Path) -> None:
    one, two = folder / "ant" / "002.png", folder / "ant" / "006.png"
    data = one.read_bytes(), two.read_bytes()
    one.write_bytes(data[1])
    two.write_bytes(data[0])
    refused(store, folder, r"row 2 \('ant/002.png'\): .*: it was swapped with row 6 \('ant/006.png'\)")


def test_samples_swapped_over_different_shards_name_the_first(store: Store, folder: Path) -> None:
    one, two = folder / "ant" / "002.png", folder / "cat" / "006.png"
    data = one.read_bytes(), two.read_bytes()
    one.write_bytes(data[1])
    two.write_bytes(data[0])
    refused(store, folder, r"row 2 \('ant/002.png'\): .* the sample was replaced, or the order changed")


def test_a_removed_sample_is_named_with_both_counts(store: Store, folder: Path) -> None:
    (folder / "ant" / "005.png").unlink()
    refused(
        store,
        folder,
        r"row 5 \('ant/006.png'\): .*: it is the sample of row 6: a sample before it was removed, or the order changed"
        r"; .*; there should be 24 samples as in the store, got 23",
    )


def test_the_last_sample_removed_is_named(store: Store, folder: Path) -> None:
    (folder / "cat" / "007.png").unlink()
    refused(store, folder, "expected 24 samples as in the store, got 23: the corpus '.*' has no row 23; use the corpus")


def test_a_whole_shard_of_samples_removed_is_named(store: Store, folder: Path) -> None:
    for index in range(8):
        (folder / "cat" / f"{index:03d}.png").unlink()
    (folder / "cat" / "readme.txt").write_text("no images")
    corpus = open_corpus(folder)
    with pytest.raises(MismatchError, match=r"expected 3 classes, got 2 in the corpus"):
        verify_corpus(store, corpus)


def test_a_sample_added_in_the_middle_or_at_the_end_is_named(store: Store, folder: Path) -> None:
    added = folder / "cat" / "zzz.png"
    added.write_bytes(image_bytes(random_pixels(8, 8, 3, seed=99)))
    refused(store, folder, r"got 25: the corpus '.*' goes on with row 24 \('cat/zzz.png'\); use the corpus")
    added.rename(folder / "ant" / "003a.png")
    refused(
        store, folder, r"row 4 \('ant/003a.png'\): .* the sample was replaced.*; there should be 24 samples .*, got 25"
    )


def test_other_class_names_are_refused_before_any_sample_is_read(store: Store, folder: Path) -> None:
    (folder / "bee").rename(folder / "bug")
    with pytest.raises(MismatchError, match=r"expected class 1 to be 'bee', got 'bug' \(other classes\) in the corpus"):
        verify_corpus(store, open_corpus(folder))


def test_the_same_classes_in_another_order_are_refused(store: Store, folder: Path) -> None:
    corpus = open_corpus(folder)
    object.__setattr__(corpus, "class_names", ("bee", "ant", "cat"))
    with pytest.raises(MismatchError, match=r"expected class 0 to be 'ant', got 'bee' \(in another order\)"):
        verify_corpus(store, corpus)


def test_a_corpus_without_class_names_is_compared_by_its_samples(store: Store, folder: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in folder.glob("*/*.png"):
        shutil.copy(path, flat / f"{path.parent.name}-{path.name}")
    verify_corpus(store, open_corpus(flat))
    verify_hard_targets(store, open_corpus(flat))


def test_only_sealed_rows_are_compared(folder: Path, tmp_path: Path) -> None:
    path = write_store(tmp_path / "s.zarr", open_corpus(folder), shards=[0, 2])
    (folder / "bee" / "003.png").write_bytes(b"replaced in the shard that is not sealed")
    with open_store(path) as store:
        verify_corpus(store, open_corpus(folder))
        (folder / "cat" / "003.png").write_bytes(b"replaced")
        refused(store, folder, r"row 19 \('cat/003.png'\)")


def test_rows_whose_sample_could_not_be_read_at_the_dump_are_passed_over(folder: Path, tmp_path: Path) -> None:
    corpus = open_corpus(folder)
    data = (folder / "ant" / "004.png").read_bytes()
    (folder / "ant" / "004.png").unlink()
    path = write_store(tmp_path / "s.zarr", corpus)
    (folder / "ant" / "004.png").write_bytes(data)
    with open_store(path) as store:
        assert store.read(["sample_digest"], 4, 5)["sample_digest"][0] == 0
        verify_corpus(store, open_corpus(folder))


def test_every_block_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "_BLOCK_ROWS", 3)
    path = write_npz(tmp_path / "a.npz")
    with open_store(write_store(tmp_path / "s.zarr", open_corpus(path))) as store:
        verify_corpus(store, open_corpus(path))
        values = dict(np.load(path))
        for row in range(20):
            changed = values["x"].copy()
            changed[row, 3] += 1
            np.savez(path, x=changed, y=values["y"])
            with pytest.raises(CorpusMismatchError, match=rf"row {row} \('{row}'\)"):
                verify_corpus(store, open_corpus(path))


def test_other_hard_targets_are_refused(tmp_path: Path) -> None:
    path = write_idx(tmp_path / "idx")
    corpus = open_corpus(path)
    assert corpus.hard_targets is not None
    with open_store(write_store(tmp_path / "s.zarr", corpus)) as store:
        verify_hard_targets(store, corpus)
        labels = corpus.hard_targets.copy()
        labels[[13, 17]] = 9 - labels[[13, 17]]
        np.save(tmp_path / "labels.npy", labels)
        message = rf"row 13 \('13'\): expected the hard target {9 - labels[13]}, got {labels[13]} in the corpus .*; use"
        with pytest.raises(CorpusMismatchError, match=message):
            verify_hard_targets(store, open_corpus(path, labels=tmp_path / "labels.npy"))


def test_hard_targets_are_not_compared_where_the_store_or_the_corpus_has_none(tmp_path: Path) -> None:
    without = open_corpus(write_npz(tmp_path / "a.npz", has_labels=False))
    having = open_corpus(write_npz(tmp_path / "b.npz"))
    with open_store(write_store(tmp_path / "a.zarr", without)) as store:
        verify_hard_targets(store, having)
    with open_store(write_store(tmp_path / "b.zarr", having)) as store:
        verify_hard_targets(store, without)
        np.savez(tmp_path / "c.npz", x=np.load(tmp_path / "b.npz")["x"][:4], y=np.load(tmp_path / "b.npz")["y"][:4])
        verify_hard_targets(store, open_corpus(tmp_path / "c.npz"))


# One batch


@given(st.permutations(range(12)), st.sets(st.integers(0, 11)), st.sets(st.integers(0, 11)))
def test_the_lowest_row_that_differs_is_named_whatever_the_order(
    order: list[int], changed: set[int], unread: set[int]
) -> None:
    corpus = Named()
    rows = np.array(order)
    stored = rows.astype(np.uint64) + np.uint64(100)
    digests = stored.copy()
    digests[np.isin(rows, list(changed))] += np.uint64(1000)
    stored[np.isin(rows, list(unread))] = 0
    different = sorted(changed - unread)
    if not different:
        check_digests(stored, digests, rows, corpus, "store")  # type: ignore[arg-type]
        return
    with pytest.raises(CorpusMismatchError, match=rf"store: row {different[0]} \('key {different[0]}'\)"):
        check_digests(stored, digests, rows, corpus, "store")  # type: ignore[arg-type]


class Named:
    path = Path("corpus")

    def key(self, row: int) -> str:
        return f"key {row}"


@pytest.mark.parametrize(
    ("change", "guess"),
    [
        (lambda digests: np.roll(digests, -1), "it is the sample of row 1: a sample before it was removed"),
        (lambda digests: np.array([9, *digests[:-1]], np.uint64), "the sample was replaced"),
        (lambda digests: digests[[1, 0, 2, 3]], r"it was swapped with row 1 \('key 1'\)"),
        (lambda digests: digests * np.uint64(0), "the sample can't be read any more"),
        (lambda digests: np.array([digests[0], digests[0], *digests[1:3]]), "row 0: a sample before it was added"),
    ],
)
def test_the_message_guesses_what_happened(change: Callable[[np.ndarray], np.ndarray], guess: str) -> None:
    stored = np.array([11, 12, 13, 14], np.uint64)
    with pytest.raises(CorpusMismatchError, match=guess):
        check_digests(stored, change(stored), np.arange(4), Named(), "store")  # type: ignore[arg-type]


def test_mnist_with_two_images_swapped_is_refused(shared_data: Path, tmp_path: Path) -> None:
    corpus = open_corpus(shared_data / "mnist" / "t10k-images-idx3-ubyte.gz")
    with open_store(write_store(tmp_path / "s.zarr", corpus, shard_rows=5000)) as store:
        verify_corpus(store, corpus)
        images = corpus.images_NHWC.copy()  # type: ignore[attr-defined]
        images[[123, 4000]] = images[[4000, 123]]
        object.__setattr__(corpus, "images_NHWC", images)
        with pytest.raises(CorpusMismatchError, match=r"row 123 \('123'\): .* it was swapped with row 4000 \('4000'\)"):
            verify_corpus(store, corpus)
        assert len(sample_digests(corpus, 0, 10_000)) == 10_000
