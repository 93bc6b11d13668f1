"""Two gloo processes: the gradients are those of one process on the whole batch."""

import tempfile
import time
import traceback
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from nets import data, fsdp2_runs
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from interpgrad import InterpretableGradientLoss, input_gradients

pytestmark = pytest.mark.slow

WORLD = 2


class Ranks:
    """Processes that are the ranks, in one process group after the other: to start them takes longer than a test."""

    def __init__(self):
        context = mp.get_context("spawn")
        self.ends, self.processes = [], []
        for rank in range(WORLD):
            end, other = context.Pipe()
            self.ends.append(end)
            self.processes.append(context.Process(target=_serve, args=(rank, other), daemon=True))
            self.processes[-1].start()

    def run(self, function, *arguments):
        """A function of this module as each of the ranks; what one raises is raised here, and the others are ended."""
        with tempfile.TemporaryDirectory() as folder:
            for end in self.ends:
                end.send((str(Path(folder) / "store"), function, arguments))
            pending = set(self.ends)
            while pending:
                answered = wait(pending, timeout=240)
                raised = [_received(end) for end in answered] or ["no answer in 240 s"]
                if any(raised):
                    self.stop()
                    raise AssertionError("\n".join(filter(None, raised)))
                pending -= set(answered)

    def stop(self):
        for process in self.processes:
            process.kill()
        self.processes = []


def _received(end):
    """The traceback, or nothing."""
    try:
        return end.recv()
    except EOFError:
        return "a rank has died"


def _serve(rank, end):
    torch.set_num_threads(1)
    while True:
        store, function, arguments = end.recv()
        torch.manual_seed(0)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
        try:
            function(rank, *arguments)
            raised = ""
        except BaseException:
            raised = traceback.format_exc()
        end.send(raised)
        time.sleep(0.05)  # freed meanwhile, tensors of the last collective have made a release of torch wait forever
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def spawn():
    """Runs a function of this module as each of two ranks, which are started anew after a failure."""
    started = []

    def run(function, *arguments):
        if not started or not started[0].processes:
            started[:] = [Ranks()]
        started[0].run(function, *arguments)

    yield run
    if started:
        started[0].stop()


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


def towards_another_class(passes):
    return passes.gradient(passes.v.roll(1, 1), guided=True)


TARGETS = {
    "guided": {},
    "mask": {"error": "outside", "target": "given"},
    "callable": {"target": towards_another_class},
    "zero": {"error": "mse", "target": "zero"},
}


def given(reg, x):
    """A mask, of a loss that takes one."""
    return {"target": x[:, :1] > 0} if reg.target == "given" else {}


def term(model, reg, x, y, shared):
    if shared:
        with reg.shared_forward():
            logits = model(x)
    else:
        logits = model(x)
    return F.cross_entropy(logits, y) + reg(x, y, **given(reg, x))


def whole_batch_gradients(accumulate, **settings):
    """Per batch, or summed over the batches, in one process."""
    model = net()
    reg, found = InterpretableGradientLoss(model, lam=0.5, **settings), []
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
    for target in TARGETS.values():
        model = DistributedDataParallel(net(), **settings)
        reg = InterpretableGradientLoss(model, lam=0.5, **target)
        for (x, y), expected in zip(batches(), whole_batch_gradients(accumulate=False, **target), strict=True):
            model.zero_grad()
            term(model, reg, half(rank, x), half(rank, y), shared).backward()
            assert_equal(model, expected)
        assert "7.bias" in expected


@pytest.mark.parametrize("settings", DDP, ids=lambda settings: next(iter(settings), "default"))
@pytest.mark.parametrize("shared", [False, True])
def test_ddp(spawn, settings, shared):
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
def test_ddp_accumulation_without_synchronization(spawn, shared):
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


def test_ddp_every(spawn):
    spawn(ddp_every)


def normalized_net(activation=nn.ReLU):
    """Batch norm in training mode, with statistics of the whole batch."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        activation(),
        nn.Conv2d(6, 8, 3),
        nn.BatchNorm2d(8, affine=False, momentum=None),
        activation(inplace=True),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 4),
        nn.BatchNorm1d(4, track_running_stats=False),
    ).double()


def sync_batch_norm(rank, shared, batch_norm, activation=nn.ReLU):
    """Parts of different size: 5 and 3 images. The loss of the whole batch is the sum of theirs over 8."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(normalized_net(activation))
    single = normalized_net(activation)
    reg, alone = (InterpretableGradientLoss(each, lam=0.5, batch_norm=batch_norm) for each in (model, single))
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


class Collectives(TorchDispatchMode):
    """Counts them."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.namespace == "c10d"
        return func(*args, **(kwargs or {}))


def kernels_for_the_cpu():
    """Of torch's SyncBatchNorm, which has them on GPUs only: what they are documented to compute."""
    shape = lambda x: (1, -1, *[1] * (x.dim() - 2))  # noqa: E731
    dims = lambda x: [0, *range(2, x.dim())]  # noqa: E731

    def stats(x, eps):
        return x.mean(dims(x)), (x.var(dims(x), unbiased=False) + eps).rsqrt()

    def gather(x, means, invstds, running_mean, running_var, momentum, eps, counts):
        share, n = (counts / counts.sum())[:, None], counts.sum()
        mean = (share * means).sum(0)
        variance = (share * (invstds**-2 - eps + (means - mean) ** 2)).sum(0)
        if running_mean is not None:
            running_mean.lerp_(mean, momentum)
            running_var.lerp_(variance * n / (n - 1), momentum)
        return mean, (variance + eps).rsqrt()

    def normalize(x, weight, bias, mean, invstd, eps):
        y = (x - mean.view(shape(x))) * invstd.view(shape(x))
        return y if weight is None else y * weight.view(shape(x)) + bias.view(shape(x))

    def reduce(g, x, mean, invstd, weight, *wanted):
        sum_dy, sum_dy_xmu = g.sum(dims(x)), (g * (x - mean.view(shape(x)))).sum(dims(x))
        return sum_dy, sum_dy_xmu, sum_dy_xmu * invstd, sum_dy.clone()

    def backward(g, x, mean, invstd, weight, sum_dy, sum_dy_xmu, count):
        n = count.sum()
        centred = g - (sum_dy / n).view(shape(x))
        centred = centred - (x - mean.view(shape(x))) * (sum_dy_xmu / n * invstd**2).view(shape(x))
        return centred * (invstd if weight is None else invstd * weight).view(shape(x))

    library = torch.library.Library("aten", "IMPL")
    for name, kernel in {
        "batch_norm_stats": stats,
        "batch_norm_gather_stats_with_counts": gather,
        "batch_norm_elemt": normalize,
        "batch_norm_backward_reduce": reduce,
        "batch_norm_backward_elemt": backward,
    }.items():
        library.impl(name, kernel, "CPU")
    return library


def sync_batch_norm_on_kernels(rank):
    from interpgrad.double_backward import sync_batch_norm as module

    library, found = kernels_for_the_cpu(), module._has_kernels
    module._has_kernels = lambda x: True
    for activation in (nn.ReLU, nn.SiLU):
        sync_batch_norm(rank, True, "frozen", activation)
    collectives(rank, "frozen", 0)
    model, more = nn.SyncBatchNorm.convert_sync_batchnorm(normalized_net()), []
    coupled, frozen = (InterpretableGradientLoss(model, batch_norm=each) for each in ("coupled", "frozen"))
    x, y = (half(rank, each) for each in batches()[0])
    for first, second in ((coupled, frozen), (frozen, coupled)):
        with first.shared_forward(), second.shared_forward():
            model(x)
        more.append(coupled(x, y) + frozen(x, y))
        assert all("forward" not in vars(part) for part in model.modules())
    torch.testing.assert_close(more[0], more[1])
    module._has_kernels = found
    del library


def test_sync_batch_norm_on_torchs_own_kernels(spawn):
    """As on GPUs: torch's Function, whose inner passes need no collective; of two losses, one coupled, either order."""
    spawn(sync_batch_norm_on_kernels)


def collectives(rank, batch_norm, count):
    model = nn.SyncBatchNorm.convert_sync_batchnorm(normalized_net())
    reg = InterpretableGradientLoss(model, lam=0.5, batch_norm=batch_norm)
    x, y = (half(rank, each) for each in batches()[0])
    with reg.shared_forward():
        model(x)
    with Collectives() as inner:
        value = reg(x, y)
    with Collectives() as outer:
        value.backward()
    assert (inner.count, outer.count > 0) == (count, count > 0)


@pytest.mark.parametrize(("batch_norm", "count"), [("frozen", 0), ("coupled", 12)])
def test_no_collective_in_inner_passes(spawn, batch_norm, count):
    """Coupled, there are two sums for each of three layers in each of two passes."""
    spawn(collectives, batch_norm, count)


def float16_with_sync_batch_norm(rank, amplified):
    """Rank 1 is far surer than rank 0, so that each by itself would scale its gradients by another power of two."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(normalized_net()).float()
    with torch.no_grad():
        model[-1].weight *= 1024 if amplified else 4
    x, y = (half(rank, each) for each in batches()[0])
    x = x.float()
    certainty = 2.0 ** (-10 * rank)
    criterion = lambda logits, _: certainty * logits[:, 0].sum()  # noqa: E731
    settings = {"criterion": criterion, "batch_norm": "coupled"}
    delta, guided = input_gradients(model, x, y, **settings)
    with torch.autocast("cpu", torch.float16):
        half_delta, half_guided = input_gradients(model, x, y, **settings)
    for ours, expected in ((half_delta, delta), (half_guided, guided)):
        assert (ours - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("amplified", [False, True])
def test_float16_with_sync_batch_norm(spawn, amplified):
    """The ranks agree on the scale, and on lowering it: the collectives add gradients of one scale."""
    spawn(float16_with_sync_batch_norm, amplified)


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


def test_sync_batch_norms_of_other_kinds(spawn):
    spawn(sync_batch_norms_of_other_kinds)


@pytest.mark.parametrize("batch_norm", ["frozen", "coupled"])
@pytest.mark.parametrize("shared", [False, True])
def test_sync_batch_norm(spawn, shared, batch_norm):
    """Differentiated across ranks, through the statistics that are shared or not, like batch norm in one process."""
    spawn(sync_batch_norm, shared, batch_norm)


@pytest.mark.parametrize("shared", [False, True])
def test_sync_batch_norm_beside_smooth_activations(spawn, shared):
    """Where the second derivative is taken in a pass of its own."""
    spawn(sync_batch_norm, shared, "frozen", nn.SiLU)


def smooth_net():
    """Batch norm and a smooth activation: delta is differentiated in a pass of its own. In evaluation mode one net."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 4),
    ).double()


def sharded(build):
    """FSDP2's units are the layers with parameters, and the whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, mesh = build(), init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def are_freed(model):
    """Whether the parameters are the rank's own shares, and no gradient waits."""
    from torch.distributed.tensor import DTensor

    return all(isinstance(each, DTensor) for each in model.parameters())


def fsdp2(rank, build, shared, keeps):
    for target in TARGETS.values():
        fsdp2_with(rank, build, shared, keeps, target)


def fsdp2_with(rank, build, shared, keeps, target):
    model, single = sharded(build), build()
    optimizer, reference = (torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, single))
    reg, alone = (InterpretableGradientLoss(each, lam=0.5, **target) for each in (model, single))
    model.set_reshard_after_backward(not keeps)
    for x, y in batches() * 2:
        images, targets = (half(rank, x), half(rank, y)) if build is net else (x, y)
        optimizer.zero_grad()
        term(model, reg, images, targets, shared).backward()
        assert are_freed(model) == (not keeps)
        reference.zero_grad()
        term(single, alone, x, y, shared).backward()
        if keeps:
            model.reshard()
            for layer in model:
                if hasattr(layer, "reshard"):
                    layer.reshard()
        assert_equal(model, {name: value.grad for name, value in single.named_parameters()})
        optimizer.step()
        reference.step()
        if not keeps:
            with torch.no_grad():  # nothing comes after: the next step would use what was not freed
                torch.testing.assert_close(reg(x, y, **given(reg, x)), alone(x, y, **given(alone, x)))
            assert are_freed(model)
            torch.testing.assert_close(input_gradients(model, x, y), input_gradients(single, x, y))
            assert are_freed(model)


@fsdp2_runs
@pytest.mark.parametrize("keeps", [False, True], ids=["freed", "kept by the user"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("build", [net, smooth_net])
def test_fsdp2(spawn, build, shared, keeps):
    spawn(fsdp2, build, shared, keeps)


def tensor_parallel(rank, shared):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    layers = nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 4)
    model = nn.Sequential(*layers).double()
    model = parallelize_module(
        model, init_device_mesh("cpu", (WORLD,)), {"1": ColwiseParallel(), "3": RowwiseParallel()}
    )
    reg, (x, y) = InterpretableGradientLoss(model, lam=0.5), data()
    with pytest.raises(RuntimeError, match=r"tensor-parallel layers \(DTensor\).*with DDP or FSDP2"):
        term(model, reg, x, y, shared)


@pytest.mark.parametrize("shared", [False, True])
def test_tensor_parallel_layers_are_refused(spawn, shared):
    """Stock PyTorch loses the penalty's gradient there, or gets it wrong, without a word."""
    spawn(tensor_parallel, shared)
