"""What a model does in `train`, and writes in its forward pass beside buffers, is as if nobody had called."""

import pytest
import torch
import torch.nn.functional as F
from nets import Checkpointed, data, small_net
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from interpgrad import InterpretableGradientLoss, check, input_gradients, metrics, saliency

double = {"dtype": torch.float64}


class Told(nn.Module):
    """As LoRA's layers: in evaluation the low rank is merged into the weight, by `train`."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, **double), requires_grad=False)
        self.rank = nn.Parameter(torch.randn(4, 4, **double))
        self.told = []

    def train(self, mode=True):
        if self.training != mode:
            self.weight.data += self.rank.detach() * (-1 if mode else 1)
        self.told.append(mode)
        return super().train(mode)

    def forward(self, x):
        return F.linear(x, self.weight + self.rank if self.training else self.weight)


class AlwaysFrozen(nn.BatchNorm2d):
    """Never in training mode, whatever it is told."""

    def train(self, mode=True):
        return super().train(False)


EVALUATED = {
    "gradient": lambda model, x: saliency.gradient(model, x),
    "map": lambda model, x: saliency.grad_cam(model, x, "0.0"),
    "metric": lambda model, x: metrics.insertion(model, x, torch.rand(len(x), 8, 8)),
}


@pytest.mark.parametrize("use", EVALUATED.values(), ids=EVALUATED)
def test_modules_are_told_of_their_mode(use):
    trunk, told = small_net(), Told()
    trunk[1].eval()
    trunk[5] = AlwaysFrozen(8).double()
    model = nn.Sequential(trunk, nn.Sequential(nn.Dropout(0.5), told).eval())
    told.train()  # a parent in evaluation mode, its child in training
    modes, weight = [module.training for module in model.modules()], told.weight.clone()
    told.told.clear()
    use(model, data()[0])
    assert [module.training for module in model.modules()] == modes
    assert (told.told[0], told.told[-1]) == (False, True)
    torch.testing.assert_close(told.weight, weight)
    model.eval()
    told.told.clear()
    use(model, data()[0])
    assert told.told == [], "nothing to tell where all are in evaluation mode"


def test_training_goes_on_after_a_map():
    """The network that torchvision makes has two graphs, and swaps them in `train`."""

    class Drops(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small_net()

        def forward(self, x):
            return self.net(F.dropout(x, 1.0, self.training))

    model, (x, _) = create_feature_extractor(Drops(), {"net": "logits"}), data()
    saliency.gradient(model, x)
    torch.testing.assert_close(model(x), model(0 * x))


class Table(nn.Module):
    """A table for the size of the images, kept as a buffer, and attributes that say of which size it is."""

    def __init__(self, *, registered):
        super().__init__()
        self.net = small_net()
        self.size = None
        if registered:
            self.register_buffer("table", torch.ones(1, **double))

    def forward(self, x):
        if self.size != x.shape[-2:]:
            table = torch.arange(x[0, 0].numel(), **double).reshape(x.shape[-2:]).sin()
            self.table = table if "table" in self._buffers else nn.Buffer(table)
            self.size = x.shape[-2:]
        return self.net(x * self.table)


CALLS = {
    "loss": lambda model, x, y: InterpretableGradientLoss(model)(x, y).backward(),
    "checkpointed": lambda model, x, y: InterpretableGradientLoss(Checkpointed(model))(x, y).backward(),
    "input gradients": lambda model, x, y: input_gradients(model, x, y),
    "check": lambda model, x, y: check(model, x, y),
    "map": lambda model, x, y: saliency.gradient(model, x, y),
}


@pytest.mark.parametrize("size", [(8, 12), (12, 8), (4, 24), None], ids=str)
@pytest.mark.parametrize("registered", [True, False])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_tables_for_the_size_of_the_images(call, registered, size):
    """Afterwards table and size belong together, whatever the size of the images before and in the call."""
    (x, y), model = data(size=16), Table(registered=registered)
    at_first = x[..., :8, :12]
    if size:
        model(at_first)
    size = size or (8, 12)
    call(model, x[..., : size[0], : size[1]], y)
    fresh = Table(registered=registered)
    fresh.load_state_dict(model.net.state_dict(prefix="net."), strict=False)
    torch.testing.assert_close(model(at_first), fresh(at_first))


def test_counters_and_features_of_modules():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.calls, self.features = small_net(), 0, None

        def forward(self, x):
            self.calls += 1
            self.features = self.net[0](x)
            return self.net(x)

    model, (x, y) = Counts(), data()
    logits = model(x)
    features = model.features
    (F.cross_entropy(logits, y) + InterpretableGradientLoss(model)(x, y)).backward()
    assert model.calls == 1
    assert model.features is features
