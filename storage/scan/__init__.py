"""Whole-store passes on dask's threads, shard by shard: memory depends on a shard and the cores, never on the rows."""

from storage.scan.conversion import ConvertResult, check_target, convert
from storage.scan.figures import Agreement, Entropy, KeptMass, Refused, Stats, class_label
from storage.scan.picture import check_picture_path, write_picture
from storage.scan.statistics import stats
from storage.scan.verification import Damage, VerifyResult, verify

__all__ = [
    "Agreement",
    "ConvertResult",
    "Damage",
    "Entropy",
    "KeptMass",
    "Refused",
    "Stats",
    "VerifyResult",
    "check_picture_path",
    "check_target",
    "class_label",
    "convert",
    "stats",
    "verify",
    "write_picture",
]
