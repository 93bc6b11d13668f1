"""Train image classifiers whose input gradients agree better with guided backpropagation.

The recipe: the log-probability's gradient, a low-pass, in the second half of the training, at every fourth step. It
costs a fifth to a third more training time. The defaults are neither this nor the paper's setting::

    reg = InterpretableGradientLoss(
        model, lam=0.3, start=steps // 2, warmup=steps // 4, every=4, transform=interpgrad.low_pass
    )

In the tests of this project, three seeds each, it doubles the cosine of input and guided gradients on digits, without a
loss of accuracy that could be seen, and puts more of the gradient on the digit. On CIFAR-10 a ResNet-18's cosine
triples, from 0.03, for 0.8 points of accuracy, and class activation maps become less faithful by average drop, gain and
increase.
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
