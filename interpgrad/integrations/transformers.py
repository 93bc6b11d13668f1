"""Hugging Face's Trainer with the loss::

    from transformers import Trainer
    from interpgrad.integrations.transformers import Regularized

    class RegularizedTrainer(Regularized, Trainer): ...

    trainer = RegularizedTrainer(model, arguments, train_dataset=data, reg=InterpretableGradientLoss(model, lam=0.3))

Why not `super().compute_loss(...) + reg(x, y)`: where the model takes `num_items_in_batch`, Trainer has it divide its
loss by all images whose gradients are accumulated, and divides no more itself. A mean over one batch, added to that,
would weigh as many times too much as batches are accumulated.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from interpgrad.forward import is_compiled
from interpgrad.loss import InterpretableGradientLoss


class Regularized:
    """A mixin for `transformers.Trainer`: the interpretable gradient loss added to the loss of every training batch.

    Both are means over one batch, and Trainer divides their sum by the number of accumulated batches, as a loop written
    by hand does. Without the mixin it takes the mean over all accumulated images, the same where batches are equally
    large; but not of models that accept `num_items_in_batch` and do not use it, such as ResNet, whose loss it leaves as
    many times too large. So compare with `lam=0`, not with a training without the mixin.

    The forward pass is shared, but for a model under torch.compile, whose graph has no double backward: the loss then
    makes its own. `reg.logs()` is logged beside the loss. In a run that is resumed, the steps of `reg` are counted on,
    an accumulation at the end of an epoch as a whole one.

    Args:
        arguments: and
        named: those of Trainer. A `compute_loss_func` is asked for the mean over one batch: without num_items_in_batch.
        reg: the loss, of the model that is trained. Its images are the model's `main_input_name`, its targets "labels".

    Raises:
        ValueError: with a `compute_loss_func`, in a release of transformers whose Trainer would not divide.
    """

    loss_is_scaled_for_ga = False  # what compute_loss returns is still to be divided

    def __init__(self, *arguments: Any, reg: InterpretableGradientLoss, **named: Any) -> None:
        if named.get("compute_loss_func") and not hasattr(super(), "loss_is_scaled_for_ga"):
            raise ValueError(
                "expected a Trainer that divides what compute_loss_func returns (loss_is_scaled_for_ga), got one of an "
                "earlier release: `pip install -U transformers`, or have the model return the loss."
            )
        super().__init__(*arguments, **named)
        self.model_accepts_loss_kwargs = False  # the same, for earlier releases
        self.reg = reg

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **named: Any) -> Any:
        """As Trainer's, and the loss in training."""
        trainer: Any = super()
        if not model.training:
            return trainer.compute_loss(model, inputs, return_outputs, **named)
        self._count_steps_of_before()
        x, y = inputs[getattr(self.reg.model, "main_input_name", "pixel_values")], inputs["labels"]
        with nullcontext() if is_compiled(model) else self.reg.shared_forward():
            loss, outputs = trainer.compute_loss(model, inputs, return_outputs=True)
        loss = loss + self.reg(x, y)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *arguments: Any, **named: Any) -> None:
        """As Trainer's, and what the loss has to say."""
        trainer: Any = super()
        trainer.log(logs | self.reg.logs() if "loss" in logs else logs, *arguments, **named)

    def _count_steps_of_before(self) -> None:
        """At the first step of a run that is resumed."""
        trainer: Any = self
        done = trainer.state.global_step * trainer.args.gradient_accumulation_steps
        if done and not int(self.reg.get_extra_state()):
            self.reg.set_extra_state(torch.tensor(done))
