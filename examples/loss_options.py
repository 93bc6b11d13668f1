"""The recipe's settings as options of a script: `InterpretableGradientLoss.recipe(model, steps, **settings(args))`."""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch
from torch import nn

import interpgrad


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options, in a group of their own."""
    group = parser.add_argument_group(
        "interpretable gradient loss",
        "The defaults are the recipe: a fifth to a third more time. On digits it doubled the cosine of both gradients "
        "and cost no accuracy that was seen; on CIFAR-10 it quadrupled a ResNet-18's for 0.6 points.",
    )
    group.add_argument("--lam", type=float, help="weight of the loss; 0 trains without (0.3)")
    group.add_argument("--error", choices=["cos", "mae", "mse", "hi"], help="(cos)")
    group.add_argument(
        "--criterion", choices=["log_prob", "logit", "cross_entropy"], help="whose gradients are compared (log_prob)"
    )
    group.add_argument(
        "--batch-norm",
        choices=["frozen", "coupled"],
        help="batch statistics in the gradients: constants, or functions of the batch (frozen)",
    )
    group.add_argument("--every", type=int, help="computed at one of so many steps (4)")
    # Not --start, which torchrun takes for an abbreviation of an option of its own.
    group.add_argument("--start-step", dest="start", type=int, help="steps before it (half of all)")
    group.add_argument("--warmup", type=int, help="steps over which the weight then grows from 0 (a quarter of all)")
    group.add_argument(
        "--low-pass", action=argparse.BooleanOptionalAction, help="compare the gradients after a 3x3 mean (yes)"
    )
    group.add_argument("--check", action="store_true", help="say first what the loss meets in the model, or stop there")


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What was given in the place of the recipe's settings."""
    names = ("error", "lam", "criterion", "batch_norm", "every", "start", "warmup")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return given if args.low_pass is None else given | {"transform": "low_pass" if args.low_pass else None}


def check(model: nn.Module, size: int, args: argparse.Namespace) -> None:
    """With --check: print what the loss meets in the model on square images of this size; stop if it cannot be used."""
    if not args.check:
        return
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    x = x.to(next(model.parameters()).device)
    chosen = {name: value for name, value in settings(args).items() if name in ("criterion", "batch_norm")}
    report = interpgrad.check(model, x, **chosen)
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        print(report)
    if not report.ok:
        raise SystemExit(1)
