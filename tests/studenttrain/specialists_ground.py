"""Specialists that were not trained, in a folder as `studenttrain specialists fit` leaves one."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from storage.corpus import Preprocess, open_corpus, read_batch
from storage.reader import open_store
from studenttrain.checks import store_identity
from studenttrain.ending import RESULT
from studenttrain.export import CARD, WEIGHTS, StudentCard, save_weights
from studenttrain.models import build_model
from studenttrain.specialists.head import cut_head
from studenttrain.specialists.plan import SpecialistsPlan, write_plan
from studenttrain.specialists.specialist import PLAN, phase_folder
from tests.studenttrain.runs import NUM_CLASSES, NUM_FEATURES, STUDENT, Ground, make_ground, write_targets

CLASSES = ((0, 1), (1, 2, 3))
SHAPE = (NUM_FEATURES,)


def build_generalist(seed: int = 0) -> nn.Module:
    """A model of all classes, whose answers are far from even."""
    torch.manual_seed(seed)
    model = build_model(STUDENT, NUM_CLASSES, SHAPE).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


def write_generalist(folder: Path, ground: Ground, model: nn.Module) -> Path:
    """A run's folder with the generalist as a student."""
    folder.mkdir()
    save_weights(folder / WEIGHTS, model)
    (folder / CARD).write_text(json.dumps(card_of(ground).to_json()))
    return folder


def card_of(ground: Ground) -> StudentCard:
    """The card of a student of the ground's store."""
    with open_store(ground.targets) as store:
        return StudentCard(
            student=STUDENT,
            input_shape=SHAPE,
            num_classes=NUM_CLASSES,
            class_names=store.manifest.class_names,
            preprocess=dict(store.manifest.preprocess),
            store=store_identity(store),
        )


def write_specialists(
    folder: Path, ground: Ground, specialists: Sequence[Sequence[int]] = CLASSES, shift: float = 0.4, **changed: Any
) -> Path:
    """Specialists of random weights, and their plan."""
    card = card_of(ground)
    folder.mkdir()
    plan = SpecialistsPlan(NUM_CLASSES, card.class_names, card.store, tuple(tuple(it) for it in specialists))
    write_plan(folder / PLAN, replace(plan, **changed))
    for number, classes in enumerate(specialists):
        at = phase_folder(folder, number, "hard")
        at.mkdir(parents=True)
        save_weights(at / WEIGHTS, cut_head(build_generalist(10 + number), classes, SHAPE, "test").eval())
        own = {"number": number, "classes": list(classes), "num_classes": NUM_CLASSES, "dustbin_shift": shift}
        its = replace(card, num_classes=len(classes) + 1, class_names=None, specialist=own)
        (at / CARD).write_text(json.dumps(its.to_json()))
        (at / RESULT).write_text("{}")
    return folder


def generalist_ground(folder: Path, model: nn.Module, **store: Any) -> Ground:
    """A corpus and the store of what a generalist says of it."""
    ground = make_ground(folder, labels=store.pop("labels", True), finalize=False, shards=())
    corpus = open_corpus(ground.data)
    with open_store(ground.targets) as empty:
        preprocess = Preprocess.from_json(empty.manifest.preprocess)
    inputs = read_batch(corpus, range(corpus.num_samples), preprocess).inputs
    with torch.inference_mode():
        logits = model(torch.from_numpy(inputs)).numpy()
    targets = write_targets(folder / "generalist.zarr", corpus, logits=logits, **store)
    return replace(ground, targets=targets)
