"""The loss at trainers' own hooks: the gradients of the loop that one would write by hand."""

import argparse
import copy
import csv
import re
from pathlib import Path

import lightning
import pytest
import timm.data
import timm.loss
import timm.task
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from lightning.pytorch.loggers import CSVLogger
from nets import data, small_net
from timm.utils import CheckpointSaver
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from interpgrad import InterpretableGradientLoss
from interpgrad.integrations import timm as timm_task
from interpgrad.integrations.lightning import LogLoss
from interpgrad.integrations.timm import RegularizedTask
from interpgrad.integrations.transformers import Regularized

pytestmark = pytest.mark.slow

LAM = 2.0  # so that a wrong weight is seen


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def by_hand(model, batches, loss_fn=F.cross_entropy, logits=lambda output: output, lam=LAM):
    """Gradients of a mean over accumulated batches, with the plain call."""
    reg = InterpretableGradientLoss(model, lam=lam)
    for x, y in batches:
        loss = loss_fn(logits(model(x)), y) + reg(x, y)
        (loss / len(batches)).backward()
    return gradients(model)


def assert_same_gradients(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


# timm


def batches(count=2):
    return [data(seed=seed) for seed in range(count)]


def test_a_task_of_timm_with_soft_targets_and_accumulation():
    model, mixup = small_net(), timm.data.Mixup(0.4, num_classes=4)
    reference = copy.deepcopy(model)
    mixed = [mixup(x[:2], y[:2]) for x, y in batches()]
    loss_fn = timm.loss.SoftTargetCrossEntropy()
    task = RegularizedTask({"lam": LAM}, model, loss_fn, verbose=False)
    for x, y in mixed:
        result = task(x, y)
        assert set(result) == {"loss", "output"}
        (result["loss"] / 2).backward()
    assert_same_gradients(gradients(model), by_hand(reference, mixed, loss_fn))
    assert len(list(task.get_clip_parameters())) == len(list(model.parameters()))


def test_the_two_lines_that_the_docstring_changes_in_timms_script():
    """The second takes the place of the first line of this call, which is the script's."""
    added, changed = re.findall(r"^ {4}(\S.*?)  +# ", timm_task.__doc__, re.MULTILINE)
    call = "task = ClassificationTask(\n  model=model,\n  criterion=loss_fn,\n  device=device,\n  verbose=False,\n)"
    assert call.startswith(timm_task.__doc__.partition("in place of: ")[2].splitlines()[0])
    names = {"model": small_net(), "loss_fn": nn.CrossEntropyLoss(), "device": torch.device("cpu")}
    names |= {"args": argparse.Namespace(epochs=2), "loader_train": range(10)}
    exec(f"{added}\n{call.replace('task = ClassificationTask(', changed)}", names)
    assert isinstance(names["task"], timm.task.ClassificationTask)
    assert names["task"].reg.lam == 0.3
    assert names["task"].reg.start == 10
    names["task"](*data())["loss"].backward()


def test_checkpoints_of_a_task_hold_the_count_of_steps(tmp_path):
    def new(settings):
        task = RegularizedTask(settings, small_net(), nn.CrossEntropyLoss(), verbose=False)
        task.setup_ema(decay=0.9)
        optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), 0.1)
        return task, CheckpointSaver(
            task.get_trainable_module(), optimizer, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path), task=task
        )

    task, saver = new({"every": 2})
    for x, y in batches(3):
        task(x, y)
    saver.save_checkpoint(0, 0.0)
    resumed, _ = new({"every": 2})
    assert timm.task.resume_task_checkpoint(resumed, str(tmp_path / "last.pth.tar")) == 1
    timm.task.load_task_ema_checkpoint(resumed, str(tmp_path / "last.pth.tar"))
    assert resumed.reg.state_dict() == {"_extra_state": torch.tensor(3)}
    resumed.load_task_state(None)  # as of a checkpoint without the loss
    assert resumed.reg.state_dict() == {"_extra_state": torch.tensor(3)}


def test_a_compiled_task():
    model, (x, y) = small_net(), data()
    expected = by_hand(copy.deepcopy(model), [(x, y)])
    task = RegularizedTask({"lam": LAM}, model, nn.CrossEntropyLoss(), verbose=False)
    task.compile(backend="aot_eager")
    task(x, y)["loss"].backward()
    assert_same_gradients(gradients(model), expected)


def test_a_distributed_task():
    model, (x, y) = small_net(), data()
    expected = by_hand(copy.deepcopy(model), [(x, y)])
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        task = RegularizedTask({"lam": LAM}, model, nn.CrossEntropyLoss(), verbose=False).prepare_distributed()
        assert isinstance(task.get_trainable_module(), nn.parallel.DistributedDataParallel)
        task(x, y)["loss"].backward()
    finally:
        dist.destroy_process_group()
    assert_same_gradients(gradients(model), expected)


# Hugging Face


class Images(torch.utils.data.Dataset):
    def __init__(self, size):
        x, self.y = data(size, 16)
        self.x = x.float()

    def __len__(self):
        return len(self.y)

    def __getitem__(self, index):
        return {"pixel_values": self.x[index], "labels": self.y[index]}


def hugging_face_model(name):
    """Both accept num_items_in_batch; the loss of the second does not use it."""
    torch.manual_seed(0)
    if name == "vit":
        width = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        config = transformers.ViTConfig(**width, image_size=16, patch_size=4, num_labels=4, hidden_dropout_prob=0.0)
        return transformers.ViTForImageClassification(config)
    width = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1]}
    return transformers.ResNetForImageClassification(
        transformers.ResNetConfig(**width, layer_type="basic", num_labels=4)
    )


class RegularizedTrainer(Regularized, transformers.Trainer):
    """In the order of the images; keeps the gradients of the last update."""

    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)


class EarlierTrainer(RegularizedTrainer):
    """As earlier releases decide whether to divide."""

    loss_is_scaled_for_ga = None


class Gradients(transformers.TrainerCallback):
    def on_pre_optimizer_step(self, *_, model, **__):
        self.found = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


def train(model, images, tmp_path, reg, trainer=RegularizedTrainer, resume=None, **settings):
    """One epoch in batches of 4, unless said otherwise."""
    settings = {"num_train_epochs": 1, "max_grad_norm": 0, "logging_steps": 1, "save_strategy": "no"} | settings
    functions = {"compute_loss_func": settings.pop("compute_loss_func", None), "eval_dataset": images}
    arguments = transformers.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=4, use_cpu=True, report_to=[], disable_tqdm=True, **settings
    )
    kept = Gradients()
    run = trainer(model, arguments, train_dataset=images, reg=reg, callbacks=[kept], **functions)
    run.train(resume_from_checkpoint=resume)
    return run, kept.found


class OwnLoss:
    """Of the outputs, as Trainer takes one."""

    def __call__(self, outputs, labels, num_items_in_batch=None):
        assert num_items_in_batch is None
        return F.cross_entropy(outputs.logits, labels)


DIVIDES = pytest.mark.skipif(
    not hasattr(transformers.Trainer, "loss_is_scaled_for_ga"), reason="an error in earlier releases, tested below"
)
ACCUMULATED = {
    "own loss": (RegularizedTrainer, {"compute_loss_func": OwnLoss()}),
    "plain": (RegularizedTrainer, {}),
    "label smoothing": (RegularizedTrainer, {"label_smoothing_factor": 0.2}),
    "earlier release": (EarlierTrainer, {}),
}


@pytest.mark.cpu("the Trainer of these tests moves all to the CPU")
@pytest.mark.parametrize("kind", [*list(ACCUMULATED)[1:], pytest.param("own loss", marks=DIVIDES)])
@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_accumulation_in_the_trainer(name, kind, tmp_path):
    """The naive sum would weigh the term as many times as batches are accumulated."""
    model, images = hugging_face_model(name), Images(12)
    reference = copy.deepcopy(model).train()
    reg = InterpretableGradientLoss(model, lam=LAM)
    trainer, own = ACCUMULATED[kind]
    _, found = train(model, images, tmp_path, reg, trainer, gradient_accumulation_steps=3, **own)

    def loss_fn(logits, y):
        return F.cross_entropy(logits, y, label_smoothing=own.get("label_smoothing_factor", 0.0))

    groups = list(zip(images.x.split(4), images.y.split(4), strict=True))
    expected = by_hand(reference, groups, loss_fn, lambda output: output.logits)
    assert_same_gradients(found, {each: gradient for each, gradient in expected.items() if gradient is not None})


def test_a_compiled_model_in_the_trainer(tmp_path):
    found = []
    for settings in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        model = hugging_face_model("vit")
        found.append(train(model, Images(4), tmp_path, InterpretableGradientLoss(model, lam=LAM), **settings)[1])
    compiled = {name.removeprefix("_orig_mod."): gradient for name, gradient in found[1].items()}
    assert_same_gradients(compiled, found[0])


def test_the_naive_sum_in_the_trainer_is_another(tmp_path):
    """What the mixin is for: should Trainer divide by itself one day, this fails."""

    class Naive(EarlierTrainer):
        def __init__(self, *arguments, **named):
            super().__init__(*arguments, **named)
            self.model_accepts_loss_kwargs = True

    found = []
    for trainer in (RegularizedTrainer, Naive):
        model = hugging_face_model("vit")
        reg = InterpretableGradientLoss(model, lam=LAM)
        found.append(train(model, Images(12), tmp_path, reg, trainer, gradient_accumulation_steps=3)[1])
    name = "classifier.weight"
    torch.testing.assert_close(found[1][name], 3 * found[0][name])


@pytest.mark.cpu("the Trainer of these tests moves all to the CPU")
def test_what_the_trainer_logs_and_evaluates(tmp_path):
    model, images = hugging_face_model("vit"), Images(8)
    reg = InterpretableGradientLoss(model, lam=LAM)
    run, _ = train(model, images, tmp_path, reg, eval_strategy="epoch")
    logs = [entry for entry in run.state.log_history if "loss" in entry]
    assert len(logs) == 2
    assert logs[-1].items() >= reg.logs().items()
    assert logs[-1]["term"] > 0
    (evaluated,) = [entry for entry in run.state.log_history if "eval_loss" in entry]
    assert "term" not in evaluated
    with torch.no_grad():
        plain = F.cross_entropy(model.eval()(images.x).logits, images.y)
    assert evaluated["eval_loss"] == pytest.approx(plain.item(), rel=1e-4), "evaluation is without the loss"


def test_a_resumed_run_of_the_trainer_counts_on(tmp_path):
    def settings(epochs):
        return {"num_train_epochs": epochs, "gradient_accumulation_steps": 2, "save_strategy": "epoch"}

    model, images = hugging_face_model("vit"), Images(16)
    train(model, images, tmp_path, InterpretableGradientLoss(model), **settings(1))
    reg = InterpretableGradientLoss(model)
    train(model, images, tmp_path, reg, resume=str(tmp_path / "checkpoint-2"), **settings(2))
    assert reg.state_dict() == {"_extra_state": torch.tensor(8)}


def test_a_trainer_that_would_not_divide(tmp_path):
    class Earlier:
        """A Trainer without loss_is_scaled_for_ga."""

        def __init__(self, **_):
            pass

    class RegularizedEarlier(Regularized, Earlier):
        pass

    reg = InterpretableGradientLoss(small_net())
    RegularizedEarlier(reg=reg)
    with pytest.raises(ValueError, match=r"expected a Trainer that divides .* earlier release: `pip install"):
        RegularizedEarlier(reg=reg, compute_loss_func=OwnLoss())


# Lightning


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = small_net().float()
        self.reg = InterpretableGradientLoss(self.model, lam=LAM)

    def training_step(self, batch, _):
        x, y = batch
        with self.reg.shared_forward():
            logits = self.model(x)
        return F.cross_entropy(logits, y) + self.reg(x, y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("every", "logged"), [(1, 4), (2, 2), (0, 0)])
def test_the_callback_of_lightning_logs(every, logged, tmp_path, monkeypatch):
    x, y = data(8)
    module, logger, asked = Classifier(), CSVLogger(tmp_path), []
    logs = module.reg.logs
    monkeypatch.setattr(module.reg, "logs", lambda: asked.append(1) or logs())
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=logger,
        log_every_n_steps=every,
        callbacks=[LogLoss(prog_bar=True)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(TensorDataset(x.float(), y), 2))
    file = Path(logger.log_dir) / "metrics.csv"
    entries = list(csv.DictReader(file.open())) if file.exists() else []
    assert len(entries) == logged
    assert len(asked) == logged, "reading the numbers waits for a GPU"
    if logged:
        assert {key: float(entries[-1][f"reg/{key}"]) for key in module.reg.logs()} == pytest.approx(module.reg.logs())
        assert trainer.progress_bar_metrics["reg/term"] > 0
