"""torchvision's reference classification script, shortened, with the interpretable gradient loss: marked with # +.

    python examples/train_torchvision.py DATA --model resnet18
    torchrun --nproc-per-node 8 examples/train_torchvision.py DATA --model resnet50 --amp bfloat16 --mixup 0.2

DATA holds train/ and val/ (or test/), one folder of images per class. Every epoch seeds its random numbers anew, and
checkpoints are those of finished epochs, so a run that is resumed does what it would have done.
"""

from __future__ import annotations

import argparse
import functools
import os
import random
from contextlib import nullcontext
from pathlib import Path

import loss_options  # +
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, default_collate
from torchvision.transforms import v2
from tqdm import tqdm

from interpgrad import InterpretableGradientLoss  # +


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--size", type=int, default=224, help="of the images (%(default)s)")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64, help="per process")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--weight-decay", type=float, default=1e-4)
    parser.add_argument("--lr-warmup-epochs", type=int, default=0)
    parser.add_argument("--clip-grad-norm", type=float)
    parser.add_argument("--label-smoothing", type=float, default=0.0)
    parser.add_argument("--mixup-alpha", type=float, default=0.0)
    parser.add_argument("--cutmix-alpha", type=float, default=0.0)
    parser.add_argument("--model-ema-decay", type=float, help="of the averaged model")
    parser.add_argument("--amp", choices=["float16", "bfloat16"], help="autocast")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--output-dir", type=Path, default=Path("output"))
    parser.add_argument("--resume", type=Path, help="a checkpoint, for instance OUTPUT_DIR/checkpoint.pth")
    parser.add_argument("--stop-after", type=int, help="epochs after which to stop, of all that are planned")
    loss_options.add_arguments(parser)  # +
    return parser.parse_args()


def mixed(batch: list, mix: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    return mix(*default_collate(batch))


def load_data(args: argparse.Namespace) -> tuple[DataLoader, DataLoader, int]:
    """Training and test batches, mixed up and cut up if asked for; the number of classes."""
    convert = [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
    augment = v2.Compose([v2.RandomResizedCrop(args.size), v2.RandomHorizontalFlip(), *convert])
    plain = v2.Compose([v2.Resize(args.size), v2.CenterCrop(args.size), *convert])
    held_out = args.data / "val" if (args.data / "val").is_dir() else args.data / "test"
    train = torchvision.datasets.ImageFolder(args.data / "train", augment)
    test = torchvision.datasets.ImageFolder(held_out, plain)
    classes = len(train.classes)
    mixes = [v2.MixUp(alpha=args.mixup_alpha, num_classes=classes)] if args.mixup_alpha else []
    mixes += [v2.CutMix(alpha=args.cutmix_alpha, num_classes=classes)] if args.cutmix_alpha else []
    collate = functools.partial(mixed, mix=v2.RandomChoice(mixes)) if mixes else None
    sampler = DistributedSampler(train) if args.distributed else RandomSampler(train)
    settings = {"batch_size": args.batch_size, "num_workers": args.workers}
    return DataLoader(train, sampler=sampler, collate_fn=collate, **settings), DataLoader(test, **settings), classes


def train_one_epoch(epoch, model, loader, reg, optimizer, scheduler, scaler, ema, args) -> None:
    model.train()
    autocast = torch.autocast(args.device.type, getattr(torch, args.amp)) if args.amp else nullcontext()
    with tqdm(loader, desc=f"epoch {epoch}", disable=args.rank != 0) as progress:
        for x, y in progress:
            x, y = x.to(args.device), y.to(args.device)
            with autocast:
                with reg.shared_forward():  # +
                    logits = model(x)
                loss = F.cross_entropy(logits, y, label_smoothing=args.label_smoothing) + reg(x, y)  # + reg(x, y)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            if args.clip_grad_norm:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad_norm)
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()
            if ema:
                ema.update_parameters(model)
            shown = {"loss": f"{loss.item():.3f}"}
            shown |= {name: f"{value:.3g}" for name, value in reg.logs().items()}  # +
            progress.set_postfix(shown)


@torch.no_grad()
def evaluate(model: nn.Module, loader: DataLoader, args: argparse.Namespace) -> float:
    """Accuracy in percent."""
    model.eval()
    hits = [(model(x.to(args.device)).argmax(1).cpu() == y).float() for x, y in loader]
    return 100 * torch.cat(hits).mean().item()


def seed_everything(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)


def main() -> None:
    args = arguments()
    args.distributed, args.rank = "RANK" in os.environ, int(os.environ.get("RANK", 0))
    if args.distributed:
        dist.init_process_group()
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    args.device = torch.device(args.device)
    seed_everything(args.seed)
    loader, test_loader, classes = load_data(args)
    model = torchvision.models.get_model(args.model, weights=None, num_classes=classes).to(args.device)
    loss_options.check(model, args.size, args)  # +
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay)
    scaler = torch.amp.GradScaler(args.device.type, enabled=args.amp == "float16")
    warmup, steps = args.lr_warmup_epochs * len(loader), args.epochs * len(loader)
    scheduler = CosineAnnealingLR(optimizer, max(1, steps - warmup))
    if warmup:
        scheduler = SequentialLR(optimizer, [LinearLR(optimizer, 0.01, total_iters=warmup), scheduler], [warmup])
    decay = args.model_ema_decay
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True) if decay else None
    whole = model
    if args.distributed:
        model = DistributedDataParallel(model, [torch.cuda.current_device()] if args.device.type == "cuda" else None)
    reg = InterpretableGradientLoss.recipe(model, steps, **loss_options.settings(args))  # +

    stateful = {"model": whole, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
    stateful |= {"reg": reg} | ({"ema": ema} if ema else {})  # + "reg": the count of steps
    first, path = 0, args.output_dir / "checkpoint.pth"

    def save(finished: int) -> None:
        if args.rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_suffix(".part")  # an interruption while writing leaves the old checkpoint
            torch.save({key: each.state_dict() for key, each in stateful.items()} | {"epoch": finished}, unfinished)
            unfinished.replace(path)

    if args.resume:
        checkpoint = torch.load(args.resume, map_location="cpu", weights_only=True)
        for key, each in stateful.items():
            each.load_state_dict(checkpoint[key])
        first = checkpoint["epoch"]
    save(first)  # so that Ctrl-C leaves a checkpoint at any time
    try:
        for epoch in range(first, min(args.epochs, args.stop_after or args.epochs)):
            seed_everything(args.seed + 1000 * args.rank + epoch)
            if args.distributed:
                loader.sampler.set_epoch(epoch)
            train_one_epoch(epoch, model, loader, reg, optimizer, scheduler, scaler, ema, args)
            accuracy = evaluate(ema or whole, test_loader, args)
            if args.rank == 0:
                print(f"epoch {epoch}: accuracy {accuracy:.2f}%")
            save(epoch + 1)
        if args.distributed:
            dist.barrier()  # torch 2.6 may wait for ever where a group ends right behind a reduction
    except KeyboardInterrupt:
        print(f"interrupted: continue with --resume {path}")
        raise SystemExit(130) from None
    finally:
        if args.distributed:
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
