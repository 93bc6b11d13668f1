"""How the networks of the examples are trained, without and with the loss."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interpgrad import InterpretableGradientLoss, low_pass


def differentiated_log_prob(logits: Tensor, y: Tensor) -> Tensor:
    """The log-probability as a callable: the penalty may change how sure the network is, too."""
    return -F.cross_entropy(logits, y, reduction="sum")


def original_cosine(delta: Tensor, guided: Tensor) -> Tensor:
    """1 - F.cosine_similarity on the gradients of the *mean* loss: its epsilon of 1e-8 forgets sure samples."""
    samples = len(delta)
    return 1 - F.cosine_similarity((delta / samples).flatten(1), (guided / samples).flatten(1))


CRITERIA: dict[str, str | Callable[[Tensor, Tensor], Tensor]] = {
    "log_prob": "log_prob",
    "logit": "logit",
    "cross_entropy": "cross_entropy",
    "differentiated log_prob": differentiated_log_prob,
}


ERRORS: dict[str, str | Callable[[Tensor, Tensor], Tensor]] = {
    **{name: name for name in ("cos", "mae", "mse", "hi")},
    "original cos": original_cosine,
    "own mean": "cos",  # to delta's own 3x3 mean: smoothness for its own sake
}


@dataclass(frozen=True)
class Setting:
    """How one of the compared networks is trained. By default with the loss at every step: see RECIPE."""

    lam: float = 0.3
    criterion: str = "log_prob"
    low_pass: bool = True
    error: str = "cos"
    batch_norm: str = "frozen"
    warmup: float = 0.5  # the weight grows from 0 over this share of the training
    every: int = 1
    start: float = 0.0  # the loss is off for this share of the training, and the warm-up begins after it

    def __str__(self) -> str:
        if not self.lam:
            return "without"
        parts = [f"λ = {self.lam:g}", self.criterion, self.batch_norm]
        parts += [self.error] if self.error != "cos" else []
        parts += ["low-pass"] if self.low_pass else []
        parts += [f"warm-up {self.warmup:g}"] if self.warmup != Setting.warmup else []
        parts += [f"every {self.every}"] if self.every > 1 else []
        parts += [f"from {self.start:.2g} on"] if self.start else []
        return ", ".join(parts)

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser | argparse._ArgumentGroup, defaults: Setting) -> None:
        """One option for each of the fields."""
        choices = {"criterion": list(CRITERIA), "error": list(ERRORS), "batch_norm": ["frozen", "coupled"]}
        for name, default in asdict(defaults).items():
            option, about = "--" + name.replace("_", "-"), f"{_HELP[name]} (%(default)s)"
            if isinstance(default, bool):
                parser.add_argument(option, action=argparse.BooleanOptionalAction, default=default, help=about)
            else:
                parser.add_argument(option, type=type(default), choices=choices.get(name), default=default, help=about)

    @classmethod
    def of(cls, options: argparse.Namespace) -> Setting:
        """The setting that the options say."""
        return cls(**{name: getattr(options, name) for name in asdict(cls())})


_HELP = {
    "lam": "weight of the loss; 0 trains without",
    "criterion": "whose input gradients are compared",
    "low_pass": "compare the gradients after a 3x3 mean",
    "error": "their distance",
    "batch_norm": "batch statistics in the gradients: constants, or functions of the batch",
    "warmup": "share of the training with the loss over which its weight grows from 0",
    "every": "computed at one of so many steps",
    "start": "share of the training without the loss, before it begins",
}

PLAIN = Setting(lam=0)
RECIPE = Setting(every=4, start=0.5)  # README.md
PAPER = Setting(7.5e-3, "cross_entropy", low_pass=False, batch_norm="coupled", warmup=0)


def augment(x: Tensor, generator: torch.Generator, rotation: float = 0.0, padding: int = 4) -> Tensor:
    """Images (N, C, H, W), each a crop of its reflected self, mirrored or not, turned by at most `rotation` degrees.

    The draws are the CPU's, so that they are the same wherever the images are, and for each image its own, from the
    given generator: torchvision's transforms draw once for a batch, of the global random state. The stored results of
    CIFAR-10 were made with these draws.
    """
    if rotation:
        x = _rotated(x, math.radians(rotation) * (2 * torch.rand(len(x), generator=generator) - 1))
    count, channels, height, width = x.shape
    top, left = torch.randint(2 * padding + 1, (2, count, 1), generator=generator)
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    columns = torch.where(mirrored, columns.flip(1), columns)
    indices = (
        torch.arange(count)[:, None, None, None],
        torch.arange(channels)[:, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    )
    return F.pad(x, (padding,) * 4, mode="reflect")[tuple(index.to(x.device) for index in indices)]


def _rotated(x: Tensor, angles: Tensor) -> Tensor:
    """Images turned by angles (N,) in radians, bilinear, zeros beyond the border."""
    cos, sin, zero = angles.cos(), angles.sin(), torch.zeros_like(angles)
    turns = torch.stack([torch.stack([cos, -sin, zero], 1), torch.stack([sin, cos, zero], 1)], 1).to(x)
    return F.grid_sample(x, F.affine_grid(turns, list(x.shape), align_corners=False), align_corners=False)


@dataclass
class Run:
    """One network in training: its model, its regularizer, the time of each of its steps in ms.

    The weight of the loss grows from zero: on a network that has not learned anything yet, a large weight keeps it
    from ever doing so.
    """

    setting: Setting
    model: nn.Module
    steps: int  # of the whole training
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    amp: torch.dtype | None = None
    done: int = 0
    milliseconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        setting = self.setting
        start = round(setting.start * self.steps)
        self.regularizer = InterpretableGradientLoss(
            self.model,
            ERRORS[setting.error],
            setting.lam,
            target="low_pass" if setting.error == "own mean" else "guided",
            criterion=CRITERIA[setting.criterion],
            batch_norm=setting.batch_norm,
            every=setting.every,
            start=start,
            warmup=round(setting.warmup * (self.steps - start)),
            transform=low_pass if setting.low_pass else None,
        )
        self.scaler = torch.amp.GradScaler(enabled=self.amp == torch.float16)

    def objective(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """What is minimized on images x (N, 3, H, W) of classes y (N,), and the logits."""
        if not self.setting.lam:
            logits = self.model(x)
            return F.cross_entropy(logits, y), logits
        with self.regularizer.shared_forward():
            logits = self.model(x)
        return F.cross_entropy(logits, y) + self.regularizer(x, y), logits

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """One step of the training; the logits (N, K)."""
        start = time.perf_counter()
        with torch.autocast(x.device.type, dtype=self.amp, enabled=self.amp is not None):
            loss, logits = self.objective(x, y)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        self.done += 1
        self.milliseconds.append(1000 * (time.perf_counter() - start))
        return logits.detach()

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on, bit for bit."""
        parts = {name: getattr(self, name).state_dict() for name in self._PARTS}
        return parts | {"done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        for name in self._PARTS:
            getattr(self, name).load_state_dict(state[name])
        self.done = state["done"]

    _PARTS = ("model", "regularizer", "optimizer", "schedule", "scaler")


def sgd(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """What all networks of the examples are trained with."""
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4)


def one_cycle(
    setting: Setting,
    model: nn.Module,
    steps: int,
    lr: float = 0.1,
    amp: torch.dtype | None = None,
    kind: type[Run] = Run,
) -> Run:
    """A run of so many steps, whose learning rate rises to `lr` and falls to 0."""
    optimizer = sgd(model, lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps)
    return kind(setting, model, steps, optimizer, schedule, amp)
