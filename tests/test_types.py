"""What a type checker knows of the package: a user's script with mistakes, and one without."""

import subprocess
import sys
from typing import get_args

import pytest

from interpgrad import settings

pytestmark = pytest.mark.slow
pytest.importorskip("mypy")

HEAD = """
import interpgrad
import torch
from torch import nn

model = nn.Linear(2, 2)
x, y = torch.rand(1, 2), torch.tensor([0])
reg = interpgrad.InterpretableGradientLoss(model)
"""
RIGHT = """
term: torch.Tensor = reg(x, y)
maps: torch.Tensor = interpgrad.saliency.grad_cam(model, x, "0", y)
loss = interpgrad.InterpretableGradientLoss.recipe(model, 10, error="mse", target="zero")
area: torch.Tensor = interpgrad.metrics.insertion(model, x, x, y)
value: float = interpgrad.measure(model, [(x, y)]).cosine
per_image: torch.Tensor = interpgrad.interpretable_gradient_loss(model, x, y, reduction="none", target=x)
"""
WRONG = {
    "interpgrad.saliency.grad_camm(model, x)": 'has no attribute "grad_camm"',
    "interpgrad.anything": 'has no attribute "anything"',
    'interpgrad.InterpretableGradientLoss(model, "cosine")': 'Argument 2 to "InterpretableGradientLoss"',
    'interpgrad.InterpretableGradientLoss(model, target="guide")': 'Argument "target"',
    'interpgrad.InterpretableGradientLoss(model, batch_norm="froze")': 'Argument "batch_norm"',
    'interpgrad.input_gradients(model, x, criterion="log")': 'Argument "criterion"',
    "number: int = reg(x, y)": 'has type "Tensor"',
}


def test_names_are_those_that_there_are():
    """What a type checker takes is what the package takes."""
    from interpgrad import criteria, errors, guided, saliency, targets

    assert get_args(targets.TargetName) == (*targets.BUILT_IN, targets.GIVEN)
    assert get_args(criteria.CriterionName) == tuple(criteria._DERIVATIVES)
    assert get_args(errors.ErrorName) == tuple(errors.NAMED)
    assert set(get_args(settings.Activations)) == guided.FAMILIES.keys()
    assert saliency.CAMS.keys() <= {*saliency.__all__}
    assert all(hasattr(saliency, name) for name in saliency.__all__)


def test_a_users_script_is_checked(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(HEAD + RIGHT + "\n".join(WRONG) + "\n")
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--cache-dir", tmp_path, script]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path)
    lines = script.read_text().splitlines()
    said = {}
    for line in result.stdout.splitlines():
        place, _, message = line.partition(" error: ")
        if message:
            said.setdefault(lines[int(place.split(":")[-2]) - 1], []).append(message)
    assert said.keys() == WRONG.keys(), result.stdout + result.stderr
    for line, expected in WRONG.items():
        assert any(expected in message for message in said[line]), said[line]
