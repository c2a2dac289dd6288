"""What makes a run of `fit` that of a specialist: its classes, its rows, and a student made of the generalist."""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import nn

from storage.corpus.without import without_rows
from storage.errors import CorpusError, MismatchError, StudentError
from storage.reader import Store
from studenttrain.config import FitConfig
from studenttrain.export import CARD, StudentCard, load_card, load_student
from studenttrain.preparation import Prepared, Validation, build_student
from studenttrain.selection import RowClasses, name_classes
from studenttrain.specialists.collapse import OwnClasses
from studenttrain.specialists.head import cut_head
from studenttrain.specialists.sampling import DEFAULT_OWN_SHARE, check_has_classes, choose_rows, classes_of_rows

DUSTBIN_NAME = "other classes"


@dataclass(frozen=True)
class Specialty:
    """What a specialist is to learn.

    Attributes:
        number: of the specialist in its plan.
        classes: its own, ascending.
        own_share: of the rows of an epoch that are of its own classes, above 0 and below 1.
        told: the class of each row and what told it, as `classes_of_rows` gives them; None reads them.
        is_checked: whether the corpus was held against the store already.
    """

    number: int
    classes: tuple[int, ...]
    own_share: float = DEFAULT_OWN_SHARE
    told: tuple[NDArray[np.int32], str] | None = field(default=None, repr=False, compare=False)
    is_checked: bool = False

    def narrow(self, prepared: Prepared, seed: int) -> Prepared:
        """What a run reads, as the specialist sees it: its rows, its classes, its card, its part of the validation.

        Args:
            prepared: as `prepare` gives it.
            seed: of the rows that are drawn.

        Raises:
            StoreError: the store has no row for it, or the corpus of validation none of its classes.
        """
        store, card = prepared.store, prepared.card
        check_has_classes(store)
        objective, encoding = prepared.objective, store.manifest.encoding
        if objective.is_soft and objective.temperature != 1 and encoding.name in ("topk", "sample"):
            raise MismatchError(
                f"temperature: expected 1 for specialists from a {encoding.name} store, got {objective.temperature:g}: "
                "what all other classes have together is known at T = 1 alone; leave --temperature out"
            )
        told = self.told or classes_of_rows(RowClasses(store, prepared.corpus))
        selection = choose_rows(store, told[0], self.classes, self.own_share, seed, told[1])
        own = OwnClasses(self.classes, store.manifest.num_classes, selection.counts.dustbin_shift)
        names = card.class_names
        specialist = {
            "number": self.number,
            "classes": list(self.classes),
            "num_classes": store.manifest.num_classes,
            "own_share": self.own_share,
            "rows": asdict(selection.counts),
            "dustbin_shift": own.dustbin_shift,
            "generalist": store.manifest.teacher.get("digest"),
        }
        return replace(
            prepared,
            selection=selection,
            own=own,
            validation=None if prepared.validation is None else self._own_validation(prepared.validation, own, store),
            card=replace(
                card,
                num_classes=own.num_outputs,
                class_names=None if names is None else (*(names[it] for it in self.classes), DUSTBIN_NAME),
                specialist=specialist,
            ),
        )

    def _own_validation(self, validation: Validation, own: OwnClasses, store: Store) -> Validation:
        """Rows of the own classes alone; what is right of them is the place among these."""
        corpus = validation.corpus
        assert corpus.hard_targets is not None
        is_own_N = np.isin(corpus.hard_targets, self.classes)
        if not is_own_N.any():
            named = name_classes(self.classes, store.manifest.class_names)
            raise CorpusError(
                f"corpus '{corpus.path}': expected rows of {named} to validate specialist {self.number} on, got none; "
                "give another --val-data, or leave it out"
            )
        numbers_C = own.numbers_C.numpy().astype(np.int32)
        hard_targets = numbers_C[corpus.hard_targets[is_own_N]]
        return Validation(without_rows(corpus, np.flatnonzero(~is_own_N)), None, hard_targets)

    def build(self, config: FitConfig, prepared: Prepared, begins: bool) -> nn.Module:
        """The student to begin with, on the CPU: the generalist's with another last layer, or this very specialist's.

        Args:
            config: the options; `init` may be weights of the spec with all classes, or a run of the same specialist.
            prepared: as `narrow` gives it.
            begins: whether the run begins; where it goes on, the weights to begin with may be gone.

        Raises:
            StoreError: it can't be built, or the weights are not its own.
        """
        shape = prepared.preprocess.shape
        if self.check_init(config):
            assert config.init is not None
            return load_student(Path(config.init))[0].train()
        student = build_student(config, prepared.store, shape, begins)
        return cut_head(student, self.classes, shape, f"student '{config.student}'")

    def check_init(self, config: FitConfig) -> bool:
        """Whether the weights to begin with are this very specialist's.

        Raises:
            StudentError: they are another specialist's.
        """
        card = card_beside(config.init)
        if card is None or card.specialist is None:
            return False
        if (tuple(card.specialist["classes"]), card.student) != (self.classes, config.student):
            raise StudentError(
                f"--init: expected a generalist's weights, or those of specialist {self.number}, got specialist "
                f"{card.specialist['number']} in '{config.init}'; give the generalist's"
            )
        return True


def card_beside(init: str | None) -> StudentCard | None:
    """The card of some weights, or None where there is none."""
    if init is None:
        return None
    path = Path(init)
    card_path = path / CARD if path.is_dir() else path.with_name(CARD)
    return load_card(card_path) if card_path.is_file() else None
