"""Train image classifiers whose input gradients are less noisy and whose explanations are more faithful."""

from interpgrad.double_backward import fast_double_backward
from interpgrad.gradients import input_gradients
from interpgrad.loss import InterpretableGradientLoss
from interpgrad.transforms import low_pass

__all__ = ["InterpretableGradientLoss", "fast_double_backward", "input_gradients", "low_pass"]
__version__ = "0.1.0"
