"""Is the installed package whole? Its version is the tag's, if one is given, and a step of training has gradients.

python .ci/verify.py [v0.1.0]
"""

import importlib.metadata
import sys

import torch
from torch import nn

import interpgrad

if sys.argv[1:] not in ([], [f"v{interpgrad.__version__}"]):
    sys.exit(f"verify: expected the tag v{interpgrad.__version__}, got {sys.argv[1]}: they must be the same.")
if importlib.metadata.version("interpgrad") != interpgrad.__version__:
    sys.exit("verify: expected the distribution to have the version of its package.")

model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
x, y = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
interpgrad.InterpretableGradientLoss(model)(x, y).backward()
if not model[0].weight.grad.any():
    sys.exit("verify: expected the loss to have a gradient, got 0.")
print(f"interpgrad {interpgrad.__version__} with torch {torch.__version__} in {interpgrad.__file__}")
