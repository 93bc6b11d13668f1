"""The faithfulness metrics as a torchmetrics.Metric. Needs torchmetrics (the extra "eval")."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from interpgrad.metrics.functional import HIGHER_IS_BETTER, PROTOCOLS, Protocol, faithfulness

try:
    from torchmetrics import Metric
except ImportError as reason:
    raise ImportError(
        "expected torchmetrics for interpgrad.metrics.Faithfulness, found none: `pip install torchmetrics`; "
        "interpgrad.metrics.faithfulness() does without."
    ) from reason

_INSTANCES = itertools.count()


class Faithfulness(Metric):
    """Means of the five faithfulness metrics, in percent, over batches and ranks.

    `update(x, maps, target=None, model_kwargs=None)` as of `interpgrad.metrics.faithfulness`, whose other keyword
    arguments the constructor takes; `compute()` returns {"AD", "AG", "AI", "INS", "DEL"} -> 0-dim tensor. Which of them
    are the better the higher says `interpgrad.metrics.HIGHER_IS_BETTER`, since torchmetrics has one answer for a
    metric. The model is held, not registered: the metric neither moves nor stores it.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(48, 5))
    >>> metric = Faithfulness(model)
    >>> metric.update(torch.rand(2, 3, 4, 4), torch.rand(2, 4, 4))
    >>> sorted(metric.compute())
    ['AD', 'AG', 'AI', 'DEL', 'INS']
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = None  # of some of the five: see HIGHER_IS_BETTER

    model: nn.Module
    total: Tensor
    count: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        mean: float | Sequence[float] | Tensor | None = None,
        std: float | Sequence[float] | Tensor | None = None,
        protocol: str | Protocol = "rise",
        denominator: str = "1-y",
        chunk_size: int = 64,
        **kwargs: Any,
    ) -> None:
        """Keyword arguments beyond these go to torchmetrics.Metric."""
        super().__init__(**kwargs)
        self.__dict__["model"] = model
        # A name of its own for a state: a MetricCollection takes metrics of equal states for one.
        self.add_state(f"instance_{next(_INSTANCES)}", torch.tensor(0), dist_reduce_fx="sum")
        self.settings: dict[str, Any] = {
            "mean": mean,
            "std": std,
            "protocol": PROTOCOLS.get(protocol, protocol) if isinstance(protocol, str) else protocol,
            "denominator": denominator,
            "chunk_size": chunk_size,
        }
        self.add_state("total", torch.zeros(len(HIGHER_IS_BETTER), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def __deepcopy__(self, memo: dict[int, Any]) -> Faithfulness:
        """Of the same model, not of a copy of it, as clone() is meant."""
        memo[id(self.model)] = self.model
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return copied

    def update(
        self, x: Tensor, maps: Tensor, target: Any = None, *, model_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        """Add a batch: images (N, C, H, W), maps (N, h, w) in [0, 1], the classes they explain, further arguments."""
        found = faithfulness(self.model, x, maps, target, model_kwargs=model_kwargs, **self.settings)
        self.total += torch.stack([found[name].sum() for name in HIGHER_IS_BETTER]).to(self.total)
        self.count += len(x)

    def compute(self) -> dict[str, Tensor]:
        """The means over everything since the last reset, in percent."""
        return dict(zip(HIGHER_IS_BETTER, self.total / self.count, strict=True))
