"""A timm training loop with the interpretable gradient loss: what it adds is marked with # +.

    python examples/train_timm.py DATA --model resnet18 --num-classes 10
    torchrun --nproc-per-node 8 examples/train_timm.py DATA --model resnet50 --amp bfloat16 --channels-last --mixup 0.2

For any release of timm; from 1.0.27 on, its own train.py needs two changed lines instead, which
interpgrad/integrations/timm.py shows.

DATA holds train/ and val/ (or validation/, test/), one folder of images per class. Every epoch seeds its random numbers
anew, and checkpoints are those of finished epochs, so a run that is resumed does what it would have done.
"""

from __future__ import annotations

import argparse
import math
from contextlib import nullcontext
from pathlib import Path

import loss_options  # +
import timm
import torch
from timm import utils
from timm.data import Mixup, create_dataset, create_loader
from timm.data.mixup import mixup_target
from timm.loss import SoftTargetCrossEntropy
from timm.models import load_checkpoint, resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from interpgrad import InterpretableGradientLoss  # +


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--num-classes", type=int, default=1000)
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64, help="per process")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--opt", default="sgd")
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--weight-decay", type=float, default=1e-4)
    parser.add_argument("--sched", default="cosine")
    parser.add_argument("--warmup-epochs", type=int, default=0)
    parser.add_argument("--clip-grad", type=float, help="largest norm of the gradient")
    parser.add_argument("--grad-accum-steps", type=int, default=1)
    parser.add_argument("--mixup", type=float, default=0.0)
    parser.add_argument("--cutmix", type=float, default=0.0)
    parser.add_argument("--smoothing", type=float, default=0.0, help="of the labels")
    parser.add_argument("--bce-loss", action="store_true", help="binary cross-entropy in place of cross-entropy")
    parser.add_argument("--model-ema", type=float, help="decay of the averaged model")
    parser.add_argument("--amp", choices=["float16", "bfloat16"], help="autocast")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--stop-after", type=int, help="epochs after which to stop, of all that are planned")
    parser.add_argument("--output", type=Path, default=Path("output"))
    parser.add_argument("--resume", default="", help="a checkpoint, for instance OUTPUT/last.pth.tar")
    loss_options.add_arguments(parser)  # +
    return parser.parse_args()


def train_epoch(epoch, model, loader, mixup, loss_fn, reg, optimizer, scheduler, scaler, ema, args):
    """One pass over the training images."""
    model.train()
    losses, shown = utils.AverageMeter(), {}
    autocast = torch.autocast(args.device.type, getattr(torch, args.amp)) if args.amp else nullcontext()
    updates, batches = epoch * math.ceil(len(loader) / args.grad_accum_steps), len(loader)
    with tqdm(loader, desc=f"epoch {epoch}", disable=not utils.is_primary(args)) as progress:
        for index, (x, y) in enumerate(progress):
            x, y = x.to(args.device), y.to(args.device)
            if args.channels_last:
                x = x.contiguous(memory_format=torch.channels_last)
            x, y = mixup(x, y) if mixup else (x, mixup_target(y, args.num_classes, smoothing=args.smoothing))
            group = min(args.grad_accum_steps, batches - index // args.grad_accum_steps * args.grad_accum_steps)
            update = (index + 1) % args.grad_accum_steps == 0 or index + 1 == batches
            with nullcontext() if update or not args.distributed else model.no_sync():
                with autocast:
                    with reg.shared_forward():  # +
                        logits = model(x)
                    loss = loss_fn(logits, y) + reg(x, y)  # + reg(x, y)
                loss = loss / group
                if scaler:
                    scaler(loss, optimizer, args.clip_grad, parameters=model.parameters(), need_update=update)
                else:
                    loss.backward()
                    if update and args.clip_grad:
                        nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
                    if update:
                        optimizer.step()
            losses.update(loss.item() * group, len(x))
            if update:
                optimizer.zero_grad()
                updates += 1
                if ema:
                    ema.update(model, step=updates)
                if scheduler:
                    scheduler.step_update(updates)
            shown |= {name: f"{value:.3g}" for name, value in reg.logs().items()}  # +
            progress.set_postfix(loss=f"{losses.avg:.3f}", **shown)
    return losses.avg


@torch.no_grad()
def validate(model: nn.Module, loader, args: argparse.Namespace) -> float:
    """Accuracy in percent."""
    model.eval()
    meter = utils.AverageMeter()
    for x, y in loader:
        top1 = utils.accuracy(model(x.to(args.device)), y.to(args.device))[0]
        meter.update((utils.reduce_tensor(top1, args.world_size) if args.distributed else top1).item(), len(x))
    return meter.avg


def main() -> None:
    args = arguments()
    args.device = utils.init_distributed_device(args)
    utils.random_seed(args.seed, 0)
    model = timm.create_model(args.model, num_classes=args.num_classes).to(args.device)
    if args.channels_last:
        model = model.to(memory_format=torch.channels_last)
    loss_options.check(model, args.img_size, args)  # +
    optimizer = create_optimizer_v2(model, opt=args.opt, lr=args.lr, weight_decay=args.weight_decay, momentum=0.9)
    scaler = utils.NativeScaler(args.device.type) if args.amp == "float16" else None
    ema = utils.ModelEmaV3(model, decay=args.model_ema) if args.model_ema else None
    split = next((name for name in ("val", "validation", "test") if (args.data / name).is_dir()), "val")
    for name in ("train", split):  # timm would take all of DATA for it
        if not (args.data / name).is_dir():
            raise SystemExit(f"train_timm: expected {args.data / name}, with one folder of images per class.")
    sets = [create_dataset("", root=str(args.data), split=name) for name in ("train", split)]
    settings = {"input_size": (3, args.img_size, args.img_size), "batch_size": args.batch_size, "use_prefetcher": False}
    settings |= {"num_workers": args.workers, "distributed": args.distributed, "persistent_workers": False}
    train_loader = create_loader(sets[0], is_training=True, **settings)
    loader = create_loader(sets[1], is_training=False, **settings)
    scheduler, epochs = create_scheduler_v2(
        optimizer,
        sched=args.sched,
        num_epochs=args.epochs,
        warmup_epochs=args.warmup_epochs,
        step_on_epochs=False,
        updates_per_epoch=math.ceil(len(train_loader) / args.grad_accum_steps),
    )
    mixes = {"label_smoothing": args.smoothing, "num_classes": args.num_classes}
    mixup = Mixup(args.mixup, args.cutmix, **mixes) if args.mixup or args.cutmix else None
    if args.distributed:
        model = DistributedDataParallel(model, device_ids=[args.device] if args.device.type == "cuda" else None)
    loss_fn = nn.BCEWithLogitsLoss() if args.bce_loss else SoftTargetCrossEntropy()
    compared = {"criterion": loss_fn} if args.bce_loss else {}  # + whose gradients
    steps = args.epochs * len(train_loader)  # +
    reg = InterpretableGradientLoss.recipe(model, steps, **loss_options.settings(args) | compared)  # +

    first = 0
    if args.resume:
        whole = model.module if args.distributed else model
        first = resume_checkpoint(whole, args.resume, optimizer, scaler, log_info=utils.is_primary(args)) - 1
        if ema:
            load_checkpoint(ema.module, args.resume, use_ema=True)
        if scheduler:
            scheduler.step_update(first * math.ceil(len(train_loader) / args.grad_accum_steps))
        reg.set_extra_state(torch.tensor(first * len(train_loader)))  # + the count of steps
    args.output.mkdir(parents=True, exist_ok=True)
    saver = utils.CheckpointSaver(model, optimizer, model_ema=ema, amp_scaler=scaler, checkpoint_dir=str(args.output))
    if utils.is_primary(args):
        saver.save_checkpoint(first, 0.0)  # so that Ctrl-C leaves a checkpoint at any time
    try:
        for epoch in range(first, min(epochs, args.stop_after or epochs)):
            utils.random_seed(args.seed + epoch, args.rank)
            if args.distributed:
                train_loader.sampler.set_epoch(epoch)
            loss = train_epoch(epoch, model, train_loader, mixup, loss_fn, reg, optimizer, scheduler, scaler, ema, args)
            top1 = validate(ema.module if ema else model, loader, args)
            if utils.is_primary(args):
                print(f"epoch {epoch}: loss {loss:.4f}, accuracy {top1:.2f}%")
                saver.save_checkpoint(epoch + 1, top1)  # as many are finished
        if args.distributed:
            torch.distributed.barrier()  # torch 2.6 may wait for ever where a group ends right behind a reduction
    except KeyboardInterrupt:
        print(f"interrupted: continue with --resume {args.output / 'last.pth.tar'}")
        raise SystemExit(130) from None
    finally:
        if args.distributed:
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
