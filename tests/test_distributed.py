"""Two gloo processes: the gradients are those of one process on the whole batch."""

import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp
import torch.multiprocessing as mp
import torch.nn.functional as F
from nets import data
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from interpgrad import InterpretableGradientLoss

WORLD = 2


def spawn(function, *arguments):
    """Run a function of this module as each of two ranks; what one raises is raised here."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (str(Path(folder) / "store"), function, arguments), nprocs=WORLD)


def _rank(rank, store, function, arguments):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    try:
        function(rank, *arguments)
    finally:
        dist.destroy_process_group()


def net():
    """No batch norm: its statistics would be those of half a batch."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, groups=2),
        nn.GroupNorm(2, 8),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 4),
    ).double()


def batches():
    """Two batches of 8, of which each rank has its half."""
    return [data(8, seed=seed) for seed in range(2)]


def half(rank, tensor):
    return tensor[4 * rank : 4 * rank + 4]


def term(model, reg, x, y, shared):
    if shared:
        with reg.shared_forward():
            logits = model(x)
    else:
        logits = model(x)
    return F.cross_entropy(logits, y) + reg(x, y)


def whole_batch_gradients(accumulate):
    """Per batch, or summed over the batches, in one process."""
    model = net()
    reg, found = InterpretableGradientLoss(model, lam=0.5), []
    for x, y in batches():
        if not accumulate:
            model.zero_grad()
        term(model, reg, x, y, shared=False).backward()
        found.append({name: value.grad.clone() for name, value in model.named_parameters()})
    return found


def assert_equal(model, expected):
    found = {name.removeprefix("module."): value.grad for name, value in model.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        if hasattr(gradient, "full_tensor"):
            gradient = gradient.full_tensor()
        torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-10, msg=name)


DDP = [{}, {"find_unused_parameters": True}, {"static_graph": True}, {"gradient_as_bucket_view": True}]


def ddp(rank, settings, shared):
    model = DistributedDataParallel(net(), **settings)
    reg = InterpretableGradientLoss(model, lam=0.5)
    for (x, y), expected in zip(batches(), whole_batch_gradients(accumulate=False), strict=True):
        model.zero_grad()
        term(model, reg, half(rank, x), half(rank, y), shared).backward()
        assert_equal(model, expected)
    assert "7.bias" in expected


@pytest.mark.parametrize("settings", DDP, ids=lambda settings: next(iter(settings), "default"))
@pytest.mark.parametrize("shared", [False, True])
def test_ddp(settings, shared):
    spawn(ddp, settings, shared)


def ddp_no_sync(rank, shared):
    model = DistributedDataParallel(net())
    reg = InterpretableGradientLoss(model, lam=0.5)
    first, second = batches()
    with model.no_sync():
        term(model, reg, half(rank, first[0]), half(rank, first[1]), shared).backward()
    local = {name: value.grad.clone() for name, value in model.named_parameters()}
    term(model, reg, half(rank, second[0]), half(rank, second[1]), shared).backward()
    assert_equal(model, whole_batch_gradients(accumulate=True)[-1])
    name = "module.0.weight"
    assert not torch.allclose(local[name], whole_batch_gradients(accumulate=False)[0]["0.weight"])  # not yet averaged


@pytest.mark.parametrize("shared", [False, True])
def test_ddp_accumulation_without_synchronization(shared):
    spawn(ddp_no_sync, shared)


def ddp_every(rank):
    """Lazy steps take part in the reduction like any other."""
    model = DistributedDataParallel(net())
    reg = InterpretableGradientLoss(model, lam=0.5, every=2)
    single = net()
    alone = InterpretableGradientLoss(single, lam=0.5, every=2)
    for x, y in batches() * 2:
        for each in (model, single):
            each.zero_grad()
        term(model, reg, half(rank, x), half(rank, y), True).backward()
        term(single, alone, x, y, True).backward()
        assert_equal(model, {name: value.grad for name, value in single.named_parameters()})


def test_ddp_every():
    spawn(ddp_every)


def normalized_net():
    """Batch norm in training mode, with statistics of the whole batch."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3),
        nn.BatchNorm2d(8, affine=False, momentum=None),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 4),
        nn.BatchNorm1d(4, track_running_stats=False),
    ).double()


def sync_batch_norm(rank, shared):
    """Parts of different size: 5 and 3 images. The loss of the whole batch is the sum of theirs over 8."""
    model, single = nn.SyncBatchNorm.convert_sync_batchnorm(normalized_net()), normalized_net()
    reg, alone = InterpretableGradientLoss(model, lam=0.5), InterpretableGradientLoss(single, lam=0.5)
    for x, y in batches():
        mine, targets = (each[:5] if rank == 0 else each[5:] for each in (x, y))
        for each in (model, single):
            each.zero_grad()
        if shared:
            with reg.shared_forward():
                logits = model(mine)
            loss = F.cross_entropy(logits, targets) + reg(mine, targets)
            expected = F.cross_entropy(single(x), y) + alone(x, y)
        else:  # torch has no SyncBatchNorm on the CPU, so the user's own forward pass is left out
            loss, expected = reg(mine, targets), alone(x, y)
        (loss * len(mine) / 8).backward()
        expected.backward()
        for parameter in (*model.parameters(), *single.parameters()):
            if parameter.grad is None:  # the penalty of a piecewise linear network depends on no bias
                parameter.grad = torch.zeros_like(parameter)
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
        assert_equal(model, {name: value.grad for name, value in single.named_parameters()})
        for (name, value), buffer in zip(model.named_buffers(), single.buffers(), strict=True):
            torch.testing.assert_close(value, buffer, rtol=1e-12, atol=1e-12, msg=name)
    assert all("forward" not in vars(part) for part in model.modules())
    model.eval()
    torch.testing.assert_close(model(x), single.eval()(x))


class WithActivation(nn.SyncBatchNorm):
    """A layer that does more than normalize, as timm.layers.SyncBatchNormAct."""

    def forward(self, x):
        return F.relu(super().forward(x))


def sync_batch_norms_of_other_kinds(rank):
    """Without a bias it is the same layer; one with a forward of its own must keep it."""
    from interpgrad.double_backward.sync_batch_norm import replaced_sync_batch_norm

    layer, more, mine = nn.SyncBatchNorm(3).double(), WithActivation(3), nn.SyncBatchNorm(3)
    layer.bias, mine.forward = None, lambda x: x
    x = data(8)[0]
    with replaced_sync_batch_norm(nn.ModuleList([layer, more, mine]), differentiable=True):
        assert "forward" not in vars(more)
        assert mine(x) is x
        y = layer(half(rank, x))
    assert mine(x) is x
    torch.testing.assert_close(y, half(rank, nn.BatchNorm2d(3).double()(x)))


def test_sync_batch_norms_of_other_kinds():
    spawn(sync_batch_norms_of_other_kinds)


@pytest.mark.parametrize("shared", [False, True])
def test_sync_batch_norm(shared):
    """Differentiated across ranks, through the statistics that are shared, like batch norm in one process."""
    spawn(sync_batch_norm, shared)


def fsdp2(rank, shared):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model = net()
    mesh = init_device_mesh("cpu", (WORLD,))
    for index in (0, 2, 7):
        fully_shard(model[index], mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reg = InterpretableGradientLoss(model, lam=0.5)
    x, y = batches()[0]
    message = r"call model.set_reshard_after_backward\(False\)"
    with pytest.raises(RuntimeError, match=message):
        term(model, reg, half(rank, x), half(rank, y), shared)
    model.zero_grad()
    single = net()
    alone, reference = InterpretableGradientLoss(single, lam=0.5), torch.optim.SGD(single.parameters(), lr=0.1)
    for x, y in batches() * 2:
        optimizer.zero_grad()
        model.set_reshard_after_backward(False)  # the inner gradients leave the parameters where they are
        loss = term(model, reg, half(rank, x), half(rank, y), shared)
        model.set_reshard_after_backward(True)  # the last pass of the step frees them
        loss.backward()
        reference.zero_grad()
        term(single, alone, x, y, shared).backward()
        assert_equal(model, {name: value.grad for name, value in single.named_parameters()})
        optimizer.step()
        reference.step()
        for (name, value), expected in zip(model.named_parameters(), single.parameters(), strict=True):
            assert isinstance(value, DTensor), name  # sharded again
            torch.testing.assert_close(value.full_tensor(), expected)


@pytest.mark.skipif(not hasattr(torch.distributed.fsdp, "fully_shard"), reason="FSDP2 is not public in this torch")
@pytest.mark.parametrize("shared", [False, True])
def test_fsdp2(shared):
    spawn(fsdp2, shared)
