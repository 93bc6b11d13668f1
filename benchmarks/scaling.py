"""What docs/explanation/scaling.md reckons with: operations, peak memory, what two ranks send each other in a step.

    python benchmarks/scaling.py --json benchmarks/results/scaling.json

Nothing is timed. Operations and bytes sent are counted, so they are the same on any machine; the memory is that of the
CPU's kernels.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from flops import count_flops
from overhead import build, peak_bytes, provenance
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from interpgrad import InterpretableGradientLoss

KINDS = ("plain step", "plain call", "shared forward", "step skipped by every")


def step(kind: str, model: nn.Module, x: Tensor, y: Tensor, finish: Callable[[Tensor], None] = Tensor.backward) -> None:
    """A training step but for the optimizer's."""
    reg = InterpretableGradientLoss(model, lam=0.1, every=2)
    if kind == "step skipped by every":
        reg.set_extra_state(torch.tensor(1))
        reg._tried = True  # as after the first call
    if kind in ("shared forward", "step skipped by every"):
        with reg.shared_forward():
            logits = model(x)
    else:
        logits = model(x)
    loss = F.cross_entropy(logits, y)
    finish(loss if kind == "plain step" else loss + reg(x, y))


def batch(images: int, size: int) -> tuple[Tensor, Tensor]:
    return torch.randn(images, 3, size, size), torch.randint(10, (images,))


def operations(name: str, size: int, kind: str) -> float:
    """Per image, in GFLOP, a multiply-add counted as two."""
    images, model = 2, build(name, classes=1000)
    with count_flops() as counter:
        step(kind, model, *batch(images, size))
    return counter.get_total_flops() / images / 1e9


def memory(name: str, size: int, kind: str) -> tuple[float, float]:
    """Peak of a step in MB: what each image adds, and what remains."""
    few, many, model = 2, 4, build(name, classes=1000)
    low, high = (_peak(model, kind, *batch(images, size)) for images in (few, many))
    slope = (high - low) / (many - few)
    return slope / 1e6, (low - few * slope) / 1e6


def _peak(model: nn.Module, kind: str, x: Tensor, y: Tensor) -> int:
    held: list[Tensor] = []
    return peak_bytes(model, x, lambda: [step(kind, model, x, y, held.append), held.pop()][1])


class CountSent(TorchDispatchMode):
    """Calls and bytes of the collectives inside: each rank's part of what is reduced, all of what is gathered."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__.strip("_").removesuffix("_base")
            tensors = args[0] if isinstance(args[0], list) else [args[0] if "gather" in name else args[1]]
            self.calls[name] += 1
            self.bytes[name] += sum(each.numel() * each.element_size() for each in tensors)
        return func(*args, **(kwargs or {}))


def _rank(rank: int, folder: str, name: str, size: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {kind: {"DDP": _ddp(name, kind, size), "FSDP2": _fsdp2(name, kind)} for kind in KINDS}
    for kind in ("plain call", "shared forward"):
        found[kind]["SyncBatchNorm"] = _sync_batch_norm(name, kind)
    if rank == 0:
        (Path(folder) / "sent.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _ddp(name: str, kind: str, size: int) -> dict[str, Any]:
    """By a communication hook: the reducer does not pass the dispatcher.

    The second step is counted, for which DDP has sorted its buckets. `gflop_after`: what each image is yet to cost when
    the first bucket leaves, behind which the reduction can hide.
    """
    sent: list[int] = []
    done: list[float] = []
    counter = count_flops()

    def hook(group, bucket):  # type: ignore[no-untyped-def]  # DDP checks annotations, and knows no strings
        sent.append(bucket.buffer().numel() * bucket.buffer().element_size())
        done.append(counter.get_total_flops())
        return allreduce_hook(group, bucket)

    model = DistributedDataParallel(build(name, classes=1000))
    model.register_comm_hook(None, hook)
    images = 2
    step(kind, model, *batch(images, size))
    sent.clear(), done.clear()
    with counter:
        step(kind, model, *batch(images, size))
    left = (counter.get_total_flops() - done[0]) / images / 1e9
    return {"calls": {"allreduce": len(sent)}, "megabytes": {"allreduce": sum(sent) / 1e6}, "gflop_after": left}


def _fsdp2(name: str, kind: str) -> dict[str, Any]:
    """Every residual block a unit of its own, the rest with the whole."""
    model, mesh = build(name, classes=1000), init_device_mesh("cpu", (2,))
    for part in model.modules():
        if type(part).__name__ in ("BasicBlock", "Bottleneck"):
            fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)

    def finish(loss: Tensor) -> None:
        model.set_reshard_after_backward(True)
        loss.backward()

    model.set_reshard_after_backward(False)
    with CountSent() as sent:
        step(kind, model, *batch(2, 64), finish)
    return {"calls": dict(sent.calls), "megabytes": {each: value / 1e6 for each, value in sent.bytes.items()}}


def _sync_batch_norm(name: str, kind: str) -> dict[str, Any]:
    """What the statistics add to the loss's part of a step; torch's own forward pass is for GPUs."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(build(name, classes=1000))
    reg, (x, y) = InterpretableGradientLoss(model, lam=0.1), batch(2, 64)
    with CountSent() as sent:
        if kind == "shared forward":
            with reg.shared_forward():
                loss = F.cross_entropy(model(x), y)
            (loss + reg(x, y)).backward()
        else:
            reg(x, y).backward()
    return {"calls": dict(sent.calls), "megabytes": {each: value / 1e6 for each, value in sent.bytes.items()}}


def communication(name: str, size: int) -> Any:
    """Per kind of step and wrapper: calls and megabytes of each collective, for one rank of two."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (folder, name, size), nprocs=2)
        return json.loads((Path(folder) / "sent.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    sent = communication(args.model, args.size)
    rows = {}
    for kind in KINDS:
        per_image, fixed = memory(args.model, args.size, kind)
        rows[kind] = {"gflop": operations(args.model, args.size, kind), "mb_per_image": per_image, "mb_fixed": fixed}
        rows[kind]["sent"] = sent[kind]
    parameters = sum(each.numel() for each in build(args.model, classes=1000).parameters())
    found = {**provenance("cpu"), "model": args.model, "size": args.size, "parameters": parameters, "rows": rows}
    print(json.dumps(found, indent=1))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
