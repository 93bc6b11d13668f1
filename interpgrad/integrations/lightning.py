"""A callback for Lightning that logs the loss. Callbacks cannot change a loss: adding it is up to the module::

self.reg = InterpretableGradientLoss(self.model, lam=0.3)     # in __init__

with self.reg.shared_forward():                               # in training_step
    logits = self.model(x)
loss = F.cross_entropy(logits, y) + self.reg(x, y)

trainer = lightning.Trainer(callbacks=[LogLoss()])
"""

from __future__ import annotations

from typing import Any

try:
    from lightning.pytorch import Callback, LightningModule
except ImportError as reason:
    raise ImportError(
        "expected lightning, whose callback this is, to be installed: pip install lightning. (The package "
        "pytorch_lightning has classes of its own.)"
    ) from reason

from interpgrad.loss import InterpretableGradientLoss


class LogLoss(Callback):
    """Logs `reg.logs()` of every interpretable gradient loss in the module, as "reg/penalty" and so on.

    At the steps at which Lightning logs, `log_every_n_steps`: reading the numbers waits for a GPU.

    Args:
        prog_bar: whether the progress bar shows them too.
    """

    def __init__(self, prog_bar: bool = False) -> None:
        self.prog_bar = prog_bar

    def on_train_batch_end(self, trainer: Any, pl_module: LightningModule, *_: Any) -> None:
        """Log."""
        if not trainer.log_every_n_steps or trainer.global_step % trainer.log_every_n_steps:
            return
        for name, module in pl_module.named_modules():
            if isinstance(module, InterpretableGradientLoss):
                logs = {f"{name}/{key}": value for key, value in module.logs().items()}
                pl_module.log_dict(logs, prog_bar=self.prog_bar)
