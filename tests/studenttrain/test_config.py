"""The options of a run: what is refused, and what may change when a run goes on."""

from typing import Any

import pytest

from studenttrain.config import FitConfig, Interval, differing_options, parse_interval


def make(**options: Any) -> FitConfig:
    given: dict[str, Any] = {"targets": "t.zarr", "data": "d", "student": "mlp:1-1", "out": "o"}
    return FitConfig(**given | ({} if "steps" in options or "epochs" in options else {"epochs": 1}) | options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs: expected at least 1, got 0"),
        ({"steps": -1}, "steps: expected at least 1"),
        ({"batch_size": 0}, "batch_size: expected at least 1"),
        ({"accumulate": 0}, "accumulate: expected at least 1"),
        ({"readers": 0}, "readers: expected at least 1"),
        ({"temperature": 0.0}, "temperature: expected a number above 0"),
        ({"temperature": float("nan")}, "temperature: expected a number above 0"),
        ({"lr": float("inf")}, "lr: expected a number above 0"),
        ({"clip_norm": 0.0}, "clip_norm: expected a number above 0"),
        ({"alpha": 1.5}, "alpha: expected a number from 0 to 1"),
        ({"alpha": float("nan")}, "alpha: expected a number from 0 to 1"),
        ({"ema": 1.0}, "ema: expected a number between 0 and 1"),
        ({"seed": -1}, "seed: expected 0 to 2\\^63 - 1, got -1"),
        ({"seed": 2**63}, "seed: expected 0 to 2\\^63 - 1"),
        ({"weight_decay": -0.1}, "weight_decay: expected at least 0"),
        ({"warmup_steps": -1}, "warmup_steps: expected at least 0"),
        ({"optimizer": "adam"}, "optimizer: expected adamw or sgd, got adam"),
        ({"schedule": "linear"}, "schedule: expected cosine or constant"),
        ({"precision": "fp8"}, "precision: expected fp32, bf16, fp16"),
        ({"optimizer": "sgd", "momentum": 1.0}, "momentum: expected a number from 0 to below 1"),
        ({"checkpoint_every": "0"}, "checkpoint_every: expected steps as 500, or a time"),
        ({"checkpoint_every": "5x"}, "checkpoint_every: expected steps as 500, or a time"),
    ],
)
def test_an_option_out_of_range_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 1, "steps": 1}, "epochs, steps: expected one of them, got both"),
        ({"momentum": 0.5}, "momentum: expected the optimizer sgd, got adamw"),
        ({"steps": 10, "warmup_steps": 10}, "warmup_steps: expected fewer than the 10 steps, got 10"),
        ({"val_labels": "y.npy"}, "val_labels: expected val_data beside them"),
        ({"data": None, "array": "x"}, "array: expected --data beside it, got none"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_neither_epochs_nor_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="epochs, steps: expected one of them, got neither"):
        FitConfig("t.zarr", "d", "mlp:1-1", "o")


def test_intervals_are_steps_or_times() -> None:
    assert parse_interval("500") == Interval(500, None)
    assert parse_interval("2h") == Interval(None, 7200.0)
    assert parse_interval("500").is_over(500, 0.0)
    assert not parse_interval("500").is_over(499, 1e9)
    assert parse_interval("90s").is_over(1, 90.0)
    assert not parse_interval("90s").is_over(10**9, 89.9)


def test_only_options_that_change_the_result_differ() -> None:
    begun = make()
    assert (
        differing_options(begun.to_json(), make(targets="moved.zarr", readers=3, checkpoint_every="5").to_json()) == []
    )
    changed = differing_options(begun.to_json(), make(lr=0.5, alpha=0.25).to_json())
    assert changed == ["--alpha left out, not 0.25", "--lr 0.001, not 0.5"]
