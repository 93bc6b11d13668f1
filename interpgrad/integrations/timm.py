"""timm's training task with the loss. In timm's own train.py, two changed lines::

    from interpgrad.integrations.timm import RegularizedTask              # added to the imports

    task = RegularizedTask({"steps": args.epochs * len(loader_train)},    # in place of: task = ClassificationTask(
        model=model,

The loss is called once for each batch, also of those whose gradients are accumulated.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn

from interpgrad.forward import is_compiled
from interpgrad.loss import InterpretableGradientLoss

try:
    from timm.task import ClassificationTask, resume_task_checkpoint  # noqa: F401  # the second is what 1.0.27 brought
except ImportError as reason:
    raise ImportError(
        "expected timm 1.0.27 or newer, whose tasks have checkpoints, found an older release or none: `pip install -U "
        "timm`, or add the loss to your loop as examples/train_timm.py does."
    ) from reason


class RegularizedTask(ClassificationTask):
    """`timm.task.ClassificationTask` whose loss has the interpretable gradient loss added.

    DDP, averaged weights, accumulation and checkpoints, with the count of steps, are timm's. The forward pass is
    shared, but after `task.compile()`: a compiled graph has no double backward, so the loss makes its own.

    Args:
        settings: arguments of `InterpretableGradientLoss` beside the model; with "steps" among them, of its `recipe`.
        model: the model to train.
        arguments: and
        named: further ones of `ClassificationTask`.

    Attributes:
        reg: the loss; `reg.logs()` is for the log.
    """

    def __init__(self, settings: Mapping[str, Any], model: nn.Module, *arguments: Any, **named: Any) -> None:
        super().__init__(model, *arguments, **named)
        make = InterpretableGradientLoss.recipe if "steps" in settings else InterpretableGradientLoss
        self.reg = make(model, **settings)

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:  # noqa: A002
        """As timm's: {"loss", "output"}, of images (N, C, H, W) and targets."""
        with nullcontext() if is_compiled(self.trainable_module) else self.reg.shared_forward():
            result: dict[str, Tensor] = super().forward(input, target)
        return result | {"loss": result["loss"] + self.reg(input, target)}

    def get_task_state(self, *arguments: Any, **named: Any) -> dict[str, Any]:
        """As timm's, and the count of steps."""
        return {**super().get_task_state(*arguments, **named), "reg": self.reg.state_dict()}

    def load_task_state(self, state: dict[str, Any] | None, *arguments: Any, **named: Any) -> None:
        """Restore it; a checkpoint of before the loss was there leaves it as it is."""
        super().load_task_state(state, *arguments, **named)
        self.reg.load_state_dict((state or {}).get("reg", {}), strict=False)
