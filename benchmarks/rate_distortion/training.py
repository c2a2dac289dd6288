"""The teacher and the students of `benchmarks.rate_distortion`, each trained from hard targets, and kept.

Legend: N sequences, P positions, R rows (flat positions), C vocabulary entries, M entries that are drawn, W width.

A whole softmax over 50,000 entries is nine tenths of the work of such small models. So all but the early student take
most of their steps with a sampled one: the next token against M drawn entries, each weighted with one over how often it
is expected among them, an estimate of the whole sum. Half of the draws follow the text's counts, half are uniform, so
that entries that are never seen are pushed down too. The last steps take the whole softmax.
Source: Bengio and Senecal 2008, adaptive importance sampling to accelerate training of a neural language model.
"""

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from benchmarks.rate_distortion.text import LENGTH, VOCABULARY, held_out_sequences, pieces
from studenttrain.chunked import chunked_losses
from studenttrain.gpt import GPT

SAMPLED = 1024  # M
WARMUP = 50  # steps in which the rate rises
VALIDATION = 64  # held-out sequences, the last of those that are drawn


@dataclass(frozen=True)
class Recipe:
    """How a model is made.

    Attributes:
        name: of its files.
        layers: of its decoder.
        width: of its states.
        sampled_steps: with a sampled softmax, first.
        whole_steps: with the whole one.
        batch: sequences of a step.
        rate: of AdamW at its highest.
        seed: of weights and batches.
    """

    name: str
    layers: int
    width: int
    sampled_steps: int
    whole_steps: int
    batch: int = 16
    rate: float = 3e-3
    seed: int = 0

    @property
    def steps(self) -> int:
        """All of them."""
        return self.sampled_steps + self.whole_steps


def load_or_train(recipe: Recipe, run: Path) -> GPT:
    """The model of a recipe, from the folder if it was made before."""
    weights, card = run / f"{recipe.name}.pt", run / f"{recipe.name}.json"
    torch.manual_seed(recipe.seed)
    model = GPT(recipe.layers, recipe.width, VOCABULARY)
    if card.is_file() and json.loads(card.read_text())["recipe"] == asdict(recipe):
        model.load_state_dict(torch.load(weights, weights_only=True))
        return model
    begin = time.process_time()
    train(model, np.load(run / "train.npy"), recipe)
    figures = {
        "recipe": asdict(recipe),
        "held_out_loss": round(held_out_loss(model, run), 3),
        "cpu_s": round(time.process_time() - begin),
    }
    torch.save(model.state_dict(), weights)
    card.write_text(json.dumps(figures))
    print(f"{recipe.name}: {figures}", flush=True)
    return model


def train(model: GPT, ids: NDArray[np.uint16], recipe: Recipe) -> None:
    """Train a model on places of the text that are drawn at random."""
    generator = torch.Generator().manual_seed(recipe.seed + 1)
    counts_C = torch.from_numpy(np.bincount(ids, minlength=VOCABULARY)).double()
    proposal_C = 0.5 * counts_C / counts_C.sum() + 0.5 / VOCABULARY
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    for step in range(recipe.steps):
        share = (step + 1) / recipe.steps
        rate = recipe.rate * min(1.0, (step + 1) / min(WARMUP, recipe.steps)) * (1 - 0.95 * share)
        for group in optimizer.param_groups:
            group["lr"] = rate
        sequences_NQ = pieces(ids, torch.randint(len(ids) - LENGTH - 1, (recipe.batch,), generator=generator))
        hidden_RW = model.hidden(sequences_NQ[:, :-1]).flatten(0, 1)
        hard_R = sequences_NQ[:, 1:].flatten()
        if step < recipe.sampled_steps:
            loss = sampled_softmax(hidden_RW, model.head.weight, hard_R, proposal_C, generator)
        else:
            loss = chunked_losses(model.output_head(), hidden_RW, None, None, hard_R, weights=(0.0, 1.0))[1].mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == recipe.steps - 1:
            print(f"{recipe.name}: step {step}, loss {loss.item():.3f}", flush=True)


def sampled_softmax(
    hidden_RW: Tensor, weight_CW: Tensor, hard_R: Tensor, proposal_C: Tensor, generator: torch.Generator
) -> Tensor:
    """Mean cross entropy with the sum over all entries but the true one estimated from drawn ones."""
    drawn_M = torch.multinomial(proposal_C, SAMPLED, replacement=True, generator=generator)
    expected_M = (SAMPLED * proposal_C[drawn_M]).log().float()
    true_R = (hidden_RW * F.embedding(hard_R, weight_CW)).sum(1)
    drawn_RM = hidden_RW @ F.embedding(drawn_M, weight_CW).T - expected_M
    drawn_RM = drawn_RM.masked_fill(drawn_M == hard_R[:, None], -math.inf)
    return (torch.logaddexp(true_R, drawn_RM.logsumexp(1)) - true_R).mean()


@torch.no_grad()
def held_out_loss(model: GPT, run: Path) -> float:
    """Mean cross entropy of the next token with the whole softmax, nats, on text that nothing was trained on."""
    sequences_NQ = held_out_sequences(run, 2 * VALIDATION, seed=1)[VALIDATION:]
    hidden_RW = model.hidden(sequences_NQ[:, :-1]).flatten(0, 1)
    hard_R = sequences_NQ[:, 1:].flatten()
    return float(chunked_losses(model.output_head(), hidden_RW, None, None, hard_R)[1].mean())
