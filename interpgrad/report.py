"""What the loss meets in a model, told before a training begins."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from interpgrad import frozen, graph
from interpgrad.criteria import IGNORED, Criterion, CriterionName, refuse_out_of_range
from interpgrad.double_backward import attention
from interpgrad.forward import Forward, check_batch, forward_without_trace, is_compiled
from interpgrad.gradients import Passes, backward_passes
from interpgrad.guided import guided_nodes, unguided
from interpgrad.model import class_logits, exclusive_use, unwrap
from interpgrad.settings import Activations, Settings, Statistics
from interpgrad.targets import GIVEN, Target, TargetName, check_target, make_target

_KNOWN = ("interpgrad", "torch")  # whose autograd Functions are no finding


@dataclass(frozen=True)
class Finding:
    """One thing met in a model.

    Attributes:
        severity: "error", the loss cannot be used on the model as it is, or "note".
        subject: what it is about, for instance "activations".
        message: what was met, and what to do about it.
    """

    severity: str
    subject: str
    message: str

    def __str__(self) -> str:
        return f"{self.severity:5}  {self.subject}: {self.message}"


@dataclass(frozen=True)
class Report:
    """What `interpgrad.check` found in a model. `print(report)` has a line for each finding."""

    model: str
    findings: Sequence[Finding]

    @property
    def ok(self) -> bool:
        """Whether the loss can be used on it."""
        return all(finding.severity != "error" for finding in self.findings)

    def __str__(self) -> str:
        verdict = "can be used" if self.ok else "cannot be used as it is"
        return "\n".join([f"{self.model} {verdict} with the interpretable gradient loss:", *map(str, self.findings)])


def check(
    model: nn.Module,
    x: Tensor,
    y: Any = None,
    *,
    target: TargetName | Target = "guided",
    criterion: CriterionName | Criterion = "log_prob",
    batch_norm: Statistics = "frozen",
    activations: Activations = "all",
    ignore_index: int = IGNORED,
    model_kwargs: Mapping[str, Any] | None = None,
) -> Report:
    """What the loss meets in a model: whether it can be used, what is guided and what is not, what a step costs.

    The loss is tried: one forward pass as it makes it, both gradients, and the derivative of the first in the
    parameters. So the report says of this model, in this mode and precision, what a training would meet. Nothing is
    left behind, as by `interpgrad.input_gradients`. An error ends the check: once it is mended, another may come.

    Args:
        model: any module taking `x` first, in the mode it is trained in.
        x: images of the kind it is trained on, (N, C, H, W); a few are enough.
        y: their targets; None means the predicted classes.
        target: as of the loss; only of "guided" it is said what is guided. So are
        criterion: and
        batch_norm: and
        activations: and
        ignore_index: which decide what is met.
        model_kwargs: further arguments of the model, as of `interpgrad.input_gradients`.

    Returns:
        A report: `.ok`, `.findings`, and a text of one line for each. What the loss would raise is a finding.

    Raises:
        TypeError, ValueError: x is no floating point tensor, is empty, or does not match y in size; an unknown name.
        RuntimeError: under `torch.inference_mode()`.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> report = check(model, torch.randn(2, 3, 2, 2))
    >>> report.ok
    True
    >>> print(report.findings[-1].subject)
    cost
    """
    check_batch(x, y)
    settings = Settings(criterion, batch_norm, activations, ignore_index)
    check_target(target, None)
    findings = []
    try:
        with exclusive_use(model), torch.enable_grad():
            for finding in _findings(model, x, y, target, settings, model_kwargs):
                findings.append(finding)
    except (TypeError, ValueError, RuntimeError) as error:
        findings.append(Finding("error", "the loss", str(error)))
    return Report(type(unwrap(model)).__name__, tuple(findings))


def _findings(
    model: nn.Module,
    x: Tensor,
    y: Any,
    target: TargetName | Target,
    settings: Settings,
    model_kwargs: Mapping[str, Any] | None,
) -> Iterator[Finding]:
    """One after the other, on the way that the loss goes."""
    if is_compiled(model):
        yield _note(
            "torch.compile",
            "compiled graphs have no double backward. Call the loss without shared_forward(): it makes a forward pass "
            "of its own on the original module.",
        )
    if not any(parameter.requires_grad for parameter in unwrap(model).parameters()):
        yield Finding(
            "error", "parameters", "none requires a gradient, so that there is nothing to train: use requires_grad_()."
        )
    run = functools.partial(forward_without_trace, model, x, (), model_kwargs, batch_norm=settings.batch_norm)
    try:
        run()  # TorchScript makes one node of a function in the second pass
    except Exception as error:
        if str(error).startswith("expected"):  # as all that this package raises
            raise
        yield Finding("error", "the model", f"{type(error).__name__}: {error}")
        return
    with _AttentionCalls() as attends:
        forward = run()
    operations = graph.operations(forward.logits, until=forward.image)
    if target == "guided":
        yield from _about_activations(operations, settings.activations)
    yield from _about_functions(operations)
    yield from _about_statistics(operations, settings.batch_norm)
    if written := len(operations.get(attention.Weights.operation, ())):
        yield _note(
            "attention",
            f"scaled_dot_product_attention x{written} written out, since fused kernels have no double backward: the "
            "same values, and memory for the attention weights. Where that is short, use smaller batches or images.",
        )
    if attends.calls:
        yield _note(
            "attention on the math kernel",
            f"{_list(attends.calls)}, slow in half precision: use F.scaled_dot_product_attention without enable_gqa.",
        )
    if forward.recomputes:
        yield _note(
            "checkpointing",
            "checkpointed layers run again in every backward pass, three times instead of once. Checkpoint no more "
            "than the memory asks for.",
        )
    delta, coupled = _twice_differentiated(forward, y, target, settings)
    if coupled:
        yield _note(
            "coupled images",
            "an image's gradient depends on the others in the batch, which inference does not see: by statistics "
            "written by hand, or attention across images. Only those of torch's batch norms are constants: use these.",
        )
    yield _about_cost(delta, forward.image, guided=target == "guided")


def _about_activations(operations: graph.Operations, activations: str) -> Iterator[Finding]:
    guided = {name: len(nodes) for name, nodes in guided_nodes(operations, activations).items()}
    if guided:
        cleaner = " With SiLU instead of ReLU seeds agreed more on their gradients, at no price: see the documentation."
        yield _note(
            "activations", f"guided at {_list(guided)}. Nothing to do.{cleaner if guided.keys() == {'Relu'} else ''}"
        )
    left = unguided(operations, activations)
    if left:
        yield _note(
            "activations left alone",
            f"{_list(left)}, not guided: gates, and what squashes. Replace those that are the network's activations.",
        )


def _about_functions(operations: graph.Operations) -> Iterator[Finding]:
    """The user's own autograd Functions: activations inside are seen by nobody."""
    classes: list[Any] = [getattr(node, "_forward_cls", None) for nodes in operations.values() for node in nodes]
    own = Counter(each.__name__ for each in classes if each and each.__module__.split(".")[0] not in _KNOWN)
    if own:
        yield _note(
            "autograd Functions",
            f"{_list(own)}. Their backward must be differentiable, and an activation inside is not guided: write it in "
            "operations of torch if there is one.",
        )


def _about_statistics(operations: graph.Operations, batch_norm: str) -> Iterator[Finding]:
    batch, running, sample = (len(nodes) for nodes in frozen.statistics(operations))
    if batch:
        held = "constants" if batch_norm == "frozen" else "functions of the batch, which inference does not see"
        remedy = "Nothing to do" if batch_norm == "frozen" else 'Prefer batch_norm="frozen"'
        yield _note("batch statistics", f"{batch} layers, {held} in both gradients. {remedy}.")
    if running:
        yield _note(
            "running statistics",
            f"{running} layers, in evaluation mode. Call model.train() first, if that is how they are trained.",
        )
    if sample:
        what = f"{sample} layers of instance norm or standardized weights, differentiated. Nothing to do."
        yield _note("statistics of each sample", what)


def _about_cost(delta: Tensor, image: Tensor, *, guided: bool) -> Finding:
    separate = frozen.is_separate(delta, image)
    passes = (9 if separate else 7) - (not guided)
    why = " (batch norm meets smooth activations or gates)" if separate else ""
    return _note(
        "cost",
        f"a step with shared_forward() is about {passes} forward passes' worth of operations, one without the loss 3: "
        f"{passes / 3:.2f} times as much{why}. every=4 asks for it at one of four steps.",
    )


def _twice_differentiated(
    forward: Forward, y: Any, target: TargetName | Target, settings: Settings
) -> tuple[Tensor, bool]:
    """Delta, whose derivative in the parameters has been taken, as backpropagation of the loss takes it.

    And whether that of one image's logits reaches other images, where it should not.
    """
    y = class_logits(forward.logits.detach()).argmax(1) if y is None else y
    if isinstance(settings.criterion, str):  # on a GPU as well, where training does not look
        refuse_out_of_range(forward.logits, y, settings.ignore_index)
    with backward_passes(forward, y, settings, create_graph=True) as passes:
        t = passes.gradient() if target == GIVEN else make_target(target, None, passes, None, first=True)
        delta = passes.attached_delta
        coupled = settings.batch_norm == "frozen" and any(_reaches_others(passes, image) for image in (0, -1))
    parameters = [leaf for leaf in graph.leaves(delta, until=forward.image) if leaf is not forward.image]
    if parameters:
        torch.autograd.grad(delta, parameters, t.to(delta.dtype), retain_graph=True, allow_unused=True)
    return delta, coupled


def _reaches_others(passes: Passes, image: int) -> bool:
    """Whether the gradient of any function of this image's logits is not zero at other images."""
    v = torch.zeros_like(passes.v)
    v[image] = torch.randn(v[image].shape, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    reached = passes.gradient(v)
    reached[image] = 0
    return bool(reached.any())


class _AttentionCalls(TorchFunctionMode):
    """Counts calls of those functions below which the kernel is selected, but for what is written out."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in attention.FUNCTIONS:
            self.calls[func.__name__] += 1
        return func(*args, **(kwargs or {}))


def _note(subject: str, message: str) -> Finding:
    return Finding("note", subject, message)


def _list(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} x{count}" for name, count in counts.items())
