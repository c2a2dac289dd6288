import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from storage.corpus import (
    Preprocess,
    SampleError,
    SequenceOptions,
    check_preprocess,
    default_preprocess,
    open_corpus,
)
from storage.errors import CorpusError, DamageError, FormatVersionError
from tests.builders import image_bytes, random_pixels, write_idx, write_npz

IMAGE: dict[str, Any] = {"kind": "image", "shape": (3, 8, 6)}


def write_images(folder: Path, *shapes: tuple[int, ...]) -> Path:
    """A flat folder with an image of each shape."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, shape in enumerate(shapes):
        (folder / f"{index:03d}.png").write_bytes(image_bytes(random_pixels(*shape, seed=index)))
    return folder


# What comes out


def test_an_image_of_the_declared_size_is_scaled_to_0_and_1() -> None:
    pixels = random_pixels(8, 6, 3)
    pixels[0, 0] = (0, 255, 51)
    inputs = Preprocess(**IMAGE, scale=1 / 255).apply(pixels)
    assert inputs.dtype == np.float32
    assert inputs.shape == (3, 8, 6)
    assert inputs.flags.c_contiguous
    assert np.allclose(inputs, pixels.transpose(2, 0, 1) / 255, atol=1e-7)
    assert inputs[0, 0, 0] == 0
    assert inputs[1, 0, 0] == 1


def test_mean_and_std_are_those_of_each_channel() -> None:
    pixels = random_pixels(8, 6, 3)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    inputs = Preprocess(**IMAGE, scale=1 / 255, mean=mean, std=std).apply(pixels)
    expected = (pixels / 255 - np.array(mean)) / np.array(std)
    assert np.allclose(inputs, expected.transpose(2, 0, 1), atol=1e-5)


def test_grey_is_repeated_into_rgb() -> None:
    pixels = random_pixels(8, 6, 1)
    inputs = Preprocess(**IMAGE).apply(pixels)
    assert np.array_equal(inputs, pixels.transpose(2, 0, 1).repeat(3, 0))


def test_rgb_is_weighed_into_grey_as_pillow_does_it() -> None:
    pixels = random_pixels(64, 64, 3)
    inputs = Preprocess(kind="image", shape=(1, 64, 64)).apply(pixels)
    assert np.array_equal(inputs[0], np.asarray(Image.fromarray(pixels).convert("L")))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos", "nearest"])
def test_a_stretched_image_is_what_pillow_makes_of_it(interpolation: Any) -> None:
    pixels = random_pixels(20, 30, 3)
    inputs = Preprocess(**IMAGE, resize="stretch", interpolation=interpolation).apply(pixels)
    expected = Image.fromarray(pixels).resize((6, 8), Image.Resampling[interpolation.upper()])
    assert np.array_equal(inputs, np.asarray(expected).transpose(2, 0, 1))


@pytest.mark.parametrize(("height", "width", "resized"), [(20, 31, (10, 15)), (31, 20, (15, 10)), (10, 17, (10, 17))])
def test_the_shorter_side_is_resized_and_the_centre_cropped(height: int, width: int, resized: tuple[int, int]) -> None:
    pixels = random_pixels(height, width, 3)
    inputs = Preprocess(**IMAGE, resize="shorter", shorter_side=10, interpolation="bilinear").apply(pixels)
    image = np.asarray(Image.fromarray(pixels).resize((resized[1], resized[0]), Image.Resampling.BILINEAR))
    top, left = round((resized[0] - 8) / 2), round((resized[1] - 6) / 2)
    assert np.array_equal(inputs, image[top : top + 8, left : left + 6].transpose(2, 0, 1))


def test_small_images_are_enlarged() -> None:
    options: dict[str, Any] = {"resize": "shorter", "shorter_side": 8, "interpolation": "bicubic"}
    assert Preprocess(**IMAGE, **options).apply(random_pixels(1, 1, 3)).shape == (3, 8, 6)


def test_an_image_of_another_size_is_refused_where_no_resize_is_declared() -> None:
    message = r"expected an image of 8 x 6 pixels \(height x width\), got 6 x 8; resize it, or declare a resize"
    with pytest.raises(SampleError, match=message):
        Preprocess(**IMAGE).apply(random_pixels(6, 8, 3))


@pytest.mark.parametrize("dtype", ["u1", "?", "<i8", "<f2", "<f8"])
def test_a_row_of_an_array_keeps_its_shape_and_becomes_float32(dtype: str) -> None:
    row = (np.random.default_rng(0).normal(size=(2, 5)) * 9).astype(dtype)
    inputs = Preprocess(kind="array", shape=(2, 5)).apply(row)
    assert inputs.dtype == np.float32
    assert np.array_equal(inputs, row.astype(np.float32))


def test_scale_mean_and_std_of_an_array_are_one_number_or_one_for_each_place_of_the_first_axis() -> None:
    row = np.arange(6.0).reshape(2, 3)
    one = Preprocess(kind="array", shape=(2, 3), scale=2.0, mean=(1.0,), std=(4.0,)).apply(row)
    assert np.array_equal(one, (row * 2 - 1) / 4)
    two = Preprocess(kind="array", shape=(2, 3), mean=(1.0, 2.0), std=(1.0, 0.5)).apply(row)
    assert np.array_equal(two, (row - [[1], [2]]) / [[1], [0.5]])


def test_values_that_are_not_finite_pass_without_a_warning() -> None:
    row = np.array([np.nan, np.inf, 1e300])
    inputs = Preprocess(kind="array", shape=(3,), scale=2.0).apply(row)
    assert np.isnan(inputs[0])
    assert np.isinf(inputs[1:]).all()


def test_tokens_become_int64_and_keep_their_numbers() -> None:
    samples = np.array([[[2**32 - 1, 7, 0], [0, 1, 0]]], "<u4")
    preprocess = Preprocess(kind="tokens", shape=(2, 3))
    inputs = preprocess.apply_rows(samples)
    assert inputs.dtype == preprocess.dtype == np.int64
    assert np.array_equal(inputs, samples)
    assert np.array_equal(preprocess.apply(samples[0]), samples[0])
    assert Preprocess.from_json(json.loads(json.dumps(preprocess.to_json()))) == preprocess
    assert Preprocess(**IMAGE).dtype == Preprocess(kind="array", shape=(3,)).dtype == np.float32
    with pytest.raises(SampleError, match=r"expected tokens of shape \(2, 3\), got \(2, 4\); mend the sample"):
        preprocess.apply(np.zeros((2, 4), "<u4"))


def test_a_row_of_another_shape_is_refused() -> None:
    with pytest.raises(SampleError, match=r"expected a row of shape \(3,\), got \(4,\); mend the sample"):
        Preprocess(kind="array", shape=(3,)).apply(np.zeros(4))


def test_a_declaration_of_version_1_gives_these_numbers_for_good() -> None:
    """If this fails, the same declaration means something else: raise PREPROCESS_VERSION, do not mend the numbers."""
    pixels = (np.arange(7 * 5 * 3) * 37 % 256).astype(np.uint8).reshape(7, 5, 3)
    shorter = Preprocess(
        kind="image",
        shape=(3, 2, 2),
        resize="shorter",
        shorter_side=3,
        interpolation="bilinear",
        scale=1 / 255,
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.25, 0.5),
    )
    assert shorter.apply(pixels).ravel().tolist() == GOLDEN_SHORTER
    grey = Preprocess(kind="image", shape=(1, 2, 3), resize="stretch", interpolation="bicubic")
    assert grey.apply(pixels).ravel().tolist() == GOLDEN_GREY
    row = Preprocess(kind="array", shape=(3,), scale=0.1, mean=(0.2,), std=(0.3,))
    assert row.apply(np.array([1.0, 2.0, 3.0])).tolist() == GOLDEN_ROW


GOLDEN_SHORTER = [
    0.18627464771270752,
    -0.3039214015007019,
    0.18627464771270752,
    0.22549033164978027,
    0.6588236093521118,
    0.4862746000289917,
    0.6588236093521118,
    0.4549020528793335,
    0.3647059202194214,
    0.3803921937942505,
    0.5843137502670288,
    0.5921568870544434,
]
GOLDEN_GREY = [122.0, 116.0, 124.0, 135.0, 129.0, 134.0]
GOLDEN_ROW = [-0.3333333134651184, 0.0, 0.3333333432674408]


@given(st.data())
def test_many_samples_at_once_give_what_each_gives_alone(data: st.DataObject) -> None:
    channels = data.draw(st.sampled_from([1, 3]))
    height, width = data.draw(st.tuples(st.integers(1, 12), st.integers(1, 12)))
    target = data.draw(st.tuples(st.integers(1, 8), st.integers(1, 8)))
    resize = data.draw(st.sampled_from(["none", "stretch", "shorter"]))
    out_channels = data.draw(st.sampled_from([1, 3]))
    options: dict[str, Any] = {"shape": (out_channels, *((height, width) if resize == "none" else target))}
    if resize != "none":
        options |= {"resize": resize, "interpolation": data.draw(st.sampled_from(["bilinear", "bicubic", "nearest"]))}
    if resize == "shorter":
        options["shorter_side"] = max(target) + data.draw(st.integers(0, 3))
    if data.draw(st.booleans()):
        options |= {"mean": (0.3,) * out_channels, "std": (0.2,) * out_channels}
    preprocess = Preprocess(kind="image", scale=data.draw(st.sampled_from([1.0, 1 / 255])), **options)
    images = random_pixels(3, height, width, channels)
    inputs = preprocess.apply_rows(images)
    assert inputs.shape == (3, *preprocess.shape)
    for image, one in zip(images, inputs, strict=True):
        assert np.array_equal(preprocess.apply(image), one)


# JSON


@given(
    st.sampled_from(["none", "stretch", "shorter"]),
    st.floats(1e-30, 1e30) | st.floats(-1e30, -1e-30),
    st.none() | st.tuples(*[st.floats(-1e30, 1e30)] * 3),
    st.none() | st.tuples(*[st.floats(1e-30, 1e30)] * 3),
)
def test_a_declaration_comes_back_from_json_exactly(resize: Any, scale: float, mean: Any, std: Any) -> None:
    options: dict[str, Any] = {} if resize == "none" else {"interpolation": "lanczos"}
    if resize == "shorter":
        options["shorter_side"] = 9
    preprocess = Preprocess(**IMAGE, resize=resize, scale=scale, mean=mean, std=std, **options)
    again = Preprocess.from_json(json.loads(json.dumps(preprocess.to_json())))
    assert again == preprocess
    assert again.to_json() == preprocess.to_json()


def test_a_newer_version_is_refused() -> None:
    with pytest.raises(FormatVersionError, match="preprocess: expected version 1, got 2; install a newer release"):
        Preprocess.from_json(Preprocess(**IMAGE).to_json() | {"version": 2})


@pytest.mark.parametrize(
    "change", [{"kind": "sound"}, {"shape": 3}, {"shape": "abc"}, {"mean": ["x", 1, 2]}, {"scale": "1"}, {"more": 1}]
)
def test_a_damaged_declaration_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(DamageError, match="preprocess: expected a valid declaration, got another"):
        Preprocess.from_json(Preprocess(**IMAGE).to_json() | change)


def test_a_declaration_that_lacks_a_field_is_refused() -> None:
    value = Preprocess(**IMAGE).to_json()
    del value["scale"]
    for damaged in (value, {}, None, [1]):
        with pytest.raises(DamageError, match="preprocess: expected a valid declaration, got another"):
            Preprocess.from_json(damaged)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"version": 2}, "version: expected 1, got 2"),
        ({"kind": "sound"}, "kind: expected image, array, tokens, got 'sound'"),
        ({"shape": ()}, "shape: expected sizes of at least 1"),
        ({"shape": (3, 0, 2)}, "shape: expected sizes of at least 1"),
        ({"shape": (3.0, 2, 2)}, "shape: expected sizes of at least 1"),
        ({"shape": (2, 8, 6)}, r"shape: expected \(C, H, W\) with C 1 or 3"),
        ({"shape": (8, 6)}, r"shape: expected \(C, H, W\) with C 1 or 3"),
        ({"resize": "wide"}, "resize: expected none, stretch, shorter, got 'wide'"),
        ({"kind": "array", "resize": "stretch"}, "resize: expected none for an array, got 'stretch'"),
        ({"interpolation": "bilinear"}, "interpolation: expected one with a resize and none without"),
        ({"resize": "stretch"}, "interpolation: expected one with a resize and none without"),
        ({"resize": "stretch", "interpolation": "cubic"}, "interpolation: expected bilinear, bicubic, .* got 'cubic'"),
        ({"shorter_side": 9}, "shorter_side: expected pixels with the resize shorter and none without"),
        ({"resize": "shorter", "interpolation": "nearest"}, "shorter_side: expected pixels with the resize shorter"),
        ({"resize": "shorter", "interpolation": "nearest", "shorter_side": 7}, "shorter_side: expected at least 8"),
        ({"resize": "shorter", "interpolation": "nearest", "shorter_side": 8.5}, "shorter_side: expected at least 8"),
        ({"scale": 0.0}, "scale: expected a size of 1e-30 to 1e30, got 0.0"),
        ({"scale": float("nan")}, "scale: expected a size of 1e-30 to 1e30, got nan"),
        ({"scale": -1e40}, "scale: expected a size of 1e-30 to 1e30"),
        ({"mean": (0.5,)}, r"mean: expected 3 number\(s\), one a channel"),
        ({"mean": (0.5, 0.5, float("inf"))}, "mean: expected 3 number"),
        ({"kind": "array", "mean": (1.0, 2.0)}, "mean: expected 1 or 3 number"),
        ({"std": (0.5, 0.5)}, "std: expected 3 number"),
        ({"std": (0.5, 0.0, 1.0)}, "std: expected numbers of 1e-30 to 1e30"),
        ({"kind": "tokens"}, r"shape: expected \(2, P \+ 1\) with P at least 1 for tokens, got \(3, 8, 6\)"),
        ({"kind": "tokens", "shape": (2, 1)}, r"shape: expected \(2, P \+ 1\) with P at least 1 for tokens"),
        ({"kind": "tokens", "shape": (2, 5), "resize": "stretch"}, "resize: expected none for tokens, got 'stretch'"),
        ({"kind": "tokens", "shape": (2, 5), "scale": 2.0}, "scale: expected 1.0 for tokens, got 2.0; leave it out"),
        ({"kind": "tokens", "shape": (2, 5), "mean": (0.0,)}, "mean: expected None for tokens, got .*; leave it out"),
        ({"kind": "tokens", "shape": (2, 5), "std": (1.0,)}, "std: expected None for tokens, got .*; leave it out"),
    ],
)
def test_a_declaration_that_can_not_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preprocess(**{**IMAGE, **options})


# What a corpus asks for


def test_images_of_one_size_are_taken_as_they_are(tmp_path: Path) -> None:
    corpus = open_corpus(write_images(tmp_path, (8, 6, 3), (8, 6, 1)))
    assert default_preprocess(corpus) == Preprocess(**IMAGE, scale=1 / 255)


def test_grey_images_keep_one_channel_and_other_wishes_are_followed(tmp_path: Path) -> None:
    corpus = open_corpus(write_idx(tmp_path, size=(6, 5)))
    assert default_preprocess(corpus).shape == (1, 6, 5)
    wished = default_preprocess(corpus, channels=3, scale=1, mean=[1, 2, 3], std=[1, 1, 1])
    assert wished == Preprocess(kind="image", shape=(3, 6, 5), mean=(1.0, 2.0, 3.0), std=(1.0, 1.0, 1.0))
    assert json.loads(json.dumps(wished.to_json())) == wished.to_json()


def test_images_turned_by_exif_count_as_they_are_decoded(tmp_path: Path) -> None:
    write_images(tmp_path, (8, 6, 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "turned.jpg").write_bytes(image_bytes(random_pixels(6, 8, 3), ".jpg", exif=exif))
    corpus = open_corpus(tmp_path)
    assert default_preprocess(corpus).shape == (3, 8, 6)


def test_mixed_sizes_need_a_size(tmp_path: Path) -> None:
    corpus = open_corpus(write_images(tmp_path, (8, 6, 3), (6, 8, 3)))
    message = r"got 8 x 6 pixels \('000.png'\) and 6 x 8 \('001.png'\); say the size that the model takes: --image-size"
    with pytest.raises(CorpusError, match=message):
        default_preprocess(corpus)
    expected = Preprocess(
        kind="image", shape=(3, 4, 5), resize="shorter", shorter_side=5, interpolation="bilinear", scale=1 / 255
    )
    assert default_preprocess(corpus, size=(4, 5)) == expected


def test_a_size_may_be_a_square_with_a_longer_side_before_the_crop_or_a_stretch(tmp_path: Path) -> None:
    corpus = open_corpus(write_images(tmp_path, (8, 6, 3)))
    cropped = default_preprocess(corpus, size=224, shorter_side=256, interpolation="bicubic")
    assert (cropped.shape, cropped.shorter_side, cropped.interpolation) == ((3, 224, 224), 256, "bicubic")
    stretched = default_preprocess(corpus, size=224, resize="stretch")
    assert (stretched.resize, stretched.shorter_side, stretched.interpolation) == ("stretch", None, "bilinear")
    plain = default_preprocess(corpus, size=(8, 6), resize="none")
    assert plain == default_preprocess(corpus)


@pytest.mark.parametrize(
    "options", [{"resize": "stretch"}, {"shorter_side": 9}, {"interpolation": "bicubic"}, {"resize": "shorter"}]
)
def test_an_option_that_needs_a_size_is_refused_without_one(tmp_path: Path, options: dict[str, Any]) -> None:
    corpus = open_corpus(write_images(tmp_path, (8, 6, 3)))
    with pytest.raises(
        ValueError, match=f"{next(iter(options))}: expected a size beside it, got none; give --image-size"
    ):
        default_preprocess(corpus, **options)


def test_damaged_images_do_not_decide_but_some_must_be_readable(tmp_path: Path) -> None:
    write_images(tmp_path, (8, 6, 3))
    (tmp_path / "broken.png").write_bytes(b"broken")
    assert default_preprocess(open_corpus(tmp_path)).shape == (3, 8, 6)
    (tmp_path / "000.png").unlink()
    with pytest.raises(
        CorpusError, match=r"expected samples that can be read, got none; the first is 'broken.png': exp"
    ):
        default_preprocess(open_corpus(tmp_path))


def test_rows_of_an_array_keep_their_shape(tmp_path: Path) -> None:
    corpus = open_corpus(write_npz(tmp_path / "a.npz"))
    assert default_preprocess(corpus) == Preprocess(kind="array", shape=(6,))
    assert default_preprocess(corpus, mean=[1.0], std=[2.0], scale=0.5).std == (2.0,)


@pytest.mark.parametrize(
    "options",
    [{"size": 8}, {"resize": "stretch"}, {"shorter_side": 8}, {"interpolation": "bicubic"}, {"channels": 3}],
)
def test_an_option_of_images_is_refused_for_arrays(tmp_path: Path, options: dict[str, Any]) -> None:
    corpus = open_corpus(write_npz(tmp_path / "a.npz"))
    with pytest.raises(
        ValueError, match=f"{next(iter(options))}: expected a corpus of images, got arrays; leave it out"
    ):
        default_preprocess(corpus, **options)


def test_a_preprocessing_of_another_kind_or_shape_does_not_fit(tmp_path: Path) -> None:
    arrays, images = open_corpus(write_npz(tmp_path / "a.npz")), open_corpus(write_images(tmp_path / "b", (8, 6, 3)))
    check_preprocess(default_preprocess(arrays), arrays)
    check_preprocess(default_preprocess(images), images)
    check_preprocess(default_preprocess(images, channels=1), images)
    check_preprocess(default_preprocess(images, size=20), images)
    with pytest.raises(
        CorpusError, match="expected samples of the kind array, got image; give the corpus that the store"
    ):
        check_preprocess(default_preprocess(arrays), images)
    with pytest.raises(CorpusError, match=r"expected samples of shape \(7,\), got \(6,\); give samples of the shape"):
        check_preprocess(Preprocess(kind="array", shape=(7,)), arrays)
    with pytest.raises(
        CorpusError, match=r"expected samples of shape \(9, 9\), got \(8, 6\); give samples of the shape"
    ):
        check_preprocess(Preprocess(kind="image", shape=(3, 9, 9)), images)


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    np.save(tmp_path / "ids.npy", np.arange(20))
    return tmp_path / "ids.npy"


def test_tokens_are_taken_as_they_are_and_have_no_options(tokens: Path) -> None:
    corpus = open_corpus(tokens, sequence=SequenceOptions(4))
    assert default_preprocess(corpus) == Preprocess(kind="tokens", shape=(2, 5))
    refused: list[dict[str, Any]] = [
        {"image_size": 8},
        {"resize": "stretch"},
        {"shorter_side": 8},
        {"interpolation": "bicubic"},
        {"channels": 3},
        {"scale": 1.0},
        {"mean": [0.0]},
        {"std": [1.0]},
    ]
    for options in refused:
        name = next(iter(options))
        given = {name.replace("image_size", "size"): options[name]}
        with pytest.raises(
            ValueError, match=f"{name}: expected a corpus of images or arrays, got tokens; leave it out"
        ):
            default_preprocess(corpus, **given)


def test_ids_that_can_not_be_are_refused_before_anything_is_done(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.arange(20) - 1)
    with pytest.raises(CorpusError, match="row 0, position 0: expected token ids from 0 to 4294967295, got -1"):
        default_preprocess(open_corpus(tmp_path / "ids.npy", sequence=SequenceOptions(4)))


def test_sequences_of_another_length_do_not_fit(tokens: Path) -> None:
    one, other = (open_corpus(tokens, sequence=SequenceOptions(length)) for length in (4, 5))
    preprocess = default_preprocess(one)
    check_preprocess(preprocess, one)
    with pytest.raises(
        CorpusError, match=r"expected sequences of 4 positions, got 5; give the length that .*: --sequence-length 4"
    ):
        check_preprocess(preprocess, other)
    with pytest.raises(CorpusError, match="expected samples of the kind array, got tokens; give the corpus that the"):
        check_preprocess(Preprocess(kind="array", shape=(2, 5)), one)


def test_real_photographs_of_one_size_need_no_options(shared_data: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        preprocess = default_preprocess(open_corpus(shared_data / "cifar10-sample" / "test"))
    assert preprocess == Preprocess(kind="image", shape=(3, 32, 32), scale=1 / 255)
