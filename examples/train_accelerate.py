"""A Hugging Face Accelerate loop with the interpretable gradient loss: what it adds is marked with # +.

    python examples/train_accelerate.py DATA --model resnet18
    accelerate launch --multi-gpu examples/train_accelerate.py DATA --model resnet50 --mixed-precision bf16

DATA holds train/ and val/ (or test/), one folder of images per class. Every epoch seeds its random numbers anew, and
checkpoints are those of finished epochs, so a run that is resumed does what it would have done.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import loss_options  # +
import photo_folders
import torch
import torch.nn.functional as F
import torchvision
from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm import tqdm

from interpgrad import InterpretableGradientLoss  # +


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    photo_folders.add_arguments(parser)
    parser.add_argument("--mixed-precision", choices=["no", "bf16", "fp16"], default="no")
    parser.add_argument("--grad-accum-steps", type=int, default=1)
    parser.add_argument("--cpu", action="store_true", help="even where there is a GPU")
    parser.add_argument("--resume", type=Path, help="a checkpoint, for instance OUTPUT/last")
    loss_options.add_arguments(parser)  # +
    return parser.parse_args()


class Epochs:
    """How many are finished: stored with the checkpoint."""

    finished = 0

    def state_dict(self) -> dict[str, int]:
        return {"finished": self.finished}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.finished = state["finished"]


def save(accelerator: Accelerator, output: Path) -> None:
    """Replace the last checkpoint by a new one once that is written."""
    accelerator.save_state(str(output / "part"))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if (output / "last").exists():
            (output / "last").rename(output / "old")
        (output / "part").rename(output / "last")
        shutil.rmtree(output / "old", ignore_errors=True)
    accelerator.wait_for_everyone()


def main() -> None:
    args = arguments()
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision, gradient_accumulation_steps=args.grad_accum_steps, cpu=args.cpu
    )
    set_seed(args.seed)
    train, test = photo_folders.loaders(args.data, args.size, args.batch_size, args.workers)
    model = torchvision.models.get_model(args.model, weights=None, num_classes=len(train.dataset.classes))
    loss_options.check(model, args.size, args)  # +
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=1e-4)
    model, optimizer, train, test = accelerator.prepare(model, optimizer, train, test)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer.optimizer, args.lr, args.epochs * len(train))
    reg = InterpretableGradientLoss.recipe(model, args.epochs * len(train), **loss_options.settings(args))  # +
    epochs = Epochs()
    accelerator.register_for_checkpointing(schedule, reg, epochs)  # + reg: the count of steps
    if args.resume:
        accelerator.load_state(str(args.resume))
    save(accelerator, args.output)  # so that Ctrl-C leaves a checkpoint at any time
    try:
        for epoch in range(epochs.finished, min(args.epochs, args.stop_after or args.epochs)):
            set_seed(args.seed + epoch)
            model.train()
            with tqdm(train, desc=f"epoch {epoch}", disable=not accelerator.is_local_main_process) as progress:
                for x, y in progress:
                    with accelerator.accumulate(model):
                        with accelerator.autocast():
                            with reg.shared_forward():  # +
                                logits = model(x)
                            loss = F.cross_entropy(logits, y) + reg(x, y)  # + reg(x, y)
                        accelerator.backward(loss)
                        optimizer.step()
                        optimizer.zero_grad()
                    schedule.step()
                    shown = {"loss": f"{loss.item():.3f}"}
                    shown |= {name: f"{value:.3g}" for name, value in reg.logs().items()}  # +
                    progress.set_postfix(shown)
            model.eval()
            with torch.no_grad():
                hits = [accelerator.gather_for_metrics((model(x).argmax(1) == y).float()) for x, y in test]
            accelerator.print(f"epoch {epoch}: accuracy {100 * torch.cat(hits).mean():.2f}%")
            epochs.finished = epoch + 1
            save(accelerator, args.output)
    except KeyboardInterrupt:
        accelerator.print(f"interrupted: continue with --resume {args.output / 'last'}")
        raise SystemExit(130) from None
    finally:
        accelerator.end_training()


if __name__ == "__main__":
    main()
