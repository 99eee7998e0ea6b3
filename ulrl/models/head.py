"""Finding the classifier head of any network."""

from __future__ import annotations

from torch import nn

from ulrl.errors import UserError


def find_head(model: nn.Module, num_classes: int, name: str | None = None) -> tuple[str, nn.Linear]:
    """The dotted name and the module of the layer that outputs the classes.

    With `name`, that module (`linear`, `classifier.6`, `1.heads.head`); without, the last `nn.Linear`
    with `num_classes` outputs, in the order of `model.named_modules()`.

    Raises:
        UserError: there is none, the named one is no such layer, or its weight serves another layer too.
    """
    heads = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == num_classes
    }
    if not heads:
        raise UserError(f"the model has no nn.Linear layer with {num_classes} outputs, so it has no head to repair")
    if name is None:
        name = list(heads)[-1]
    elif name not in heads:
        raise UserError(f"linear_name {name!r} is no layer with {num_classes} outputs; known: {', '.join(heads)}")
    for other, weight in model.named_parameters(remove_duplicate=False):
        if weight is heads[name].weight and other != f"{name}.weight":
            raise UserError(
                f"the weight of the head {name} is also {other}, which would change with it; give the head a weight "
                "of its own (nn.Parameter(weight.clone())), or take a method that edits no head, such as ft-sam"
            )
    return name, heads[name]
