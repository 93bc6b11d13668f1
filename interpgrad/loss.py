"""The interpretable gradient loss, as a term to add to a training loop."""

from __future__ import annotations

import math
import operator
import warnings
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from interpgrad import private
from interpgrad.autocast import at_least_single, without_autocast
from interpgrad.criteria import IGNORED, Criterion, CriterionName, kept_images
from interpgrad.errors import ERRORS, NAMED, Error, ErrorName, cos
from interpgrad.forward import Forward, Recorder, check_batch, forward_without_trace, random_state_restored
from interpgrad.gradients import backward_passes
from interpgrad.graph import NoPathError
from interpgrad.model import exclusive_use
from interpgrad.settings import Activations, Reduction, Settings, Statistics
from interpgrad.targets import Target, TargetName, check_given, check_target, make_target
from interpgrad.transforms import Transform, TransformName, low_pass, transform_of


class InterpretableGradientLoss(nn.Module):
    """lam * R, where R is the mean of E(delta, t) over the batch: delta is the input gradient, t its target.

    The defaults are the paper's, and change next to nothing. Begin with the recipe::

        reg = InterpretableGradientLoss.recipe(model, steps=epochs * len(loader))
        loss = F.cross_entropy(model(x), y) + reg(x, y)

    That call has a forward pass of its own that leaves no trace.

    Two lines more, one forward pass less::

        with reg.shared_forward():
            logits = model(x)
        loss = F.cross_entropy(logits, y) + reg(x, y)

    The input gradient is differentiated, the target is a constant. By default that is the guided gradient, after Torres
    et al., "A Learning Paradigm for Interpretable Gradients", arXiv 2404.15024. Two defaults are not the paper's, whose
    reading is `criterion="cross_entropy", batch_norm="coupled"`. With a mask as the target the loss says where the
    evidence lies, after Ross et al., "Right for the Right Reasons", arXiv 1703.03717.

    Args:
        model: any module taking images first. It is held, not registered: `reg.parameters()` does not include its own.
        error: "cos", "mae", "mse", "hi", "outside", which takes a mask (see `interpgrad.errors`), or a callable
            `(delta, target) -> (N,)`, to be minimized.
        lam: weight of the term; may be changed between steps. At 0 the value is still computed (for the
            log, in `penalty`) but contributes nothing, bit for bit.
        target: what the input gradient delta is compared with: "guided"; "low_pass", delta's own 3x3 mean; "zero", of
            which `error="mse"` makes the classical gradient penalty; "given", a tensor of each call,
            `reg(x, y, target=t)`; or a callable `(passes) -> tensor` (see `interpgrad.targets`). A module among the
            settings is registered.
        criterion: the function of the logits whose gradient is taken: "log_prob", the log-probability of
            the target; "logit", its logit, what saliency methods explain; "cross_entropy", the loss; or a callable
            `(logits, y) -> 0-dim tensor`, summed over the batch. Of the first two, how sure the network is
            is a constant of the penalty (see `interpgrad.criteria`).
        batch_norm: "frozen": in all gradients, and in what the penalty is differentiated with, the
            statistics of the batch are constants, as inference holds them. "coupled": functions of the batch, as
            plain autograd has them in training mode; the gradients are then not those that
            inference sees. The same in evaluation mode.
        every: lazy regularization: computed at the first of every `every` calls and multiplied by `every`,
            zero and free at the others. Pass `step` where one step of the optimizer makes several calls.
        start: the number of calls before it, which are zero and free. A network that has learned something gains more,
            at a smaller price.
        warmup: the number of calls after `start` over which the weight grows linearly from 0 to lam.
        activations: "all", every rectifier, or "relu", the piecewise-linear family alone.
        ignore_index: the class index of images, or pixels, that a criterion by name leaves out. An image of no others
            has the value 0 and no gradient, and counts in no mean.
        transform: "low_pass", or a differentiable callable, applied to delta and its target before the error. A mask
            is left as it is.
        reduction: "mean", or "none": lam * E of each image, (N,). `penalty` and `logs()` stay means.

    Attributes:
        penalty: R of the last computed call: detached, not multiplied by lam; None before the first.
        cosine: mean cosine of delta and its target in that call, before `transform`, whatever the error; likewise
            detached. None for `target="zero"` and `error="outside"`.

    The first training call evaluates the loss even where `start` or `every` skip it, and throws the result away: what
    is wrong with the model or the settings is named before the first epoch, and memory that is short is short at once.
    The result leaves no trace.

    The extra forward pass of a plain call gives back buffers, modes and random states. Buffers that it made stay, such
    as a table for the size of the images. It cannot take back what a model or its hooks write elsewhere: lists,
    counters, attributes. With `shared_forward()` there is no extra pass. Hooks of modules run in inner passes, too.
    Threads that use one model here wait for each other. The model's own forward pass must not run on another meanwhile.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> reg = InterpretableGradientLoss(model, error="cos", lam=7.5e-3)
    >>> x, y = torch.randn(2, 3, 2, 2), torch.tensor([0, 2])
    >>> loss = nn.functional.cross_entropy(model(x), y) + reg(x, y)
    >>> loss.backward()
    >>> sorted(reg.logs())
    ['cosine', 'penalty', 'term']
    """

    def __init__(
        self,
        model: nn.Module,
        error: ErrorName | Error = "cos",
        lam: float = 7.5e-3,
        *,
        target: TargetName | Target = "guided",
        criterion: CriterionName | Criterion = "log_prob",
        batch_norm: Statistics = "frozen",
        every: int = 1,
        start: int = 0,
        warmup: int = 0,
        activations: Activations = "all",
        ignore_index: int = IGNORED,
        transform: TransformName | Transform | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"expected model to be an nn.Module, got {type(model).__name__}: pass the module itself.")
        if not callable(error) and not (isinstance(error, str) and error in NAMED):
            raise ValueError(
                f"expected error to be one of {', '.join(map(repr, ERRORS))} or a callable (delta, target) -> (N,), or "
                f"'outside', for a mask, got {error!r}."
            )
        if not _is_weight(lam):
            raise ValueError(f"expected lam to be a finite number of at least 0, got {lam!r}.")
        if not _is_count(every, 1):
            raise ValueError(f"expected every to be an integer of at least 1, got {every!r}.")
        for name, calls in (("start", start), ("warmup", warmup)):
            if not _is_count(calls, 0):
                raise ValueError(f"expected {name} to be a number of calls, an integer of at least 0, got {calls!r}.")
        if reduction not in ("mean", "none"):
            raise ValueError(f'expected reduction="mean" or reduction="none", got {reduction!r}.')
        named: Any = next((name for name, known in NAMED.items() if known is error), error)
        check_target(target, named)
        Settings(criterion, batch_norm, activations, ignore_index)
        self.model = model
        self.error = named
        self.lam = lam
        self.target = target
        self.criterion = criterion
        self.batch_norm = batch_norm
        self.every = every
        self.start = start
        self.warmup = warmup
        self.activations = activations
        self.ignore_index = ignore_index
        self.transform = transform_of(transform)
        self.reduction = reduction
        self.penalty: Tensor | None = None
        self.cosine: Tensor | None = None
        self._step = 0
        self._term: Tensor | None = None
        self._tried = False  # whether it has been evaluated in training
        self._recorder: Recorder | None = None
        self._computed: tuple[weakref.ref[Tensor], int] | None = None  # the images of the last computed call
        self._verified: set[frozenset[str]] = set()
        self.register_load_state_dict_pre_hook(_keep_what_no_checkpoint_has)  # type: ignore[no-untyped-call]

    @classmethod
    def recipe(cls, model: nn.Module, steps: int, **overrides: Any) -> InterpretableGradientLoss:
        """The loss as the README advises it, for a training of so many steps.

        That is `lam=0.3, every=4, start=steps // 2, warmup=steps // 4, transform=low_pass`. `overrides` are arguments
        of the class, in the place of these or beside them.

        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> InterpretableGradientLoss.recipe(model, steps=1000, lam=0.1).start
        500
        """
        if not _is_count(steps, 1):
            raise ValueError(
                f"expected steps to be the number of training steps, an integer of at least 1, got {steps!r}: "
                "pass epochs * len(loader)."
            )
        advised = dict[str, Any](lam=0.3, every=4, start=steps // 2, warmup=steps // 4, transform=low_pass)
        return cls(model, **advised | overrides)

    @private.untraced
    def forward(
        self,
        x: Tensor,
        y: Any,
        *model_args: Any,
        target: Tensor | None = None,
        step: int | None = None,
        **model_kwargs: Any,
    ) -> Tensor:
        """The term lam * R for images x (N, C, H, W) and targets y, a 0-dim tensor, or (N,) with `reduction="none"`.

        `target` is for a loss with `target="given"`: a tensor on the device of x, floating point or bool, of its shape
        or one that broadcasts to it; for `error="outside"` a mask as `interpgrad.errors.outside` takes it. `step` is
        the number of the optimizer's step, where that calls more than once (SAM, LBFGS): `every`, `start` and `warmup`
        then count steps. Further arguments go to the model; the images are the first that these do not name.

        After `shared_forward()`, x must be the tensor that was passed to the model there, and its forward pass is used.
        Under `torch.no_grad()` the value is computed at every call and detached.

        Raises: as `interpgrad.input_gradients`. TypeError or ValueError for a target that is missing, not asked for, or
        wrong in shape, dtype, device or values; on a GPU the values are looked at in the first call only. RuntimeError
        if x is not the tensor recorded, ValueError if the error does not return (N,).
        """
        return self._term_of(x, y, model_args, model_kwargs, target, step)

    if TYPE_CHECKING:

        def __call__(self, x: Tensor, y: Any, *model_args: Any, **options: Any) -> Tensor:
            """As `forward`."""

    def _term_of(
        self, x: Tensor, y: Any, args: tuple[Any, ...], kwargs: dict[str, Any], given: Tensor | None, step: int | None
    ) -> Tensor:
        check_batch(x, y)
        check_given(self.target, given, x, self.error)
        training = torch.is_grad_enabled()
        self._count_from(step)
        due = self._is_due() or not training
        if not due and self._tried:
            self._step += 1
            self._warn_of_the_same(x)
            return self._zero(x)
        weight = self._weight() * (self.every if training else 1)
        tries = training and not self._tried

        trial = nullcontext() if due else random_state_restored(self.model, x)  # whose result is thrown away
        with exclusive_use(self.model), torch.enable_grad(), trial:
            forward = self._forward_pass(x, args, kwargs, training)
            try:
                r, errors, cosine = self._evaluate(
                    forward, y, given, differentiable=training and (weight != 0 or tries)
                )
            except NoPathError:
                if due:
                    raise
                r, errors, cosine = x.new_zeros(()), x.new_zeros(len(x)), None  # the backbone is not trained yet
            value = r if self.reduction == "mean" else errors

        if training:
            self._tried = True
            self._step += 1
            self._computed = (weakref.ref(x), x._version) if due and step is None else None
            self._recorder = None
            forward.close()
        if due:
            self.penalty, self.cosine = r.detach(), cosine
            self._term = weight * self.penalty
        if not training:
            return weight * value.detach()
        return weight * value if due and weight else self._zero(x)

    def _evaluate(
        self, forward: Forward, y: Any, given: Tensor | None, *, differentiable: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """R, E(delta, t) of each image, (N,), and the mean cosine of delta and t."""
        settings = Settings(self.criterion, self.batch_norm, self.activations, self.ignore_index)
        try:
            with backward_passes(forward, y, settings, create_graph=differentiable, verified=self._verified) as passes:
                first = self.penalty is None and not self._tried
                t = make_target(self.target, given, passes, self.error, first=first)  # a constant
                delta = passes.attached_delta  # J^T v, on a graph: one backward pass with create_graph
        except RuntimeError as error:
            if "second time" not in str(error) or self._recorder is None or forward is not self._recorder.forward:
                raise
            raise RuntimeError(
                "expected the graph of the forward pass inside shared_forward(), got one that a backward pass has "
                "freed: call the loss before loss.backward()."
            ) from error
        delta, t = at_least_single(delta), at_least_single(t)
        with without_autocast(forward.x.device):
            kept = torch.ones(len(delta), dtype=torch.bool, device=delta.device)
            if isinstance(self.criterion, str):
                kept = kept_images(forward.logits, y, self.ignore_index).to(delta.device)
            errors = self._errors(delta, t, kept)
            directions = self.target != "zero" and self.error != "outside"
            cosines = torch.where(kept, 1 - cos(delta.detach(), t), 0) if directions else None
            count = kept.sum().clamp(min=1)
            return errors.sum() / count, errors, None if cosines is None else cosines.sum() / count

    def _forward_pass(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], training: bool) -> Forward:
        """The one that was recorded, if it is still that of the model, or one of its own."""
        recorder = self._recorder
        if not (training and recorder and recorder.forward and recorder.up_to_date()):
            return forward_without_trace(self.model, x, args, kwargs, batch_norm=self.batch_norm)
        if x is not recorder.forward.x:
            if any(x is each for each in recorder.arguments):
                raise RuntimeError(
                    "expected the images to be the first floating point argument inside shared_forward(), got one of "
                    f"shape {tuple(recorder.forward.x.shape)} before them: let the model take them first, or call the "
                    "loss without shared_forward(), the others by name: reg(x, y, t=t)."
                )
            raise RuntimeError(
                "expected the tensor that was passed to the model inside shared_forward(), got another one of shape "
                f"{tuple(x.shape)}: call the loss with the same x, after any .to(device) or augmentation."
            )
        return recorder.forward

    def _errors(self, delta: Tensor, target: Tensor, kept: Tensor) -> Tensor:
        """The error of each sample, (N,), 0 of those that are not kept."""
        samples = len(delta)
        # Their delta is 0, where the derivative of an error may not be finite.
        delta = torch.where(kept.view(-1, *[1] * (delta.dim() - 1)), delta, 1)
        error = NAMED[self.error] if isinstance(self.error, str) else self.error
        if self.transform is not None:
            delta = self.transform(delta)
            target = target if self.error == "outside" else self.transform(target)  # a mask is no gradient
        value = error(delta, target)
        if not isinstance(value, Tensor) or value.shape != (samples,):
            received = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"expected the error to have one value per sample, shape ({samples},), got {received}: "
                "reduce over all dimensions but the first."
            )
        return torch.where(kept, value, 0)

    @contextmanager
    def shared_forward(self, step: int | None = None) -> Iterator[None]:
        """Record the forward pass of the model inside, for the next call of the loss, which has the same `step`.

        The model sees a copy of its first floating point argument, in which gradients can be taken; attention is
        written out, as its fused kernels have no double backward. Nothing is recorded, at no cost, under
        `torch.no_grad()` and at the calls before `start` and those that `every` skips, but for the very first.

        Raises RuntimeError if the model was not called inside.
        """
        self._recorder = None
        self._count_from(step)
        if not (torch.is_grad_enabled() and (self._is_due() or not self._tried)):
            yield
            return
        self._recorder = Recorder(self.batch_norm)
        with self._recorder.recording(self.model):
            yield

    def logs(self) -> dict[str, float]:
        """What to log of the last computed call: penalty, cosine (but of zero and masks) and term, as it was added.

        All three are the training batch's, in training mode: `interpgrad.measure` has the cosine of held-out images.
        Plain numbers, which any logger takes; empty before `start`. On a GPU it waits for the result.
        """
        values = {"penalty": self.penalty, "cosine": self.cosine, "term": self._term}
        return {name: float(value) for name, value in values.items() if value is not None}

    def _weight(self) -> float:
        """Lam, less during the warm-up, and nothing before."""
        since = self._step - self.start
        if since < 0:
            return 0.0
        return self.lam * min(1, since / self.warmup) if self.warmup else self.lam

    def _count_from(self, step: int | None) -> None:
        if step is not None and not _is_count(step, 0):
            raise ValueError(f"expected step to be the number of an optimizer's step, from 0, got {step!r}.")
        self._step = self._step if step is None else step

    def _warn_of_the_same(self, x: Tensor) -> None:
        """Once, if a call is skipped whose images are those of the last computed one."""
        if self._computed and self._computed[0]() is x and self._computed[1] == x._version:
            self._computed = None
            warnings.warn(
                f"every={self.every}: the images of the last call come again, and this call is skipped. Where an "
                "optimizer calls several times in a step (SAM, LBFGS), pass the step's number: reg(x, y, step=i).",
                stacklevel=4,
            )

    def _zero(self, x: Tensor) -> Tensor:
        """Zeros that can be added to a loss, or backpropagated through by themselves."""
        shape = () if self.reduction == "mean" else (len(x),)
        return torch.zeros(shape, dtype=at_least_single(x[:0]).dtype, device=x.device, requires_grad=True)

    def _is_due(self) -> bool:
        return self._step >= self.start and (self._step - self.start) % self.every == 0

    def __setattr__(self, name: str, value: Any) -> None:
        """Hold the model without registering it: the optimizer and the checkpoint must not see it twice."""
        if name == "model":
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        """Copied and pickled without a recorded graph."""
        return self.__dict__ | {"_recorder": None, "_computed": None}

    def get_extra_state(self) -> Tensor:
        """The step counter of `every`, `start` and `warmup`: all there is in `state_dict()`."""
        return torch.tensor(self._step, device="cpu")  # whatever the default

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the step counter."""
        self._step = int(state)

    def extra_repr(self) -> str:
        """The settings, in the order of the constructor."""
        names = ("error", "lam", "target", "criterion", "batch_norm", "every", "start", "warmup", "activations")
        values = {name: getattr(self, name) for name in (*names, "ignore_index", "transform", "reduction")}
        return ", ".join(f"{name}={getattr(value, '__name__', repr(value))}" for name, value in values.items())


def _keep_what_no_checkpoint_has(reg: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Nothing is missing from a checkpoint of before the loss was there: it stays as it is."""
    if not any(key.startswith(prefix) for key in state):
        state.update(reg.state_dict(prefix=prefix))


def interpretable_gradient_loss(
    model: nn.Module,
    x: Tensor,
    y: Any,
    error: ErrorName | Error = "cos",
    lam: float = 7.5e-3,
    *,
    target: TargetName | Target | Tensor = "guided",
    criterion: CriterionName | Criterion = "log_prob",
    batch_norm: Statistics = "frozen",
    activations: Activations = "all",
    ignore_index: int = IGNORED,
    transform: TransformName | Transform | None = None,
    reduction: Reduction = "mean",
    model_kwargs: Mapping[str, Any] | None = None,
) -> Tensor:
    """The term lam * R as a function, without a schedule: one call of `InterpretableGradientLoss`, which documents it.

    `target` may be a tensor, a map or a mask. The class is the better choice in a loop: it has schedules and
    `shared_forward`, and verifies the operations of a model once.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> x, y = torch.randn(2, 3, 2, 2), torch.tensor([0, 2])
    >>> interpretable_gradient_loss(model, x, y, "mse", target="zero", reduction="none").shape
    torch.Size([2])
    """
    given = target if isinstance(target, Tensor) else None
    reg = InterpretableGradientLoss(
        model,
        error,
        lam,
        target="given" if isinstance(target, Tensor) else target,
        criterion=criterion,
        batch_norm=batch_norm,
        activations=activations,
        ignore_index=ignore_index,
        transform=transform,
        reduction=reduction,
    )
    return reg._term_of(x, y, (), dict(model_kwargs or {}), given, None)


def _is_count(value: Any, least: int) -> bool:
    return not isinstance(value, bool) and hasattr(value, "__index__") and operator.index(value) >= least


def _is_weight(value: Any) -> bool:
    try:
        return not isinstance(value, (bool, str)) and 0 <= float(value) < math.inf
    except (TypeError, ValueError):
        return False
