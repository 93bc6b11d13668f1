"""What gradients are taken of, and how: validated once, passed on whole."""

from __future__ import annotations

import numbers
from dataclasses import dataclass
from typing import Literal

from interpgrad.criteria import IGNORED, Criterion, CriterionName, Derivative, derivative_of
from interpgrad.guided import FAMILIES

Statistics = Literal["frozen", "coupled"]
Activations = Literal["all", "relu"]
Reduction = Literal["mean", "none"]


@dataclass(frozen=True)
class Settings:
    """As of `InterpretableGradientLoss`, which documents each. A ValueError names what is unknown."""

    criterion: CriterionName | Criterion = "log_prob"
    batch_norm: Statistics = "frozen"
    activations: Activations = "all"
    ignore_index: int = IGNORED

    def __post_init__(self) -> None:
        if self.activations not in FAMILIES:
            raise ValueError(f'expected activations="relu" or activations="all", got {self.activations!r}.')
        if self.batch_norm not in ("frozen", "coupled"):
            raise ValueError(f'expected batch_norm="frozen" or batch_norm="coupled", got {self.batch_norm!r}.')
        if not isinstance(self.ignore_index, numbers.Integral) or isinstance(self.ignore_index, bool):
            raise ValueError(f"expected ignore_index to be an integer, got {self.ignore_index!r}.")
        derivative_of(self.criterion, self.ignore_index)

    @property
    def derivative(self) -> Derivative:
        """Of the criterion, at the logits."""
        return derivative_of(self.criterion, self.ignore_index)
