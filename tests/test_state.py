"""What a model does in `train`, and writes in its forward pass beside buffers, is right after a call."""

import copy

import pytest
import torch
import torch.nn.functional as F
from nets import Checkpointed, data, small_net
from torch import nn
from torch.utils.checkpoint import checkpoint
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


class Flat(Table):
    """A table of one shape for two sizes."""

    def forward(self, x):
        if self.size != tuple(x.shape[-2:]):
            self.size = tuple(x.shape[-2:])
            self.table = torch.outer(torch.arange(self.size[0], **double), torch.ones(self.size[1], **double)).flatten()
        return self.net(x * self.table.view(self.size))


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_tables_of_one_shape_for_two_sizes(call):
    (x, y), model = data(size=16), Flat(registered=True)
    model(x[..., :8, :12])
    call(model, x[..., :12, :8], y)
    fresh = Flat(registered=True)
    fresh.net.load_state_dict(model.net.state_dict())
    for images in (x[..., :12, :8], x[..., :8, :12]):
        torch.testing.assert_close(model(images), fresh(images))


def test_tables_whose_size_is_noted_elsewhere():
    """In a dict, say, or in another object: the table stays for its shape."""

    class Noted(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.noted = small_net(), {}
            self.register_buffer("table", torch.ones(1, **double))

        def forward(self, x):
            if self.noted.get("size") != x.shape[-2:]:
                self.noted["size"] = x.shape[-2:]
                self.table = torch.ones(x.shape[-2:], **double)
            return self.net(x * self.table)

    (x, y), model = data(size=16), Noted()
    model(x)
    InterpretableGradientLoss(model)(x[..., :8, :12], y).backward()
    model(x[..., :8, :12])
    assert model.table.shape == (8, 12)


class InPlace(Table):
    """A table in a part of a buffer that is large enough for every size, written in place."""

    def __init__(self):
        super().__init__(registered=False)
        self.register_buffer("table", torch.zeros(400, **double))

    def forward(self, x):
        if self.size != x.shape[-2:]:
            self.size = x.shape[-2:]
            self.table[: self.size.numel()] = torch.arange(self.size.numel(), **double).sin() + self.size[0]
        return self.net(x * self.table[: self.size.numel()].view(self.size))


class Resized(Table):
    """The same tensor with another shape."""

    def forward(self, x):
        if self.size != x.shape[-2:]:
            self.size = x.shape[-2:]
            self.table.resize_(self.size).copy_(torch.arange(self.size.numel(), **double).view(self.size).sin())
        return self.net(x * self.table)


class Swapped(Table):
    """The same tensor with other data."""

    def forward(self, x):
        if self.size != x.shape[-2:]:
            self.size = x.shape[-2:]
            self.table.data = torch.arange(self.size.numel(), **double).view(self.size).sin()
        return self.net(x * self.table)


class SizeInBuffer(Table):
    """A size that is a buffer too, beside a table of another shape or of the same."""

    def __init__(self):
        super().__init__(registered=True)
        self.register_buffer("noted", torch.zeros(2, dtype=torch.long))

    def forward(self, x):
        if self.noted.tolist() != list(x.shape[-2:]):
            self.noted = torch.tensor(x.shape[-2:])
            self.table = torch.arange(x[0, 0].numel(), **double).sin() + x.shape[-2]
        return self.net(x * self.table.view(x.shape[-2:]))


TABLES = {
    "in place": InPlace,
    "resized": lambda: Resized(registered=True),
    "swapped": lambda: Swapped(registered=True),
    "size in a buffer": SizeInBuffer,
}


@pytest.mark.parametrize("then", [(12, 8), (6, 6)], ids=str)
@pytest.mark.parametrize("before", [None, (8, 12)], ids=str)
@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_tables_and_sizes_in_other_places(call, table, before, then):
    (x, y), model = data(size=16), table()
    if before:
        model(x[..., : before[0], : before[1]])
    call(model, x[..., : then[0], : then[1]], y)
    for size in ((12, 8), (8, 12), (6, 6)):
        fresh, trained = table(), copy.deepcopy(model)
        fresh.net.load_state_dict(trained.net.state_dict())
        images = x[..., : size[0], : size[1]]
        torch.testing.assert_close(trained(images), fresh(images))


class Averages(nn.Module):
    """A running mean, replaced in each pass, beside what else is written there."""

    def __init__(self, write):
        super().__init__()
        self.net, self.write = small_net(), write
        self.calls, self.last, self.size = 0, None, None
        self.register_buffer("average", torch.zeros((), **double))

    def forward(self, x):
        self.write(self, x)
        self.average = 0.9 * self.average + 0.1 * x.detach().mean()
        return self.net(x)


def count(model, x):
    model.calls += 1


def keep(model, x):
    model.last = x.detach()


def keep_size(model, x):
    model.size = tuple(x.shape[-2:])


def keep_loss(model, x):
    model.loss = float(x.detach().square().mean())


@pytest.mark.parametrize("before", [False, True], ids=["at first", "later"])
@pytest.mark.parametrize("write", [count, keep, keep_size, keep_loss])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_statistics_that_are_replaced_are_given_back(call, write, before):
    model, (x, y) = Averages(write), data()
    if before:
        model(x)
    expected, value, calls = model.average, model.average.clone(), model.calls
    call(model, x + 1, y)
    assert model.average is expected
    assert torch.equal(model.average, value)
    assert model.calls == calls


def test_attributes_stay_where_more_has_changed():
    """Beside a new attribute, an object of another kind, a new layer, or without buffers."""

    class Writes(nn.Module):
        def __init__(self, what, buffers):
            super().__init__()
            self.net, self.what, self.built, self.kept = small_net(), what, False, None
            if buffers:
                self.register_buffer("average", torch.zeros((), **double))

        def forward(self, x):
            self.built = True
            if self.what == "attribute":
                self.new = 1
            elif self.what == "object":
                self.kept = [1]
            elif self.what == "layer":
                self.layer = nn.Identity()
            elif self.what == "parameter":
                self.scale = nn.Parameter(torch.ones((), **double))
            return self.net(x)

    x, y = data()
    for what, buffers, stays in (
        *((what, True, True) for what in ("attribute", "object", "layer", "parameter")),
        *(("nothing", False, True), ("nothing", True, False)),
    ):
        model = Writes(what, buffers)
        input_gradients(model, x, y)
        assert model.built == stays, what


def test_what_is_made_in_the_first_pass():
    """By flags, in sets: what the pass writes elsewhere stays, and with it what belongs to it."""

    class Lazy(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.built, self.sizes = small_net(), False, set()
            self.register_buffer("table", None)

        def forward(self, x):
            if not self.built:
                self.scale = nn.Parameter(torch.ones((), **double))
                self.register_buffer("shift", x.detach().mean())
                self.built = True
            if x.shape not in self.sizes:
                self.sizes.add(x.shape)
                self.table = torch.ones(x.shape[-2:], **double)
            return self.net(self.scale * (x - self.shift) * self.table)

    (x, y), model = data(), Lazy()
    assert check(model, x, y).ok
    made = model.scale
    InterpretableGradientLoss(model)(x, y).backward()
    model(x)
    assert model.scale is made


def test_checkpointed_layers_that_read_what_their_parent_wrote():
    """It is there when they run again, in inner passes and in the user's."""

    class Block(nn.Module):
        keep = None

        def forward(self, h):
            return h * self.keep

    class Parent(nn.Module):
        def __init__(self, checkpointed):
            super().__init__()
            self.net, self.block, self.checkpointed = small_net(), Block(), checkpointed

        def forward(self, x):
            self.block.keep = (torch.rand(len(x), 1, 1, 1) > 0.5).to(x)
            x = checkpoint(self.block, x, use_reentrant=False) if self.checkpointed else self.block(x)
            return self.net(x)

    found, (x, y) = [], data()
    for checkpointed in (True, False):
        model = Parent(checkpointed)
        reg = InterpretableGradientLoss(model)
        model(x)
        torch.manual_seed(4)
        loss = reg(x, y)
        loss.backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        found.append([loss.detach(), *gradients])
    torch.testing.assert_close(*found)


def test_parameters_that_train_freezes():
    """By overrides of `train`: a map leaves them as they were."""

    class Unfreezes(nn.Sequential):
        def train(self, mode=True):
            self.requires_grad_(mode)
            return super().train(mode)

    model = Unfreezes(*small_net())
    model[0].weight.requires_grad_(False)
    before = [parameter.requires_grad for parameter in model.parameters()]
    saliency.gradient(model, data()[0])
    assert [parameter.requires_grad for parameter in model.parameters()] == before
