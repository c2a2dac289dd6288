"""Temperature and biases folded into a student's last layer, so that it is used as any other student.

Legend: N batch, C classes, W width.

z = scale (W h + b) becomes z / T + bias with W / T and b / T + bias / scale.
"""

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from storage.errors import StudentError
from studenttrain.heads import Head, find_head, relative_difference

MAX_DIFFERENCE = 1e-4  # of the folded student's logits from z / T + b, over the largest of these: float32 rounding


def last_layer(model: nn.Module, num_classes: int, where: str, *, needs_bias: bool) -> Head:
    """The layer that makes a student's logits, with the model's own weights.

    A model that says so by `output_head` is taken at its word. Of others, such as those of timm, it is the last linear
    layer with an output for each class; `check_folded` finds out whether it was the right one.

    Args:
        model: the student.
        num_classes: of its logits.
        where: how an error names it.
        needs_bias: whether biases will be folded.

    Raises:
        StudentError: it has none that a temperature, or a bias, can be folded into.
    """
    owner = find_head(model)
    if owner is not None:
        head = owner.output_head()
    else:
        linear = [it for it in model.modules() if isinstance(it, nn.Linear) and it.out_features == num_classes]
        if not linear:
            raise StudentError(
                f"{where}: expected a linear layer with an output for each of {num_classes} classes, got none; give a "
                "student that ends in one, or has output_head()"
            )
        head = Head(linear[-1].weight, linear[-1].bias)
    if head.soft_cap is not None:
        raise StudentError(
            f"{where}: expected logits that are linear in the last layer, got a soft cap of {head.soft_cap:g}, behind "
            "which no temperature and no bias can be folded in; give a student without one"
        )
    if needs_bias and head.bias_C is None:
        raise StudentError(
            f"{where}: expected a last layer with a bias, which biases of classes are folded into, got one without; "
            "leave --prior out, or give a student whose last layer has a bias"
        )
    return head


def check_not_tied(model: nn.Module, head: Head, where: str) -> None:
    """Refuse a last layer whose weights are used elsewhere too, as where a vocabulary's embedding is tied to it.

    Raises:
        StudentError: they are.
    """
    mine = head.weight_CW.untyped_storage().data_ptr()
    owners = [
        name
        for name, value in model.named_parameters(remove_duplicate=False)
        if value.untyped_storage().data_ptr() == mine
    ]
    if len(owners) > 1:
        raise StudentError(
            f"{where}: expected a last layer with weights of its own to fold a temperature into, got weights that are "
            f"'{owners[0]}' too; leave --temperature out, or give a student whose weights are not tied"
        )


def fold(head: Head, temperature: float, bias_C: NDArray[Any] | None) -> None:
    """Change a last layer in place, so that it gives z / T + bias.

    Args:
        head: from `last_layer`.
        temperature: above 0.
        bias_C: of the first classes: what pads a vocabulary behind them gets none; None adds none.
    """
    with torch.no_grad():
        if temperature != 1:
            head.weight_CW.div_(temperature)
            if head.bias_C is not None:
                head.bias_C.div_(temperature)
        if bias_C is not None:
            assert head.bias_C is not None
            added_C = torch.from_numpy(bias_C / head.scale).to(head.bias_C)
            head.bias_C[: len(added_C)].add_(added_C)


def check_folded(
    before_NC: Tensor, after_NC: Tensor, temperature: float, bias_C: NDArray[Any] | None, where: str
) -> float:
    """How far a folded student's logits are from z / T + b, over the largest of these.

    Raises:
        StudentError: by more than rounding: what was folded into is not its last layer.
    """
    expected_NC = before_NC.double() / temperature
    if bias_C is not None:
        expected_NC = expected_NC + torch.from_numpy(bias_C).to(expected_NC)
    difference = relative_difference(after_NC, expected_NC)
    if difference > MAX_DIFFERENCE:
        raise StudentError(
            f"{where}: expected its last linear layer to make its logits, got some that are off by {difference:.2g} of "
            "the largest once temperature and biases are folded into it; give it output_head()"
        )
    return difference
