"""What tells a broken run in its first minutes: what no healthy teacher says of a whole shard, or of a whole corpus.

Before the loop a pilot of rows from all over the corpus is scored (`teacherdump.alarm_pilot`), and each shard is looked
at before it is written. Every threshold errs on the side of going on: a run that is stopped for nothing costs more than
a broken one that is stopped an hour later.

Legend: N rows, P positions (1 where a row is one distribution), T temperatures, S values of a signature.
"""

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from storage.arrays import STATUS_NOT_FINITE, STATUS_OK, STATUS_UNDECODABLE, Array, Arrays
from storage.console import format_count
from storage.encodings import Dense, Hidden, TopK
from storage.encodings.statistics import FLOAT16_LOWEST
from storage.errors import AlarmError
from storage.manifest import Manifest
from teacherdump.config import ALARMS

# Fewer rows say little: 16 that agree by chance are rare, four are not.
LEAST_ROWS = 16
# Sequences are compared position by position; four that differ, and a teacher that says the same of all of them, is no
# chance, since every position behind the first has seen another text.
LEAST_SEQUENCES = 4
# One class for all of a corpus without hard targets may be the truth, and is judged on more of them.
LEAST_ROWS_OF_ONE_CLASS = 64
# Half of the samples can't be read: another kind of corpus, or another preprocessing, than was meant. Only all over the
# corpus: in one shard it is a damaged file, which the quarantine is for.
UNDECODABLE_SHARE = 0.5
# One row in five without finite logits is an overflow, not an odd sample; a sample that makes NaN is one in thousands.
NOT_FINITE_SHARE = 0.2
LEAST_NOT_FINITE = 8  # and never fewer rows than these: a few odd samples may meet in a small shard
# Differences below this share of a row's own range are lost in a float16, so to a store such rows are the same.
SAME_SHARE = 1e-4
SAME_LOGIT = 1e-6  # rounding of a float32, of the logit's own size
# The largest logit less than this above the mean of all (nats): a student learns less from it than from rounding. The
# logits of random weights lie some hundredths apart, and are no alarm.
FLAT_NATS = 1e-3
# What is left beside the top class at the highest declared temperature: a millionth, and so at temperature 1. Even a
# teacher that knows its training set by heart leaves more at T = 1 in some rows in a hundred, and percents at T = 4.
COLLAPSED_NATS = 1e-6
COLLAPSED_SHARE = 0.99
# One class for every row is no alarm where the hard targets nearly all say so too ...
ONE_HARD_TARGET_SHARE = 0.8
# ... or where the teacher is unsure: random weights name one class for everything now and then, at a high entropy.
UNSURE_ENTROPY = 0.5  # of log C
# Values at the end of float16 (-65,504) are what a mask such as -1e9 gives, which loses nothing. Logits that are really
# that far apart leave as many in the tenfold below as beyond the end; a mask leaves none there.
SATURATED_SHARE = 1e-3
NEAR_THE_END = FLOAT16_LOWEST / 10

# Logits that add up to 1 within this, none of them below 0, in every row, are no logits; bf16 rounds as coarsely.
PROBABILITY_TOLERANCE = 0.02

LOOKED_ROWS = 256  # of a shard: more would not tell more
LOOKED_POSITIONS = 4096
SIGNATURE = 64  # values of a row that are compared


@dataclass(frozen=True)
class Finding:
    """Something that a healthy run doesn't give.

    Attributes:
        name: of the alarm.
        seen: what was expected and what was got.
        cause: the likely one, and what to do.
    """

    name: str
    seen: str
    cause: str


@dataclass(frozen=True, eq=False)
class Look:
    """Rows as the alarms see them: those with targets, each sample once.

    Attributes:
        max_logit_NP: float64.
        lse_NPT: less the largest logit, float64.
        entropy_NP: at temperature 1, nats.
        top_NP: the top class; None where it is not known.
        signature_NPS: some of the stored values of each; None where rows can't be compared by them.
        hard_target_N: -1 where unknown; None where there are none, and for sequences.
        num_values: stored values that were counted for the next two.
        num_at_end: of these, at or beyond the end of float16.
        num_near_end: of these, in the tenfold before the end.
        is_probability_NP: whether the logits are none below 0 and add up to 1; None where they were not seen.
    """

    max_logit_NP: Array  # noqa: N815
    lse_NPT: Array  # noqa: N815
    entropy_NP: Array  # noqa: N815
    top_NP: Array | None  # noqa: N815
    signature_NPS: Array | None  # noqa: N815
    hard_target_N: Array | None = None  # noqa: N815
    num_values: int = 0
    num_at_end: int = 0
    num_near_end: int = 0
    is_probability_NP: Array | None = None  # noqa: N815

    @property
    def num_rows(self) -> int:
        """Rows that there are to look at."""
        return len(self.max_logit_NP)

    @property
    def num_distributions(self) -> int:
        """Rows, or positions of all sequences."""
        return self.max_logit_NP.size


def shard_alarm(
    arrays: Arrays, manifest: Manifest, alarms: Collection[str] = ALARMS, where: str = "a shard before it was written"
) -> None:
    """Stop a run whose shard is not what a healthy teacher gives.

    Args:
        arrays: of the shard, as they would be written.
        manifest: of the store.
        alarms: those that are on.
        where: what is looked at, for the message.

    Raises:
        AlarmError: something is wrong; nothing was written.
    """
    found = list(status_findings(arrays["status"], is_spread=False))
    found += findings(look_at(arrays, manifest), manifest, is_spread=False)
    raise_alarms(found, alarms, where)


def raise_alarms(found: Collection[Finding], alarms: Collection[str], where: str) -> None:
    """Raise what was found, except alarms that are off.

    Raises:
        AlarmError: something is left.
    """
    left = [finding for finding in found if finding.name in alarms]
    if left:
        flags = " ".join(f"--no-alarm {finding.name}" for finding in left)
        text = "; ".join(f"{finding.seen}: {finding.cause}" for finding in left)
        raise AlarmError(f"{where}: {text}; or go on all the same: {flags}")


def look_at(arrays: Arrays, manifest: Manifest) -> Look:
    """Some rows of a shard, evenly spread, each sample once."""
    kept = np.flatnonzero(arrays["status"] == STATUS_OK)
    kept = distinct_rows(kept, arrays["sample_digest"])
    sequences, encoding = manifest.sequences, manifest.encoding
    most = LOOKED_ROWS if sequences is None else max(LEAST_SEQUENCES, LOOKED_POSITIONS // sequences.num_positions)
    if len(kept) > most:
        kept = kept[np.linspace(0, len(kept) - 1, most).astype(np.int64)]

    def of(name: str) -> Array:
        found = arrays[name][kept]
        return found[:, None] if sequences is None else found

    top_NP = signature_NPS = None
    counts = (0, 0, 0)
    if isinstance(encoding, Dense | TopK):
        values_NPV = of("values")
        top_NP = values_NPV.argmax(2) if isinstance(encoding, Dense) else of("ids")[..., 0]
        if encoding.values == "uint8":  # steps of a row's own range, of which the largest logit is step 0
            top_NP = values_NPV.argmin(2) if isinstance(encoding, Dense) else top_NP
            values_NPV = -values_NPV.astype(np.float32) / 255 * of("value_range")[..., None]
        elif encoding.values == "float16":
            counts = count_at_end(values_NPV)
        signature_NPS = signature_of(values_NPV)
    elif isinstance(encoding, Hidden):
        signature_NPS = signature_of(of("hidden"))
    return Look(
        max_logit_NP=of("max_logit").astype(np.float64),
        lse_NPT=of("lse").astype(np.float64),
        entropy_NP=of("entropy").astype(np.float64),
        top_NP=top_NP,
        signature_NPS=signature_NPS,
        hard_target_N=arrays["hard_target"][kept] if manifest.has_hard_targets else None,
        num_values=counts[0],
        num_at_end=counts[1],
        num_near_end=counts[2],
    )


def distinct_rows(kept: NDArray[np.int64], digests_N: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Of some positions those of different samples, in order: a sample that comes twice is no evidence."""
    _, first = np.unique(digests_N[kept], return_index=True)
    return kept[np.sort(first)]


def signature_of(values_NPV: Array) -> Array:
    """At most `SIGNATURE` of the values, evenly spread."""
    num_values = values_NPV.shape[2]
    columns = np.unique(np.linspace(0, num_values - 1, min(SIGNATURE, num_values)).astype(np.int64))
    return values_NPV[..., columns].astype(np.float64)


def count_at_end(values: Array) -> tuple[int, int, int]:
    """Values, how many are at the end of float16 or beyond it, and how many in the tenfold before it."""
    at_end = int((values <= FLOAT16_LOWEST).sum() - np.isneginf(values).sum())
    return values.size, at_end, int((values <= NEAR_THE_END).sum() - (values <= FLOAT16_LOWEST).sum())


def are_probabilities(logits_RC: Array) -> Array:
    """Whether the values of each row could be a distribution: none below 0, and 1 in all."""
    sum_R = logits_RC.sum(axis=1, dtype=np.float64)
    is_one_R: Array = (logits_RC.min(axis=1) >= 0) & (np.abs(sum_R - 1) <= PROBABILITY_TOLERANCE)
    return is_one_R


def status_findings(status_N: Array, *, is_spread: bool) -> Iterator[Finding]:
    """What the rows without targets tell.

    Args:
        status_N: of each row.
        is_spread: whether the rows lie all over the corpus, not side by side.
    """
    num_rows = len(status_N)
    if num_rows < LEAST_ROWS:
        return
    num_undecodable = int((status_N == STATUS_UNDECODABLE).sum())
    num_not_finite = int((status_N == STATUS_NOT_FINITE).sum())
    if is_spread and num_undecodable >= UNDECODABLE_SHARE * num_rows:
        yield Finding(
            "undecodable",
            f"expected samples that can be decoded, got {_of(num_undecodable, num_rows)} that can't",
            "check that --data and --corpus-kind name the corpus that was meant, and the preprocessing",
        )
    if num_not_finite >= max(LEAST_NOT_FINITE, NOT_FINITE_SHARE * num_rows):
        yield Finding(
            "not-finite",
            f"expected finite logits, got NaN or inf in {_of(num_not_finite, num_rows)}",
            "the teacher's weights are damaged or its numbers overflow: try --precision bf16 or fp32, and check the "
            "preprocessing",
        )


def findings(look: Look, manifest: Manifest, *, is_spread: bool) -> Iterator[Finding]:
    """What the rows with targets tell.

    Args:
        look: at the rows.
        manifest: of the store.
        is_spread: whether the rows lie all over the corpus, not side by side.
    """
    num_classes, is_sequences = manifest.num_classes, manifest.sequences is not None
    least = LEAST_SEQUENCES if is_sequences else LEAST_ROWS
    if num_classes == 1 or look.num_rows < least or look.num_distributions < LEAST_ROWS:
        return
    of_what, is_constant = _of_what(look, is_sequences), _is_constant(look, is_sequences)
    if is_constant:
        yield Finding(
            "constant",
            f"expected logits that differ from sample to sample, got the same for {of_what}",
            "the teacher does not see its input: check --scale, --mean and --std, and that the weights are those of "
            "--arch",
        )
    if look.is_probability_NP is not None and look.is_probability_NP.all():
        yield Finding(
            "probabilities",
            f"expected logits, got numbers from 0 to 1 that add up to 1 for {of_what}",
            "the teacher ends with a softmax, or gives classes: leave its last layer out, or take the logarithm",
        )
    if num_classes == 2:
        return  # two classes may well be far apart, or one of them rare
    lse_N = look.lse_NPT.reshape(-1, look.lse_NPT.shape[-1])
    lowest, highest = manifest.temperatures[0], manifest.temperatures[-1]
    is_flat = (math.log(num_classes) - lse_N[:, 0]) * lowest <= FLAT_NATS
    if is_flat.all():
        yield Finding(
            "flat",
            f"expected some classes above others, got all {num_classes} alike for {of_what}",
            "the logits are divided by something, or the weights were never loaded: check the teacher",
        )
    is_collapsed = (look.entropy_NP.reshape(-1) <= COLLAPSED_NATS) & (lse_N[:, -1] <= COLLAPSED_NATS)
    if is_collapsed.mean() >= COLLAPSED_SHARE:
        yield Finding(
            "collapsed",
            f"expected soft targets, got one class and nothing beside it for {of_what}, at temperature {highest:g} too",
            "the logits are multiplied by something, or the input is out of range: check --scale, --mean and --std",
        )
    if not is_constant:  # which says more
        yield from _one_class(look, manifest, is_spread, of_what)
    if look.num_at_end >= SATURATED_SHARE * look.num_values > 0 and look.num_near_end >= look.num_at_end / 10:
        yield Finding(
            "saturated",
            f"expected logits that float16 can hold, got {_of(look.num_at_end, look.num_values, 'values')} at its end, "
            f"{-FLOAT16_LOWEST:,.0f} below the largest",
            "store them as they are with --values float32, or check the teacher's scale",
        )


def _is_constant(look: Look, is_sequences: bool) -> bool:
    """Whether every sample is given the same logits; of a sequence's first position, which may see nothing, no matter.

    Random draws can't be compared, so without a signature there is no telling.
    """
    if look.signature_NPS is None:
        return False
    first = 1 if is_sequences else 0
    max_logit, lse, signature = look.max_logit_NP[:, first:], look.lse_NPT[:, first:], look.signature_NPS[:, first:]
    if not max_logit.size:
        return False
    signature = np.where(np.isfinite(signature), signature, FLOAT16_LOWEST)
    same = SAME_SHARE * np.abs(signature).max(initial=0.0) + SAME_LOGIT * np.abs(max_logit).max()
    if look.top_NP is not None and (look.top_NP[:, first:] != look.top_NP[:1, first:]).any():
        return False
    return all(bool((np.abs(values - values[:1]) <= same).all()) for values in (max_logit, lse, signature))


def _one_class(look: Look, manifest: Manifest, is_spread: bool, of_what: str) -> Iterator[Finding]:
    """One top class for everything, of which the teacher is sure, and hard targets do not agree."""
    if look.top_NP is None or (look.top_NP != look.top_NP.flat[0]).any():
        return
    if look.entropy_NP.mean() >= UNSURE_ENTROPY * math.log(manifest.num_classes):
        return
    known = np.zeros(0) if look.hard_target_N is None else look.hard_target_N[look.hard_target_N >= 0]
    if len(known) >= LEAST_ROWS:
        _, counts = np.unique(known, return_counts=True)
        if counts.max() > ONE_HARD_TARGET_SHARE * len(known):
            return
    elif not is_spread or look.num_distributions < LEAST_ROWS_OF_ONE_CLASS:
        return
    index = int(look.top_NP.flat[0])
    name = "" if manifest.class_names is None else f" ({manifest.class_names[index]!r})"
    beside = " though the hard targets differ" if len(known) >= LEAST_ROWS else ""
    yield Finding(
        "one-class",
        f"expected several classes, got class {index}{name} on top for {of_what}{beside}",
        "the preprocessing is not the teacher's: check --mean, --std, --scale and --channels",
    )


def _of_what(look: Look, is_sequences: bool) -> str:
    if is_sequences:
        return f"all {format_count(look.num_distributions)} positions of {format_count(look.num_rows)} sequences"
    return f"all {format_count(look.num_rows)} samples that were looked at"


def _of(count: int, total: int, what: str = "rows") -> str:
    return f"{format_count(count)} of {format_count(total)} {what}"
