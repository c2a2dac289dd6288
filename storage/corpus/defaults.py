"""The preprocessing that a corpus asks for, and whether one fits a corpus."""

from collections.abc import Mapping, Sequence

from storage.corpus.images import image_shape
from storage.corpus.preprocess import Interpolation, Preprocess, Resize
from storage.corpus.protocol import Corpus, ReadsRows, SampleError, spread_rows
from storage.errors import CorpusError

# Samples whose headers are looked at to find the size and channels of a corpus of image files.
NUM_PROBED = 64


def default_preprocess(
    corpus: Corpus,
    size: int | tuple[int, int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    *,
    resize: Resize | None = None,
    shorter_side: int | None = None,
    interpolation: Interpolation | None = None,
    channels: int | None = None,
    scale: float | None = None,
    like: Preprocess | None = None,
) -> Preprocess:
    """How the samples of a corpus become inputs, where the options say nothing else: values in [0, 1] for images.

    Tokens are taken as they are, and have no options. Images of one size are taken as they are. With a size their
    shorter side is resized to it, or to `shorter_side`, with bilinear interpolation, and the rest cropped; with the
    resize `stretch` they are stretched.

    Args:
        corpus: some of its samples are looked at.
        size: pixels of a square, or (height, width).
        mean: one number for each channel; None subtracts nothing.
        std: one number for each channel; None divides by nothing.
        resize: `shorter` or `stretch`; None is `shorter` where there is a size.
        shorter_side: pixels of the shorter side before the crop; None is the larger of height and width.
        interpolation: None is bilinear where there is a resize.
        channels: 1 or 3; None is 1 where all samples looked at are grey, else 3.
        scale: None is 1/255 for images, 1 for arrays.
        like: of other images of this corpus, whose size and channels it has then; none of these is looked at.

    Raises:
        CorpusError: images of several sizes and no size; or none that can be read.
        ValueError: an option is out of range, or would be ignored.
    """
    mean, std = _floats(mean), _floats(std)
    options = {"image_size": size, "resize": resize, "shorter_side": shorter_side, "interpolation": interpolation}
    if corpus.sample_kind == "tokens":
        _refuse({**options, "channels": channels, "scale": scale, "mean": mean, "std": std}, "images or arrays", corpus)
        return Preprocess(kind="tokens", shape=_probe(corpus)[0][1])
    if corpus.sample_kind == "array":
        _refuse({**options, "channels": channels}, "images", corpus)
        shape = _probe(corpus)[0][1]
        factor = 1.0 if scale is None else float(scale)
        return Preprocess(kind="array", shape=shape, scale=factor, mean=mean, std=std)
    shapes = _probe(corpus) if like is None else [("", (*like.shape[1:], like.shape[0]))]
    if channels is None:
        channels = max(shape[2] for _, shape in shapes)
    factor = 1 / 255 if scale is None else float(scale)
    if size is None:
        for name, value in options.items():
            if value is not None and (name, value) != ("resize", "none"):
                raise ValueError(f"{name}: expected a size beside it, got none; give --image-size too")
        height, width = _only_size(corpus, shapes)
        return Preprocess(kind="image", shape=(channels, height, width), scale=factor, mean=mean, std=std)
    height, width = (size, size) if isinstance(size, int) else size
    resize = resize or "shorter"
    if resize == "shorter" and shorter_side is None:
        shorter_side = max(height, width)
    return Preprocess(
        kind="image",
        shape=(channels, height, width),
        resize=resize,
        shorter_side=shorter_side,
        interpolation=interpolation or (None if resize == "none" else "bilinear"),
        scale=factor,
        mean=mean,
        std=std,
    )


def check_preprocess(preprocess: Preprocess, corpus: Corpus) -> None:
    """Refuse a preprocessing that can't be applied to any of the samples looked at.

    Raises:
        CorpusError: the corpus is of another kind, or its samples are of another shape.
    """
    where = f"corpus '{corpus.path}'"
    if preprocess.kind != corpus.sample_kind:
        raise CorpusError(
            f"{where}: expected samples of the kind {preprocess.kind}, got {corpus.sample_kind}; "
            "give the corpus that the store was made from"
        )
    shapes = {shape for _, shape in _probe(corpus)}
    if preprocess.kind == "tokens":
        wanted_length, length = preprocess.shape[1] - 1, min(shapes)[1] - 1
        if wanted_length != length:
            raise CorpusError(
                f"{where}: expected sequences of {wanted_length} positions, got {length}; give the length that the "
                f"store was made with: --sequence-length {wanted_length}"
            )
        return
    wanted = preprocess.shape if preprocess.kind == "array" else preprocess.shape[1:]
    got = {shape if preprocess.kind == "array" else shape[:2] for shape in shapes}
    if preprocess.resize == "none" and wanted not in got:
        raise CorpusError(
            f"{where}: expected samples of shape {wanted}, got {min(got)}; "
            "give samples of the shape that the store was made from"
        )


def _refuse(options: Mapping[str, object], kinds: str, corpus: Corpus) -> None:
    """Refuse options that this corpus has no use for.

    Raises:
        ValueError: one of them is given.
    """
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"{name}: expected a corpus of {kinds}, got {corpus.kind}; leave it out")


def _floats(values: Sequence[float] | None) -> tuple[float, ...] | None:
    return None if values is None else tuple(float(value) for value in values)


def _probe(corpus: Corpus) -> list[tuple[str, tuple[int, ...]]]:
    """Key and shape of some samples: of one where all are alike, else of `NUM_PROBED`, without those that are damaged.

    Raises:
        CorpusError: none of them can be read.
    """
    files = corpus.sample_kind == "image" and not isinstance(corpus, ReadsRows)
    reason, shapes = "", []
    for row in spread_rows(corpus.num_samples, NUM_PROBED, corpus.kind):
        try:
            raw = corpus.read_raw(row)
            shape: tuple[int, ...] = image_shape(raw) if files else corpus.decode(raw).shape
        except SampleError as error:
            reason = reason or f"{corpus.key(row)!r}: {error}"
            continue
        shapes.append((corpus.key(row), shape))
        if not files:
            break
    if not shapes:
        raise CorpusError(f"corpus '{corpus.path}': expected samples that can be read, got none; the first is {reason}")
    return shapes


def _only_size(corpus: Corpus, shapes: Sequence[tuple[str, tuple[int, ...]]]) -> tuple[int, int]:
    """The one size (height, width) of samples.

    Raises:
        CorpusError: they have several.
    """
    first_key, (height, width, _) = shapes[0]
    for key, shape in shapes:
        if shape[:2] != (height, width):
            raise CorpusError(
                f"corpus '{corpus.path}': expected images of one size, got {height} x {width} pixels ({first_key!r}) "
                f"and {shape[0]} x {shape[1]} ({key!r}); say the size that the model takes: --image-size"
            )
    return height, width
