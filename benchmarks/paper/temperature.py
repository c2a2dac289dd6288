"""What a temperature does to a softmax: the worked example, and a picture of random logits.

    python -m benchmarks.paper.temperature

Source: Hinton, Vinyals and Dean 2015 (arXiv:1503.02531), equation 1.
"""

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.paper.lab import show
from benchmarks.paper.table import Row
from benchmarks.result import RESULTS

LOGITS = (2.0, 7.0, 10.0)
# five decimals, by hand from equation 1
EXPECTED = {
    1.0: (0.00032, 0.04741, 0.95227),
    5.0: (0.11532, 0.31348, 0.57120),
    10.0: (0.20516, 0.33825, 0.45659),
    20.0: (0.26484, 0.34006, 0.39510),
}
DRAWN = (1.0, 2.0, 5.0, 20.0)


def softmax(logits: np.ndarray, temperature: float) -> np.ndarray:
    """The distribution of some logits (C,) at a temperature, in float64."""
    scaled = np.asarray(logits, np.float64) / temperature
    shares = np.exp(scaled - scaled.max())
    return np.asarray(shares / shares.sum())


def entropy(probs: np.ndarray) -> float:
    """Entropy of a distribution in nats."""
    return float(-(probs * np.log(probs)).sum())


def run(picture: Path | None) -> dict[str, Any]:
    """The figures; the picture is drawn where a path is given."""
    found = {f"{temperature:g}": softmax(np.array(LOGITS), temperature).round(5) for temperature in EXPECTED}
    off = max(float(np.abs(found[f"{t:g}"] - expected).max()) for t, expected in EXPECTED.items())
    logits = np.random.default_rng(0).uniform(-10, 10, 10)
    if picture is not None:
        draw(logits, picture)
    return {
        "example": {temperature: probs.tolist() for temperature, probs in found.items()},
        "largest_difference": round(off, 6),
        "random_logits": logits.round(2).tolist(),
        "entropy_nats": {f"{t:g}": round(entropy(softmax(logits, t)), 3) for t in DRAWN},
        "largest_entropy_nats": round(float(np.log(10)), 3),
    }


def rows(figures: dict[str, Any]) -> list[Row]:
    """The rows of the table."""
    return [
        Row(
            f"softmax of z = [2, 7, 10] at T = {temperature}",
            ", ".join(f"{value:.5f}" for value in EXPECTED[float(temperature)]),
            ", ".join(f"{value:.5f}" for value in probs),
            "equal to 5 decimals",
            figures["largest_difference"] <= 1e-5,
        )
        for temperature, probs in figures["example"].items()
    ]


def draw(logits: np.ndarray, path: Path) -> None:
    """A panel for each temperature: the distribution of the same random logits."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(DRAWN), figsize=(10, 2.6), sharey=True, layout="constrained")
    for panel, temperature in zip(panels, DRAWN, strict=True):
        panel.bar(range(len(logits)), softmax(logits, temperature), color="tab:blue")
        panel.set(title=f"T = {temperature:g}", xlabel="class", xticks=range(len(logits)))
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set(ylabel="probability", ylim=(0, 1))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Print the figures and draw the picture."""
    show(run(RESULTS / "paper-temperature.png"))


if __name__ == "__main__":
    main()
