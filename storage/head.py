"""The head of a `hidden` store as it lies beside the arrays: plain .npy records, written before the manifest.

The manifest's encoding names the sha256 of their bytes, so that another head can't be read in their place.

Legend: C classes, W width of the hidden state.
"""

import hashlib
import io
import math
from collections.abc import Callable

import numpy as np

from storage.arrays import Array
from storage.encodings.hidden import HeadArrays, Hidden
from storage.errors import DamageError

HEAD_FOLDER = "head"
HEAD_WEIGHT = f"{HEAD_FOLDER}/weight.npy"
HEAD_BIAS = f"{HEAD_FOLDER}/bias.npy"
HEAD_TYPES = ("float16", "float32")


def check_head(head: HeadArrays, encoding: Hidden, num_classes: int) -> None:
    """Refuse a head that is not the one of an encoding.

    Raises:
        ValueError: its shape or type is another, or its digest is not the one that the encoding names.
    """
    wrong = _wrong_arrays(head, encoding, num_classes)
    if wrong:
        raise ValueError(f"head: expected {wrong}")
    if head_digest(head) != encoding.head_sha256:
        raise ValueError("head: expected the one whose digest the encoding names, got another")


def head_records(head: HeadArrays) -> dict[str, bytes]:
    """The bytes of each record of a head, by name, the weight's first."""
    records = {HEAD_WEIGHT: _npy_bytes(head.weight_CW)}
    if head.bias_C is not None:
        records[HEAD_BIAS] = _npy_bytes(head.bias_C)
    return records


def head_digest(head: HeadArrays) -> str:
    """sha256 of the bytes of a head's records, one after the other, as hex."""
    return _digest(head_records(head))


def read_head(get_record: Callable[[str], bytes | None], encoding: Hidden, num_classes: int, where: str) -> HeadArrays:
    """The head of a store, held against the digest in its manifest.

    Args:
        get_record: a record's bytes by name, None where there is none.
        encoding: of the store.
        num_classes: of the store.
        where: the store, for messages.

    Raises:
        DamageError: it is missing, or not the one that the manifest names.
    """
    names = (HEAD_WEIGHT, HEAD_BIAS) if encoding.has_bias else (HEAD_WEIGHT,)
    records = {}
    for name in names:
        data = get_record(name)
        if data is None:
            raise DamageError(f"{where}: expected {name}, got none; take another copy of the store")
        records[name] = data
    if _digest(records) != encoding.head_sha256:
        raise DamageError(
            f"{where}: {' and '.join(names)}: expected the digest in the manifest to hold, got another; take another "
            "copy of the store"
        )
    try:
        arrays = [_loaded(data) for data in records.values()]
    except ValueError as error:  # its digest holds: it was written so
        raise DamageError(f"{where}: {HEAD_WEIGHT}: expected plain .npy records, got {error}; dump it again") from error
    head = HeadArrays(arrays[0], arrays[1] if encoding.has_bias else None)
    wrong = _wrong_arrays(head, encoding, num_classes)
    if wrong:
        raise DamageError(f"{where}: {HEAD_WEIGHT}: expected {wrong}; dump it again")
    return head


def _wrong_arrays(head: HeadArrays, encoding: Hidden, num_classes: int) -> str:
    """What a head is otherwise than the encoding and the classes ask for; empty where it is as it should be."""
    for name, values, shape in (
        ("weight", head.weight_CW, (num_classes, encoding.width)),
        ("bias", head.bias_C, (num_classes,) if encoding.has_bias else None),
    ):
        if values is None or shape is None:
            if values is not None or shape is not None:
                return f"{'a' if shape else 'no'} {name}, got {'none' if values is None else 'one'}"
            continue
        if values.shape != shape or values.dtype.name not in HEAD_TYPES:
            return f"a {name} of {' or '.join(HEAD_TYPES)} {shape}, got {values.dtype} {values.shape}"
        if not np.isfinite(values).all():
            return f"a {name} of finite numbers, got others"
    return ""


def _loaded(data: bytes) -> Array:
    """The array of a .npy record, whose header must claim just the bytes that are there."""
    file = io.BytesIO(data)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("another version of the format")
    shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
    if is_fortran or dtype.kind not in "biuf":
        raise ValueError(f"{dtype} in Fortran's order" if is_fortran else f"{dtype}")
    if math.prod(shape) * dtype.itemsize != len(data) - file.tell():
        raise ValueError(f"a shape {shape} in {len(data)} bytes")
    return np.frombuffer(data, dtype, offset=file.tell()).reshape(shape).copy()  # torch takes none that is read-only


def _npy_bytes(values: Array) -> bytes:
    buffer = io.BytesIO()
    little = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
    np.lib.format.write_array(buffer, little, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def _digest(records: dict[str, bytes]) -> str:
    state = hashlib.sha256()
    for data in records.values():
        state.update(data)
    return state.hexdigest()
