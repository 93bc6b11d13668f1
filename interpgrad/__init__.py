"""Train image classifiers whose input gradients are less noisy and whose explanations are more faithful."""

from interpgrad.gradients import input_gradients
from interpgrad.loss import InterpretableGradientLoss

__all__ = ["InterpretableGradientLoss", "input_gradients"]
__version__ = "0.1.0"
