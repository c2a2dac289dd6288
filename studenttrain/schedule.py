"""The learning rate of a step, as a pure function of where the run stands.

Nothing is counted here: a run that was killed and goes on asks for the same steps and gets the same rates.
"""

import math
from typing import Literal, get_args

Schedule = Literal["cosine", "constant"]
SCHEDULES: tuple[str, ...] = get_args(Schedule)


def learning_rate(lr: float, schedule: Schedule, step: int, total_steps: int, warmup_steps: int = 0) -> float:
    """The learning rate of one optimizer step.

    Args:
        lr: the highest rate, reached at the end of the warm-up.
        schedule: after the warm-up, `cosine` falls to 0 at `total_steps`; `constant` stays.
        step: steps already done, so 0 for the first.
        total_steps: steps of the whole run, at least 1.
        warmup_steps: steps of linear warm-up from lr / warmup_steps.

    Source: the cosine is that of Loshchilov and Hutter 2017 (arXiv:1608.03983), equation 5, without restarts.

    Example:
        >>> [round(learning_rate(1.0, "cosine", step, 6, 2), 3) for step in range(6)]
        [0.5, 1.0, 1.0, 0.854, 0.5, 0.146]
    """
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    if schedule == "constant":
        return lr
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return lr * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
