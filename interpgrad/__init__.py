"""Train image classifiers with a term on their input gradient: guided gradients, masks, maps, norms.

For a training of your own begin with the recipe, whose settings are not the defaults::

    reg = interpgrad.InterpretableGradientLoss.recipe(model, steps=epochs * len(loader))
"""

from interpgrad import errors, metrics, plot, saliency
from interpgrad.double_backward import fast_double_backward
from interpgrad.gradients import input_gradients
from interpgrad.held_out import measure
from interpgrad.loss import InterpretableGradientLoss, interpretable_gradient_loss
from interpgrad.report import check
from interpgrad.transforms import low_pass

__all__ = ["InterpretableGradientLoss", "check", "errors", "fast_double_backward", "input_gradients"]
__all__ += ["interpretable_gradient_loss", "low_pass", "measure", "metrics", "plot", "saliency"]
__version__ = "0.1.0"
