"""What must fit before a student learns from a store: classes, rows, objective, and the run that it goes on with."""

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from storage.backends import CacheSettings
from storage.corpus import Corpus
from storage.encodings import check_temperature
from storage.errors import CorpusMismatchError, MismatchError, NotSealedError, StudentError
from storage.manifest import Manifest
from storage.reader import Store, open_store
from storage.records import canonical
from storage.series import Series
from storage.urls import is_url
from studenttrain.config import FitConfig, differing_options
from studenttrain.loss import check_loss, default_loss, uses_temperature
from studenttrain.top1 import Meeting, meet_hard_targets

DEFAULT_ALPHA = 0.9
CHANCE_FACTOR = 2.0  # a teacher that is right less than this many times as often as chance is not to be trusted


@dataclass(frozen=True)
class Objective:
    """What is minimised: alpha T^2 D(p_T, q_T) + (1 - alpha) CE(y, q_1).

    Attributes:
        loss: name of the soft loss, D.
        temperature: of the soft loss, above 0.
        alpha: weight of the soft loss, in [0, 1]; at 0 no soft target is read.
    """

    loss: str
    temperature: float
    alpha: float

    @property
    def is_soft(self) -> bool:
        """Whether soft targets take part."""
        return self.alpha > 0

    @property
    def is_hard(self) -> bool:
        """Whether hard targets take part."""
        return self.alpha < 1


def choose_objective(config: FitConfig, manifest: Manifest, has_hard_targets: bool) -> Objective:
    """The objective that the options and the store make together.

    Raises:
        ValueError: options that contradict each other, or that would be ignored.
        MismatchError: the store's encoding does not hold the loss, or not at that temperature.
    """
    alpha = config.alpha if config.alpha is not None else DEFAULT_ALPHA if has_hard_targets else 1.0
    if alpha < 1 and not has_hard_targets:
        raise ValueError(
            f"alpha: expected 1 without hard targets, got {alpha:g}; leave --alpha out, or give hard targets: --labels"
        )
    if alpha == 0 and (config.temperature is not None or config.loss != "auto"):
        ignored = "--temperature" if config.temperature is not None else "--loss"
        raise ValueError(
            f"alpha: expected no {ignored} with --alpha 0, which reads no soft targets, got one; leave {ignored} out"
        )
    loss = default_loss(manifest.encoding) if config.loss == "auto" else config.loss
    check_loss(manifest.encoding, loss)
    if config.temperature is not None and not uses_temperature(loss):
        raise ValueError(
            f"temperature: expected none with --loss {loss}, which has none, got {config.temperature:g}; "
            "leave --temperature out"
        )
    temperature = manifest.temperatures[-1] if config.temperature is None else config.temperature
    check_temperature(manifest.encoding, temperature, manifest.temperatures)
    return Objective(loss, temperature, alpha)


def open_targets(path: str, cache: CacheSettings | None = None) -> Store:
    """A store with rows in it.

    Args:
        path: of the store, or its URL.
        cache: of its objects, where it is at a URL; None for none.

    Raises:
        NotSealedError: no shard is sealed yet.
    """
    store = open_store(path, cache if is_url(path) else None)
    if not store.sealed_shards():
        store.close()
        raise NotSealedError(
            f"{path}: expected at least one sealed shard, got none; wait until teacherdump run has sealed one, or run "
            "it again if it stopped"
        )
    return store


def check_class_names(where: str, names: tuple[str, ...] | None, expected: tuple[str, ...] | None, whose: str) -> None:
    """Refuse classes of another number, or in another order; where one side has no names, nothing is compared.

    Args:
        where: what is refused.
        names: of its classes, in order.
        expected: of the classes, in order.
        whose: what these are the classes of.

    Raises:
        MismatchError: they differ.
    """
    if names is None or expected is None or names == expected:
        return
    if len(names) != len(expected):
        news, gone = (
            [name for name in one if name not in other] for one, other in ((names, expected), (expected, names))
        )
        what = f": {news[0]!r} is new" if news else f": {gone[0]!r} is missing" if gone else ""
        differ = f"{len(expected)} classes as in {whose}, got {len(names)}{what}"
    else:
        index = next(index for index, name in enumerate(names) if name != expected[index])
        order = "in another order" if set(names) == set(expected) else "other classes"
        differ = f"class {index} to be {expected[index]!r} as in {whose}, got {names[index]!r} ({order})"
    raise MismatchError(f"{where}: expected {differ}; use the same classes in the same order")


def check_same_classes(store: Store, num_classes: int, names: tuple[str, ...] | None, whose: str) -> None:
    """Refuse a store of another class count or class order.

    Raises:
        MismatchError: it is.
    """
    where = f"store '{store.path}'"
    if store.manifest.num_classes != num_classes:
        raise MismatchError(
            f"{where}: expected {num_classes} classes as in {whose}, got {store.manifest.num_classes}; "
            "use a store of the same classes"
        )
    check_class_names(where, store.manifest.class_names, names, whose)


def check_hard_targets(corpus: Corpus, num_classes: int) -> NDArray[np.int32] | None:
    """The hard targets of a corpus, or None; each is one of the classes.

    Raises:
        MismatchError: one is not; the message names the row.
    """
    hard_targets = corpus.hard_targets
    if hard_targets is not None and int(hard_targets.max()) >= num_classes:
        row = int(np.argmax(hard_targets >= num_classes))
        raise MismatchError(
            f"corpus '{corpus.path}': expected hard targets below the {num_classes} classes, got "
            f"{int(hard_targets[row])} in row {row} ({corpus.key(row)!r}); give the labels of these classes"
        )
    return hard_targets


def check_row_count(store: Store, corpus: Corpus) -> None:
    """Refuse a corpus of another size than that of a store; the samples themselves are checked as they are read.

    Raises:
        CorpusMismatchError: the counts differ.
    """
    if corpus.num_samples != store.manifest.num_rows:
        raise CorpusMismatchError(
            f"corpus '{corpus.path}': expected {store.manifest.num_rows} samples as in '{store.path}', got "
            f"{corpus.num_samples}; give the corpus that the store was made from"
        )


def check_tokenizer(store: Store, fingerprint: str | None, whose: str) -> None:
    """Refuse a tokenizer that is not the one that a store was made with; where one is not known, nothing is compared.

    Args:
        store: of sequences.
        fingerprint: of the tokenizer, or None.
        whose: how an error names it.

    Raises:
        MismatchError: it is another.
    """
    sequences = store.manifest.sequences
    expected = None if sequences is None else sequences.tokenizer
    if expected is not None and fingerprint is not None and fingerprint != expected:
        raise MismatchError(
            f"{whose}: expected the tokenizer that '{store.path}' was made with (fingerprint {expected[:12]}), got "
            f"another ({fingerprint[:12]}): the same id is another token there; use a student and a corpus of that "
            "tokenizer"
        )


def say_meeting(store: Store, hard_targets: NDArray[np.int32] | None, quiet: bool) -> Meeting:
    """Print how often the stored top-1 meets the hard target, and warn where that is hardly more than by chance."""
    meeting = meet_hard_targets(store, hard_targets)
    if not quiet:
        click.echo(f"the stored top-1 meets the hard target in {meeting}", err=True)
    if meeting.num_rows and meeting.num_met < CHANCE_FACTOR * meeting.num_rows / store.manifest.num_classes:
        click.echo(
            f"WARNING: that is no better than chance, 1 in {store.manifest.num_classes}: the teacher's classes are in "
            "another order than the corpus's, or the store was made by another teacher, or with another preprocessing, "
            "than you think. Look at `logitstore info` and stop this run unless you know why.",
            err=True,
        )
    return meeting


def store_identity(store: Store) -> dict[str, str | int | None]:
    """`digest` of what the manifest says, which holds while a store grows; `content_digest` once it is finalized.

    Of a series, which only grows behind: `digest` of what its members share, `content_digest` of the first
    `num_members`, those that are finalized.
    """
    if isinstance(store, Series):
        count = store.num_finalized
        digest = hashlib.sha256(canonical(dict(store.record.shared))).hexdigest()
        return {"digest": digest, "content_digest": store.digest_of(count) if count else None, "num_members": count}
    digest = hashlib.sha256(canonical(store.manifest.identity())).hexdigest()
    return {"digest": digest, "content_digest": store.content_digest}


def check_same_run(then: Mapping[str, Any], config: FitConfig) -> None:
    """Refuse to go on with a run that was given other options.

    Raises:
        StudentError: an option would change what is computed; the message names each.
    """
    different = differing_options(then, config.to_json())
    if different:
        raise StudentError(
            f"run '{config.out}': expected the options that it was begun with, got others: {'; '.join(different)}; "
            "give the same options to go on, or --out another folder for a new run"
        )


def check_same_store(then: Mapping[str, Any], store: Store) -> None:
    """Refuse to go on with another store; the same one may have grown, or been finalized, since.

    Raises:
        MismatchError: it is another.
    """
    now = store_identity(store)
    if isinstance(store, Series) and then.get("num_members"):
        now["content_digest"] = store.digest_of(int(then["num_members"]))
    finalized = then["content_digest"] is not None and now["content_digest"] is not None
    for name in ("content_digest",) if finalized else ("digest",):
        if then[name] != now[name]:
            raise MismatchError(
                f"store '{store.path}': expected the store that the run began with ({name} {str(then[name])[:12]}), "
                f"got another ({str(now[name])[:12]}); give --targets that store, or --out another folder for a new run"
            )


def data_identity(
    objective: Objective,
    own_hard_targets: NDArray[np.int32] | None,
    begun_with: nn.Module | None,
    specialist: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What a run depends on beside its options and its store.

    Args:
        objective: as the options and the store make it.
        own_hard_targets: of the corpus, where the store has none to hold them against.
        begun_with: the student with the weights that it was given to begin with, or None.
        specialist: its classes and rows, as its card says them; None for a student of all classes.
    """
    hard = None if own_hard_targets is None else hashlib.sha256(own_hard_targets.tobytes()).hexdigest()
    init = None if begun_with is None else weights_digest(begun_with.state_dict())
    own = {} if specialist is None else {"specialist": dict(specialist)}
    return {"objective": dataclasses.asdict(objective), "hard_targets": hard, "init": init, **own}


def check_same_data(then: Mapping[str, Any], now: Mapping[str, Any], config: FitConfig) -> None:
    """Refuse to go on with other hard targets, or with other weights to begin with; absent weights are not missed.

    Raises:
        StudentError: something differs.
    """
    advice = f"give --out another folder than '{config.out}' for a new run"
    if then["objective"] != now["objective"] or then["hard_targets"] != now["hard_targets"]:
        raise StudentError(
            f"run '{config.out}': expected the hard targets that it was begun with, got others, or none; give the same "
            f"--labels, or {advice}"
        )
    if then.get("specialist") != now.get("specialist"):
        raise StudentError(
            f"run '{config.out}': expected the specialist that it was begun with, its classes, --own-share and the "
            f"store's rows, got another; give these, or {advice}"
        )
    if None not in (then["init"], now["init"]) and then["init"] != now["init"]:
        raise StudentError(
            f"run '{config.out}': expected the weights that it was begun with in '{config.init}', got others; leave "
            f"--init as it was, or {advice}"
        )


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """sha256 of a model's weights, their names and shapes included."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
