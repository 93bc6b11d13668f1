"""A Lightning module with the interpretable gradient loss: what it adds is marked with # +.

    python examples/train_lightning.py DATA --model resnet18
    python examples/train_lightning.py DATA --model resnet50 --devices 8 --strategy ddp --precision bf16-mixed

DATA holds train/ and val/ (or test/), one folder of images per class.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import lightning
import loss_options  # +
import photo_folders
import torch
import torch.nn.functional as F
import torchvision
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor

from interpgrad import InterpretableGradientLoss  # +


class Classifier(lightning.LightningModule):
    """Cross-entropy plus the loss, in automatic optimization."""

    def __init__(self, model: str, classes: int, lr: float, steps: int, loss: dict[str, Any]) -> None:
        super().__init__()
        self.save_hyperparameters(ignore="loss")
        self.lr = lr
        self.model = torchvision.models.get_model(model, weights=None, num_classes=classes)
        self.reg = InterpretableGradientLoss.recipe(self.model, steps, **loss)  # +

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        x, y = batch
        with self.reg.shared_forward():  # +
            logits = self.model(x)
        loss = F.cross_entropy(logits, y) + self.reg(x, y)  # + self.reg(x, y)
        self.log("loss", loss, prog_bar=True)
        self.log_dict(self.reg.logs(), prog_bar=True)  # +
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        x, y = batch
        self.log("accuracy", (self(x).argmax(1) == y).float().mean(), prog_bar=True, sync_dist=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["random_state"] = torch.get_rng_state()  # so that a resumed run draws what it would have drawn

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        torch.set_rng_state(checkpoint["random_state"])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.model.parameters(), self.lr, momentum=0.9, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    photo_folders.add_arguments(parser)
    parser.add_argument("--devices", default="auto")
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--strategy", default="auto", help="for instance ddp")
    parser.add_argument("--precision", default="32-true", help="for instance bf16-mixed, 16-mixed")
    parser.add_argument("--resume", help="a checkpoint, for instance OUTPUT/last.ckpt")
    loss_options.add_arguments(parser)  # +
    return parser.parse_args()


class SaveOnException(Callback):
    """Save the middle of an epoch. Lightning's OnExceptionCheckpoint would make every later run resume unasked."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_exception(self, trainer: Any, *_: Any) -> None:
        trainer.save_checkpoint(self.path)


class StopAfter(Callback):
    """Leave the rest of the planned epochs to a resumed run."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: Any, _: Any) -> None:
        trainer.should_stop = trainer.current_epoch + 1 >= self.epochs


def main() -> None:
    args = arguments()
    lightning.seed_everything(args.seed, verbose=False)
    train, test = photo_folders.loaders(args.data, args.size, args.batch_size, args.workers)
    trainer = lightning.Trainer(
        max_epochs=args.epochs,
        devices=args.devices if not args.devices.isdecimal() else int(args.devices),
        accelerator=args.accelerator,
        strategy=args.strategy,
        precision=args.precision,
        default_root_dir=args.output,
        num_sanity_val_steps=0,
        callbacks=[
            ModelCheckpoint(args.output, save_last=True),
            SaveOnException(args.output / "interrupted.ckpt"),
            *([StopAfter(args.stop_after)] if args.stop_after else []),
        ],
    )
    steps = args.epochs * math.ceil(len(train) / trainer.world_size)
    model = Classifier(args.model, len(train.dataset.classes), args.lr, steps, loss_options.settings(args))
    loss_options.check(model.model, args.size, args)  # +
    trainer.fit(model, train, test, ckpt_path=args.resume)


if __name__ == "__main__":
    main()
