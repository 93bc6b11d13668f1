"""Values and gradients of the loss as they were before targets could be chosen: stored by the commit before.

`python tests/test_stored.py` writes the file again, if a change of values is meant.
"""

import itertools
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from nets import data, small_net
from torch import nn

from interpgrad import InterpretableGradientLoss, input_gradients, low_pass, saliency

STORED = Path(__file__).parent / "stored.json"


def smooth_net():
    net = small_net()
    net[2], net[6] = nn.SiLU(), nn.GELU()
    return net


NETS = {"rectified": small_net, "smooth": smooth_net}
CRITERIA = {"log_prob": "log_prob", "logit": "logit", "cross_entropy": "cross_entropy", "callable": F.cross_entropy}
CASES = {
    "/".join(case): case
    for case in itertools.product(
        NETS, ("cos", "mae", "mse", "hi"), CRITERIA, ("frozen", "coupled"), ("train", "eval"), ("plain", "shared")
    )
}


def figures(case):
    """The loss, R, the cosine, and three numbers that a gradient of every parameter takes part in."""
    net, error, criterion, batch_norm, mode, forward = case
    model, (x, y) = NETS[net]().train(mode == "train"), data(n=4)
    transform = low_pass if error in ("cos", "mse") else None
    reg = InterpretableGradientLoss(
        model, error, lam=0.5, criterion=CRITERIA[criterion], batch_norm=batch_norm, transform=transform
    )
    if forward == "shared":
        with reg.shared_forward():
            logits = model(x)
    else:
        logits = model(x)
    loss = F.cross_entropy(logits, y) + reg(x, y)
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    flat = torch.cat([gradient.flatten() for gradient in found if gradient is not None])
    wave = torch.arange(len(flat), dtype=flat.dtype).sin()
    return [
        float(each.detach()) for each in (loss, reg.penalty, reg.cosine, flat.norm(), flat.abs().sum(), flat @ wave)
    ]


def of_inputs():
    """Both gradients, and those that saliency explains by."""
    model, (x, y) = small_net(), data(n=4)
    maps = [*input_gradients(model, x, y), saliency.gradient(model, x, y), saliency.guided_gradient(model, x, y)]
    wave = torch.arange(x.numel(), dtype=x.dtype).sin()
    return [value for each in maps for value in (float(each.norm()), float(each.flatten() @ wave))]


@pytest.fixture(scope="module")
def stored():
    return json.loads(STORED.read_text())


@pytest.mark.parametrize("case", CASES)
def test_the_loss(case, stored):
    """Up to the order of sums, in which processors differ."""
    assert figures(CASES[case]) == pytest.approx(stored[case], rel=1e-9, abs=1e-12)


def test_input_gradients(stored):
    assert of_inputs() == pytest.approx(stored["input gradients"], rel=1e-9, abs=1e-12)


if __name__ == "__main__":
    values = {name: figures(case) for name, case in CASES.items()} | {"input gradients": of_inputs()}
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in values.items()]
    STORED.write_text("{\n" + ",\n".join(lines) + "\n}\n")
