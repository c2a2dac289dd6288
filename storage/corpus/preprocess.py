"""How a sample becomes a model's input: one declared, versioned value, the same code for teacher and student.

Legend: N rows, H height, W width, C channels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from storage.corpus.protocol import Array, SampleError, SampleKind
from storage.errors import DamageError, FormatVersionError

Resize = Literal["none", "stretch", "shorter"]
Interpolation = Literal["bilinear", "bicubic", "lanczos", "nearest"]

# Raised when the same declaration would give other numbers than before.
PREPROCESS_VERSION = 1

# Numbers that float32 holds as what they are, with room for what they are multiplied by.
_SMALLEST, _LARGEST = 1e-30, 1e30

_FILTERS: Mapping[str, Image.Resampling] = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
}


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """A sample's way to a model's input: for images and arrays float32, by channels, resize, crop, scale, mean, std.

    An image goes from uint8 (H, W, C) to (C, H, W): grey is repeated into RGB, or RGB weighed into grey; it is resized
    with antialiasing; cropped around its centre; and each value x becomes ((x * scale) - mean) / std in float32. The
    row of an array keeps its shape; its values become float32, then the same. Tokens become int64, unchanged.

    Attributes:
        kind: `image`, `array` or `tokens`.
        shape: of one input: (C, H, W) with C 1 or 3; the row's shape; or (2, P + 1) for sequences of P positions.
        resize: `none` (the sample has just this size), `stretch` (to this size), or `shorter` (the shorter side to
            `shorter_side` pixels, what is over cropped around the centre).
        shorter_side: pixels, at least the larger of H and W; only with `shorter`.
        interpolation: `bilinear`, `bicubic`, `lanczos` or `nearest`; only with a resize.
        scale: factor, from 1e-30 to 1e30 or the same below 0; 1/255 takes bytes to [0, 1].
        mean: subtracted, one number for each channel; None subtracts nothing. For an array one number, or one for each
            place of the row's first axis.
        std: divided by, from 1e-30 to 1e30, as many as `mean` could have; None divides by nothing.
        version: 1.

    Raises:
        ValueError: a field is out of range, or would be ignored.
    """

    kind: SampleKind
    shape: tuple[int, ...]
    resize: Resize = "none"
    shorter_side: int | None = None
    interpolation: Interpolation | None = None
    scale: float = 1.0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    version: int = PREPROCESS_VERSION

    def __post_init__(self) -> None:
        if self.version != PREPROCESS_VERSION:
            raise ValueError(f"version: expected {PREPROCESS_VERSION}, got {self.version}")
        if self.kind not in get_args(SampleKind):
            raise ValueError(f"kind: expected {', '.join(get_args(SampleKind))}, got {self.kind!r}")
        self._check_shape()
        self._check_resize()
        if not _SMALLEST <= abs(self.scale) <= _LARGEST:
            raise ValueError(f"scale: expected a size of 1e-30 to 1e30, got {self.scale}")
        lengths = (self.shape[0],) if self.kind == "image" else (1, self.shape[0])
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is None:
                continue
            if len(values) not in lengths or not all(abs(value) <= _LARGEST for value in values):
                counts = " or ".join(map(str, sorted(set(lengths))))
                raise ValueError(f"{name}: expected {counts} number(s), one a channel, got {list(values)}")
        if self.std is not None and any(value < _SMALLEST for value in self.std):
            raise ValueError(f"std: expected numbers of 1e-30 to 1e30, got {list(self.std)}")

    def _check_shape(self) -> None:
        if not self.shape or any(not isinstance(size, int) or size < 1 for size in self.shape):
            raise ValueError(f"shape: expected sizes of at least 1, got {self.shape}")
        if self.kind == "image" and (len(self.shape) != 3 or self.shape[0] not in (1, 3)):
            raise ValueError(f"shape: expected (C, H, W) with C 1 or 3, got {self.shape}")
        if self.kind != "tokens":
            return
        if len(self.shape) != 2 or self.shape[0] != 2 or self.shape[1] < 2:
            raise ValueError(f"shape: expected (2, P + 1) with P at least 1 for tokens, got {self.shape}")
        for name, value, nothing in (("scale", self.scale, 1.0), ("mean", self.mean, None), ("std", self.std, None)):
            if value != nothing:
                raise ValueError(f"{name}: expected {nothing} for tokens, got {value}; leave it out")

    def _check_resize(self) -> None:
        if self.resize not in get_args(Resize):
            raise ValueError(f"resize: expected {', '.join(get_args(Resize))}, got {self.resize!r}")
        if self.kind != "image" and self.resize != "none":
            what = "an array" if self.kind == "array" else self.kind
            raise ValueError(f"resize: expected none for {what}, got {self.resize!r}; leave it out")
        if (self.interpolation is None) != (self.resize == "none"):
            raise ValueError(
                f"interpolation: expected one with a resize and none without, got {self.interpolation!r} with the "
                f"resize {self.resize!r}"
            )
        if self.interpolation is not None and self.interpolation not in _FILTERS:
            raise ValueError(f"interpolation: expected {', '.join(_FILTERS)}, got {self.interpolation!r}")
        if (self.shorter_side is None) == (self.resize == "shorter"):
            raise ValueError(
                f"shorter_side: expected pixels with the resize shorter and none without, got {self.shorter_side} with "
                f"the resize {self.resize!r}"
            )
        if self.shorter_side is not None and not max(self.shape[1:]) <= int(self.shorter_side) == self.shorter_side:
            raise ValueError(f"shorter_side: expected at least {max(self.shape[1:])}, got {self.shorter_side}")

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the inputs: int64 for tokens, else float32."""
        return np.dtype(np.int64 if self.kind == "tokens" else np.float32)

    def apply(self, sample: Array) -> Array:
        """The input of one sample: `dtype`, `shape`.

        Raises:
            SampleError: the sample is of another size, and no resize is declared.
        """
        inputs: Array = self.apply_rows(sample[None])[0]
        return inputs

    def apply_rows(self, samples: Array) -> Array:
        """The inputs of samples of one shape: `dtype`, (N, ...), each as `apply` gives it.

        Raises:
            SampleError: the samples are of another size, and no resize is declared.
        """
        if self.kind == "tokens":
            if samples.shape[1:] != self.shape:
                raise SampleError(f"expected tokens of shape {self.shape}, got {samples.shape[1:]}; mend the sample")
            return samples.astype(np.int64)
        if self.kind == "array":
            if samples.shape[1:] != self.shape:
                raise SampleError(f"expected a row of shape {self.shape}, got {samples.shape[1:]}; mend the sample")
            with np.errstate(over="ignore", invalid="ignore"):  # what is not finite shows in the teacher's logits
                return self._normalise(samples)
        fitted_NHWC = self._fit(_with_channels(samples, self.shape[0]))
        return self._normalise(fitted_NHWC.transpose(0, 3, 1, 2))

    def _fit(self, images_NHWC: Array) -> Array:
        """Resize and crop images of one size to `shape`."""
        height, width = images_NHWC.shape[1:3]
        target_h, target_w = self.shape[1:]
        if self.resize == "none":
            if (height, width) != (target_h, target_w):
                raise SampleError(
                    f"expected an image of {target_h} x {target_w} pixels (height x width), got {height} x {width}; "
                    "resize it, or declare a resize: --image-size"
                )
            return images_NHWC
        if self.resize == "stretch":
            return _resize(images_NHWC, (target_h, target_w), _FILTERS[str(self.interpolation)])
        assert self.shorter_side is not None
        size = shorter_size(height, width, self.shorter_side)
        resized_NHWC = _resize(images_NHWC, size, _FILTERS[str(self.interpolation)])
        top, left = round((size[0] - target_h) / 2), round((size[1] - target_w) / 2)
        return resized_NHWC[:, top : top + target_h, left : left + target_w]

    def _normalise(self, values: Array) -> NDArray[np.float32]:
        """((x * scale) - mean) / std in float32, in C order."""
        inputs = np.empty(values.shape, np.float32)
        if self.scale == 1:
            inputs[...] = values
        elif values.dtype == np.uint8:
            np.multiply(values, np.float32(self.scale), out=inputs)
        else:
            inputs[...] = values
            inputs *= np.float32(self.scale)
        if self.mean is not None:
            inputs -= self._per_channel(self.mean)
        if self.std is not None:
            inputs /= self._per_channel(self.std)
        return inputs

    def _per_channel(self, values: Sequence[float]) -> NDArray[np.float32]:
        """Numbers, one for each place of the first axis of a row, in a shape that broadcasts over a batch."""
        return np.array(values, np.float32).reshape(-1, *[1] * (len(self.shape) - 1))

    def to_json(self) -> dict[str, Any]:
        """The declaration as a JSON object."""
        value = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: list(item) if isinstance(item, tuple) else item for name, item in value.items()}

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """The declaration of a JSON object.

        Raises:
            FormatVersionError: it is of a newer version.
            DamageError: it is no such object.
        """
        version = value.get("version") if isinstance(value, Mapping) else None
        if isinstance(version, int) and version > PREPROCESS_VERSION:
            raise FormatVersionError(
                f"preprocess: expected version {PREPROCESS_VERSION}, got {version}; install a newer release"
            )
        try:
            options = dict(value)
            if set(options) != {item.name for item in fields(cls)}:
                raise ValueError(f"fields {', '.join(options)}")
            for name in ("shape", "mean", "std"):
                if options[name] is not None:
                    options[name] = tuple(options[name])
            return cls(**options)
        except (KeyError, TypeError, ValueError) as error:
            raise DamageError(
                f"preprocess: expected a valid declaration, got another ({error}); take another copy of the store"
            ) from error


def shorter_size(height: int, width: int, shorter_side: int) -> tuple[int, int]:
    """Height and width after the shorter side became `shorter_side` pixels; the longer side is rounded down.

    Source: torchvision's `Resize` with one number, whose rounding this follows.

    Example:
        >>> shorter_size(480, 640, 256)
        (256, 341)
    """
    if height <= width:
        return shorter_side, shorter_side * width // height
    return shorter_side * height // width, shorter_side


def _with_channels(images_NHWC: Array, num_channels: int) -> Array:
    """Images with 1 or 3 channels: grey repeated, or RGB weighed into grey as Pillow's `L` does."""
    if images_NHWC.shape[3] == num_channels:
        return images_NHWC
    if num_channels == 3:
        return np.broadcast_to(images_NHWC, (*images_NHWC.shape[:3], 3))
    # ITU-R 601-2 luma in 16-bit fixed point, rounded
    weighed = images_NHWC.astype(np.uint32) @ np.array([19595, 38470, 7471], np.uint32)
    return ((weighed + 0x8000) >> 16).astype(np.uint8)[..., None]


def _resize(images_NHWC: Array, size: tuple[int, int], resampling: Image.Resampling) -> Array:
    """Images resized to (height, width); those that have the size are left as they are."""
    if images_NHWC.shape[1:3] == size:
        return images_NHWC
    num_channels = images_NHWC.shape[3]
    resized = np.empty((len(images_NHWC), *size, num_channels), np.uint8)
    for image_HWC, out_HWC in zip(images_NHWC, resized, strict=True):
        pixels = np.ascontiguousarray(image_HWC[:, :, 0] if num_channels == 1 else image_HWC)
        image = Image.fromarray(pixels).resize((size[1], size[0]), resampling)
        out_HWC[...] = np.asarray(image).reshape(*size, num_channels)
    return resized
