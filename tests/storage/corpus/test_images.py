import io
import os
import pickle
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from storage.corpus import SampleError, open_corpus
from storage.corpus.images import decode_image, image_shape
from storage.errors import CorpusError
from tests.builders import image_bytes, random_pixels, write_image_folder


def encoded(image: Image.Image, name: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    return buffer.getvalue()


def test_rows_are_sorted_by_path_and_classes_by_folder(tmp_path: Path) -> None:
    write_image_folder(tmp_path, per_class=2, class_names=["b", "a", "c"])
    corpus = open_corpus(tmp_path)
    assert [corpus.key(row) for row in range(6)] == [f"{name}/00{index}.png" for name in "abc" for index in range(2)]
    assert corpus.class_names == ("a", "b", "c")
    assert corpus.hard_targets is not None
    assert corpus.hard_targets.tolist() == [0, 0, 1, 1, 2, 2]
    assert (corpus.kind, corpus.sample_kind, corpus.num_ignored, corpus.path) == ("images", "image", 0, tmp_path)


def test_a_flat_folder_has_no_hard_targets(tmp_path: Path) -> None:
    corpus = open_corpus(write_image_folder(tmp_path, class_names=[]))
    assert corpus.class_names is None
    assert corpus.hard_targets is None


def test_a_flat_folder_takes_hard_targets_from_a_file(tmp_path: Path) -> None:
    np.save(tmp_path / "labels.npy", np.array([2, 0, 1]))
    corpus = open_corpus(write_image_folder(tmp_path / "flat", class_names=[]), labels=tmp_path / "labels.npy")
    assert corpus.hard_targets is not None
    assert corpus.hard_targets.tolist() == [2, 0, 1]


def test_labels_beside_class_folders_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "labels.npy", np.zeros(9, np.int64))
    with pytest.raises(CorpusError, match=r"expected its folders to say the classes.*leave --labels out"):
        open_corpus(write_image_folder(tmp_path / "images"), labels=tmp_path / "labels.npy")


def test_classes_below_the_top_folder_belong_to_it(tmp_path: Path) -> None:
    write_image_folder(tmp_path / "ant" / "deep", class_names=["x", "y"])
    write_image_folder(tmp_path, class_names=["bee"])
    corpus = open_corpus(tmp_path)
    assert corpus.class_names == ("ant", "bee")
    assert corpus.num_samples == 9


def test_suffixes_are_found_in_upper_case_and_other_files_are_counted(tmp_path: Path) -> None:
    for name in ("a.JPG", "b.jpeg", "c.WebP", "d.png"):
        (tmp_path / name).write_bytes(image_bytes(random_pixels(4, 4, 3), Path(name).suffix))
    for name in ("notes.txt", "Thumbs.db", ".DS_Store", ".hidden.png"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "e.png").write_bytes(b"x")
    corpus = open_corpus(tmp_path)
    assert [corpus.key(row) for row in range(corpus.num_samples)] == ["a.JPG", "b.jpeg", "c.WebP", "d.png"]
    assert corpus.num_ignored == 2


def test_images_beside_folders_of_images_are_refused(tmp_path: Path) -> None:
    write_image_folder(tmp_path)
    (tmp_path / "stray.png").write_bytes(image_bytes(random_pixels(4, 4)))
    with pytest.raises(CorpusError, match=r"got both \('stray.png' beside the folder 'ant'\); move them"):
        open_corpus(tmp_path)


def test_folders_named_as_splits_are_refused_with_the_path_to_give(tmp_path: Path) -> None:
    write_image_folder(tmp_path / "train")
    write_image_folder(tmp_path / "test")
    with pytest.raises(CorpusError, match=r"got the splits 'test', 'train'; give one of them: '.*/test'"):
        open_corpus(tmp_path)


def test_a_class_may_be_named_test_where_it_holds_images(tmp_path: Path) -> None:
    assert open_corpus(write_image_folder(tmp_path, class_names=["test"])).class_names == ("test",)


def test_a_file_is_no_folder_of_images(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("some text")
    with pytest.raises(CorpusError, match="expected a folder of images, got a file; give the folder"):
        open_corpus(tmp_path / "notes", kind="images")


def test_a_folder_without_images_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.gif").write_bytes(b"GIF")
    with pytest.raises(CorpusError, match=r"expected images \(.jpg, .jpeg, .png, .webp\), got 1 other .*'sub/a.gif'"):
        open_corpus(tmp_path, kind="images")


def test_a_link_that_stays_inside_is_a_sample(tmp_path: Path) -> None:
    write_image_folder(tmp_path, class_names=[], per_class=1)
    (tmp_path / "link.png").symlink_to("000.png")
    corpus = open_corpus(tmp_path)
    assert corpus.read_raw(0) == corpus.read_raw(1)


@pytest.mark.parametrize("folder", [False, True])
def test_a_link_that_leaves_the_folder_is_refused(tmp_path: Path, folder: bool) -> None:
    outside = write_image_folder(tmp_path / "outside", class_names=[])
    inside = write_image_folder(tmp_path / "inside", class_names=["a"])
    (inside / "a" / "link.png").symlink_to(outside if folder else outside / "000.png")
    with pytest.raises(CorpusError, match=r"links that stay inside the folder, got 'a/link.png', which leads to"):
        open_corpus(inside)


def test_a_folder_that_is_reached_by_a_link_itself_is_fine(tmp_path: Path) -> None:
    write_image_folder(tmp_path / "real", class_names=[])
    (tmp_path / "real" / "link.png").symlink_to("000.png")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert open_corpus(tmp_path / "link").num_samples == 4


def test_a_link_to_a_folder_inside_is_refused(tmp_path: Path) -> None:
    write_image_folder(tmp_path)
    (tmp_path / "dog").symlink_to("ant")
    with pytest.raises(CorpusError, match="got 'dog', which leads to a folder, whose files would be there twice"):
        open_corpus(tmp_path)


def test_a_link_that_leads_nowhere_is_refused(tmp_path: Path) -> None:
    write_image_folder(tmp_path)
    (tmp_path / "ant" / "gone.png").symlink_to("never.png")
    with pytest.raises(CorpusError, match=r"got 'ant/gone.png', which leads to nothing; remove the link"):
        open_corpus(tmp_path)


def test_a_link_that_is_no_image_is_counted_and_not_followed(tmp_path: Path) -> None:
    write_image_folder(tmp_path / "images", class_names=[])
    (tmp_path / "notes.txt").write_text("outside")
    (tmp_path / "images" / "notes.txt").symlink_to(tmp_path / "notes.txt")
    assert open_corpus(tmp_path / "images").num_ignored == 1


def test_a_folder_that_can_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_image_folder(tmp_path)
    scan = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("bee"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(CorpusError, match=r"got 'Permission denied' at '.*bee'; mend that"):
        open_corpus(tmp_path)


def test_names_that_are_not_utf8_are_escaped_in_keys(tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/caf\xe9.png"
    try:
        Path(os.fsdecode(name)).write_bytes(image_bytes(random_pixels(4, 4)))
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    corpus = open_corpus(tmp_path)
    assert corpus.key(0) == "caf\\xe9.png"
    assert corpus.decode(corpus.read_raw(0)).shape == (4, 4, 1)


def test_the_fingerprint_follows_names_and_sizes_but_not_the_place(tmp_path: Path) -> None:
    prints = [open_corpus(write_image_folder(tmp_path / name)).fingerprint for name in ("one", "two")]
    assert prints[0] == prints[1]
    (tmp_path / "two" / "ant" / "000.png").rename(tmp_path / "two" / "ant" / "0000.png")
    (tmp_path / "one" / "ant" / "000.png").write_bytes(b"another size")
    others = [open_corpus(tmp_path / name).fingerprint for name in ("one", "two")]
    assert len({prints[0], *others}) == 3


def test_a_corpus_of_images_survives_pickling(tmp_path: Path) -> None:
    corpus = open_corpus(write_image_folder(tmp_path))
    again = pickle.loads(pickle.dumps(corpus))
    assert again.fingerprint == corpus.fingerprint
    assert [again.key(row) for row in range(9)] == [corpus.key(row) for row in range(9)]
    assert again.read_raw(5) == corpus.read_raw(5)


def test_a_row_that_is_not_there_is_refused(tmp_path: Path) -> None:
    corpus = open_corpus(write_image_folder(tmp_path))
    for row in (-1, 9):
        with pytest.raises(ValueError, match=f"row: expected 0 to 8, got {row}"):
            corpus.key(row)


def test_a_file_that_is_gone_refuses_its_sample_only(tmp_path: Path) -> None:
    corpus = open_corpus(write_image_folder(tmp_path))
    (tmp_path / "ant" / "001.png").unlink()
    with pytest.raises(SampleError, match="expected a file that can be read, got 'No such file or directory'"):
        corpus.read_raw(1)
    assert corpus.read_raw(2)


def test_a_folder_that_is_gone_is_not_the_sample_s_fault(tmp_path: Path) -> None:
    corpus = open_corpus(write_image_folder(tmp_path / "images"))
    (tmp_path / "images").rename(tmp_path / "moved")
    with pytest.raises(CorpusError, match="expected its files to open") as caught:
        corpus.read_raw(1)
    assert not isinstance(caught.value, SampleError)


def test_too_many_open_files_are_not_the_sample_s_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = open_corpus(write_image_folder(tmp_path))

    def refuse(path: Path) -> bytes:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(
        CorpusError, match="got 'Too many open files'; mend that and run the same command again"
    ) as caught:
        corpus.read_raw(1)
    assert not isinstance(caught.value, SampleError)


# Decoding


def test_png_pixels_come_back_exactly() -> None:
    for channels in (1, 3):
        pixels = random_pixels(7, 5, channels)
        assert np.array_equal(decode_image(image_bytes(pixels)), pixels)


def test_grey_of_16_bits_keeps_the_upper_eight() -> None:
    values = np.array([[0, 255, 256, 65535]], np.uint16)
    raw = encoded(Image.fromarray(values))
    assert decode_image(raw)[0, :, 0].tolist() == [0, 0, 1, 255]
    assert image_shape(raw) == (1, 4, 1)


def test_black_and_white_becomes_0_and_255() -> None:
    raw = encoded(Image.fromarray(np.array([[True, False]])))
    assert decode_image(raw)[0, :, 0].tolist() == [255, 0]


def test_alpha_is_dropped_and_the_colour_below_it_kept() -> None:
    pixels = random_pixels(4, 4, 4)
    pixels[0, 0, 3] = 0
    assert np.array_equal(decode_image(image_bytes(pixels)), pixels[:, :, :3])
    grey = encoded(Image.merge("LA", [Image.fromarray(pixels[:, :, 0]), Image.fromarray(pixels[:, :, 3])]))
    assert np.array_equal(decode_image(grey), pixels[:, :, :1])


@pytest.mark.parametrize(("mode", "name", "channels"), [("P", "PNG", 3), ("CMYK", "JPEG", 3), ("L", "JPEG", 1)])
def test_other_modes_become_grey_or_rgb(mode: str, name: str, channels: int) -> None:
    raw = encoded(Image.fromarray(random_pixels(6, 4, 3)).convert(mode), name)
    assert decode_image(raw).shape == (6, 4, channels) == image_shape(raw)


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied(name: str, orientation: int) -> None:
    image = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6).repeat(8, 0).repeat(8, 1)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = orientation
    plain, turned = encoded(image, name), encoded(image, name, exif=exif)
    pixels = decode_image(plain)
    turns = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.transpose(1, 0, 2),
        6: pixels[::-1].transpose(1, 0, 2),
        7: pixels[::-1, ::-1].transpose(1, 0, 2),
        8: pixels.transpose(1, 0, 2)[::-1],
    }
    assert np.array_equal(decode_image(turned), turns[orientation])
    assert image_shape(turned) == turns[orientation].shape


def test_broken_exif_data_is_passed_over_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    pixels = random_pixels(8, 8, 3)
    exif = b"Exif\x00\x00II*\x00\x08\x00\x00\x00\xff\x00\x12\x01\x03\x00\x01"
    for name in ("JPEG", "WEBP", "PNG"):
        assert decode_image(encoded(Image.fromarray(pixels), name, exif=exif)).shape == (8, 8, 3)
    assert not recwarn.list


def test_an_animation_gives_its_first_frame() -> None:
    frames = [Image.fromarray(random_pixels(5, 5, 3, seed=seed)) for seed in range(3)]
    raw = encoded(frames[0], "PNG", save_all=True, append_images=frames[1:])
    assert np.array_equal(decode_image(raw), random_pixels(5, 5, 3, seed=0))


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_a_truncated_image_is_refused_with_the_same_reason_each_time(suffix: str) -> None:
    raw = image_bytes(random_pixels(64, 64, 3), suffix)
    reasons = set()
    for _ in range(3):
        with pytest.raises(SampleError, match="expected a") as caught:
            decode_image(raw[: len(raw) // 2])
        reasons.add(str(caught.value))
    assert len(reasons) == 1
    assert "\n" not in reasons.pop()


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "got an empty file; replace the file"),
        (b"not an image", r"got one that starts with 6e 6f 74 20 and has no whole header"),
        (b"\xff\xd8\xff\xe0", "got one that starts with ff d8 ff e0"),
        (encoded(Image.new("RGB", (4, 4)), "GIF"), "got one that starts with 47 49 46 38"),
        (encoded(Image.new("RGB", (4, 4)), "TIFF"), "got one that starts with 49 49 2a 00"),
    ],
)
def test_what_is_no_image_is_refused(raw: bytes, message: str) -> None:
    for read in (decode_image, image_shape):
        with pytest.raises(SampleError, match=message):
            read(raw)


def png_header(width: int, height: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [9_500, 10_000, 100_000])
def test_a_decompression_bomb_is_refused_without_a_warning(side: int, recwarn: pytest.WarningsRecorder) -> None:
    with pytest.raises(SampleError, match="expected at most 89478485 pixels, got more; make the image smaller"):
        decode_image(png_header(side, side))
    assert not recwarn.list


def test_the_machine_running_short_of_memory_is_not_the_sample_s_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def short(*_: object, **__: object) -> None:
        raise MemoryError

    raw = image_bytes(random_pixels(4, 4))
    monkeypatch.setattr(Image.Image, "getexif", short)
    with pytest.raises(MemoryError):
        decode_image(raw)
    monkeypatch.setattr(Image, "open", short)
    with pytest.raises(MemoryError):
        decode_image(raw)


@given(st.data())
def test_a_damaged_image_is_decoded_or_refused_but_nothing_else(data: st.DataObject) -> None:
    suffix = data.draw(st.sampled_from([".png", ".jpg", ".webp"]))
    raw = bytearray(image_bytes(random_pixels(16, 12, 3), suffix))
    for _ in range(data.draw(st.integers(1, 8))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reason = check_decoded(bytes(raw))
    assert "\n" not in reason
    assert "0x" not in reason


@given(st.binary(max_size=200))
def test_any_bytes_are_decoded_or_refused(raw: bytes) -> None:
    assert "\n" not in check_decoded(raw)


def check_decoded(raw: bytes) -> str:
    """Why some bytes are refused; where they are not, what comes out is an image."""
    try:
        pixels = decode_image(raw)
    except SampleError as error:
        return str(error)
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3
    assert pixels.shape == image_shape(raw)
    return ""


def test_real_photographs_are_read(shared_data: Path) -> None:
    corpus = open_corpus(shared_data / "cifar10-sample" / "train")
    assert corpus.num_samples == 1000
    assert corpus.class_names is not None
    assert corpus.class_names[:3] == ("airplane", "automobile", "bird")
    assert corpus.hard_targets is not None
    assert np.bincount(corpus.hard_targets).tolist() == [100] * 10
    assert corpus.decode(corpus.read_raw(999)).shape == (32, 32, 3)
