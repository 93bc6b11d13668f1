"""Parity with captum's GuidedBackprop where it is right, and a network on which it silently is not."""

import warnings

import pytest
import torch
import torch.nn.functional as F
import torchvision
from nets import data, small_net
from oracle import oracle_gradients, relative_difference
from torch import nn

from interpgrad import input_gradients

captum = pytest.importorskip("captum.attr")


def captum_guided(model, x, y):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return captum.GuidedBackprop(model).attribute(x.clone().requires_grad_(), target=y)


@pytest.mark.parametrize(
    ("model", "size"),
    [
        (small_net().eval(), 8),
        (torchvision.models.vgg11(num_classes=4, dropout=0).double().eval(), 32),
        (torchvision.models.squeezenet1_1(num_classes=4, dropout=0).double().eval(), 64),
    ],
    ids=["small net", "vgg11", "squeezenet"],
)
def test_equal_where_every_relu_is_a_module_used_once(model, size, device):
    model.to(device)
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    x, y = data(size=size)
    _, guided = input_gradients(model, x, y, criterion="logit")
    assert relative_difference(captum_guided(model, x, y), guided) < 1e-9


class Functional(nn.Module):
    """The same ReLU called as a function: the commonest way to write it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(3, 6, 3).double(), nn.Linear(216, 4).double()

    def forward(self, x):
        return self.head(F.relu(self.conv(x)).flatten(1))


def test_captum_misses_functional_relus_without_a_word_of_error():
    """It returns the ordinary gradient. Should this test fail one day, captum was mended: rejoice."""
    model, (x, y) = Functional(), data()
    inputs = x.clone().requires_grad_()
    plain, guided = oracle_gradients(model(inputs).gather(1, y[:, None]).sum(), inputs)
    assert relative_difference(captum_guided(model, x, y), plain) < 1e-9
    assert relative_difference(captum_guided(model, x, y), guided) > 0.1
    assert relative_difference(input_gradients(model, x, y, criterion="logit")[1], guided) < 1e-9
