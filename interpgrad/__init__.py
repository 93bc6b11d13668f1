"""Train image classifiers with a term on their input gradient: guided gradients, masks, maps, norms.

For a training of your own begin with the recipe, whose settings are not the defaults::

    reg = interpgrad.InterpretableGradientLoss.recipe(model, steps=epochs * len(loader))
"""

import importlib
from types import ModuleType

from interpgrad.double_backward import fast_double_backward
from interpgrad.gradients import input_gradients
from interpgrad.loss import InterpretableGradientLoss
from interpgrad.report import check
from interpgrad.transforms import low_pass

__all__ = ["InterpretableGradientLoss", "check", "fast_double_backward", "input_gradients", "low_pass"]
__version__ = "0.1.0"


def __getattr__(name: str) -> ModuleType:
    """interpgrad.saliency, .metrics and .plot without an import of their own."""
    if name in ("saliency", "metrics", "plot", "errors"):
        return importlib.import_module(f"interpgrad.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
