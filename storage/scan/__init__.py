"""Whole-store passes on dask's threads, shard by shard: memory depends on a shard and the cores, never on the rows."""

from storage.scan.class_mass import class_mass
from storage.scan.combine_options import CombineOptions
from storage.scan.combining import CombineResult, combine
from storage.scan.conversion import ConvertResult, check_target, convert
from storage.scan.copying import CopyResult, copy
from storage.scan.difference import DiffResult, diff
from storage.scan.figures import Agreement, ClassMass, Entropy, KeptMass, Refused, Stats, class_label
from storage.scan.picture import check_picture_path, write_picture
from storage.scan.selection import Selection, choose, parse_rows
from storage.scan.statistics import stats
from storage.scan.verification import Damage, VerifyResult, verify

__all__ = [
    "Agreement",
    "ClassMass",
    "CombineOptions",
    "CombineResult",
    "ConvertResult",
    "CopyResult",
    "Damage",
    "DiffResult",
    "Entropy",
    "KeptMass",
    "Refused",
    "Selection",
    "Stats",
    "VerifyResult",
    "check_picture_path",
    "check_target",
    "choose",
    "class_label",
    "class_mass",
    "combine",
    "convert",
    "copy",
    "diff",
    "parse_rows",
    "stats",
    "verify",
    "write_picture",
]
