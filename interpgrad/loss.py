"""The interpretable gradient loss, as a term to add to a training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from interpgrad.autocast import at_least_single, without_autocast
from interpgrad.criteria import Criterion, derivative_of
from interpgrad.double_backward.engine import leave_to_the_engine
from interpgrad.errors import ERRORS, cos
from interpgrad.forward import Forward, Recorder, check_batch, forward_without_trace
from interpgrad.gradients import check_batch_norm, gradient_pair
from interpgrad.guided import check_activations
from interpgrad.model import alone_with
from interpgrad.signals import uninterrupted, uninterrupted_context


class InterpretableGradientLoss(nn.Module):
    """lam * R, where R is the mean error between the input gradient and the guided input gradient.

    Drop-in, with a forward pass of its own that leaves no trace::

        reg = InterpretableGradientLoss(model)
        loss = F.cross_entropy(model(x), y) + reg(x, y)

    Two lines more, one forward pass less::

        with reg.shared_forward():
            logits = model(x)
        loss = F.cross_entropy(logits, y) + reg(x, y)

    After Torres et al., "A Learning Paradigm for Interpretable Gradients", arXiv 2404.15024: the input
    gradient is differentiated, the guided one is a constant. Two defaults are not the paper's, whose reading is
    `criterion="cross_entropy", batch_norm="coupled"`.

    Args:
        model: any module taking images first. It is held, not registered: `reg.parameters()` is empty.
        error: "cos", "mae", "mse", "hi" (see `interpgrad.errors`) or a callable
            `(delta, guided) -> (N,)`, to be minimized.
        lam: weight of the term; may be changed between steps. At 0 the value is still computed (for the
            log, in `penalty`) but contributes nothing, bit for bit.
        criterion: the function of the logits whose gradients are compared: "log_prob", the log-probability of
            the target; "logit", its logit, what saliency methods explain; "cross_entropy", the loss; or a callable
            `(logits, y) -> 0-dim tensor`, summed over the batch. Of the first two, how sure the network is
            is a constant of the penalty (see `interpgrad.criteria`).
        batch_norm: "frozen": in both gradients, and in what the penalty is differentiated with, the
            statistics of the batch are constants, as inference holds them. "coupled": functions of the batch, as
            plain autograd has them in training mode; the gradients aligned are then not those that
            inference sees. The same in evaluation mode.
        every: lazy regularization: computed at the first of every `every` calls and multiplied by `every`,
            zero and free at the others.
        start: so many calls come before it, at which it is zero and free: a network that has learned something gains
            more from it, at a smaller price.
        warmup: then the weight grows linearly from 0 to lam over so many calls, those that `every` skips included.
        activations: "all", every rectifier, or "relu", the piecewise-linear family alone.
        transform: a differentiable callable applied to both gradients before the error, for instance
            `interpgrad.low_pass`, or a sum over channels.

    Attributes:
        penalty: R of the last computed call: detached, not multiplied by lam; None before the first.
        cosine: mean cosine of delta and guided of that call, before `transform`, whatever the error; likewise detached.

    The extra forward pass of a plain call gives back buffers, modes and random states, of Python and numpy too. It
    cannot take back what a model or its hooks write elsewhere (lists, counters, attributes, such as the auxiliary
    losses of a mixture of experts): a shared forward pass is the user's own and has no such question.

    Threads that use one model here, for losses, gradients, maps or metrics, wait for each other. Nothing waits for the
    model's own forward pass on another thread, which must not run at the same time.

    With frozen statistics no gradient runs through the other samples of the batch; the extra pass normalizes with
    the batch's statistics and does not update the running ones.

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
        error: str | Callable[[Tensor, Tensor], Tensor] = "cos",
        lam: float = 7.5e-3,
        *,
        criterion: Criterion | str = "log_prob",
        batch_norm: str = "frozen",
        every: int = 1,
        start: int = 0,
        warmup: int = 0,
        activations: str = "all",
        transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"expected model to be an nn.Module, got {type(model).__name__}: pass the module itself.")
        if not callable(error) and not (isinstance(error, str) and error in ERRORS):
            raise ValueError(
                f"expected error to be one of {', '.join(map(repr, ERRORS))} or a callable (delta, guided) -> (N,), "
                f"got {error!r}."
            )
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"expected every to be an integer of at least 1, got {every!r}.")
        for name, calls in (("start", start), ("warmup", warmup)):
            if not isinstance(calls, int) or calls < 0:
                raise ValueError(f"expected {name} to be a number of calls, an integer of at least 0, got {calls!r}.")
        check_activations(activations)
        check_batch_norm(batch_norm)
        derivative_of(criterion)
        self.model = model
        self.error = error
        self.lam = lam
        self.criterion = criterion
        self.batch_norm = batch_norm
        self.every = every
        self.start = start
        self.warmup = warmup
        self.activations = activations
        self.transform = transform
        self.penalty: Tensor | None = None
        self.cosine: Tensor | None = None
        self._step = 0
        self._term: Tensor | None = None
        self._recorder: Recorder | None = None
        self._verified: set[frozenset[str]] = set()

    def forward(self, x: Tensor, y: Any, *model_args: Any, **model_kwargs: Any) -> Tensor:
        """The term lam * R for images x (N, C, H, W) and targets y, a 0-dim tensor.

        Further arguments go to the model. After `shared_forward()`, x must be the tensor that was passed to
        the model there, and its forward pass is used. Under `torch.no_grad()` the value is computed at every
        call and detached.

        Raises: as `interpgrad.input_gradients`, and RuntimeError if x is not the tensor recorded, ValueError
        if the error does not return (N,).
        """
        if not _eager:  # by now, unlike at the import of this file, whoever trains has imported torch._dynamo
            leave_to_the_engine()
            _eager.append(torch.compiler.disable(InterpretableGradientLoss._compute))  # type: ignore[no-untyped-call]
        term: Tensor = _eager[0](self, x, y, *model_args, **model_kwargs)
        return term

    @uninterrupted
    def _compute(self, x: Tensor, y: Any, *model_args: Any, **model_kwargs: Any) -> Tensor:
        """Outside of what torch.compile traces, where it may be part of a training step."""
        check_batch(x, y)
        training = torch.is_grad_enabled()
        if training and not self._is_due():
            self._step += 1
            return _zero(x)

        lam = self._weight()
        with alone_with(self.model), torch.enable_grad():
            if training and self._recorder and self._recorder.forward and self._recorder.up_to_date():
                forward = _same_images(self._recorder.forward, x)
            else:
                forward = forward_without_trace(self.model, x, model_args, model_kwargs, batch_norm=self.batch_norm)
            delta, guided = gradient_pair(
                forward,
                y,
                derivative=derivative_of(self.criterion),
                batch_norm=self.batch_norm,
                activations=self.activations,
                create_graph=training and lam != 0,
                verified=self._verified,
            )
            delta, guided = at_least_single(delta), at_least_single(guided)
            with without_autocast(x.device):
                penalty = self._error(delta, guided).mean()
                cosine = 1 - cos(delta.detach(), guided).mean()

        self.penalty, self.cosine = penalty.detach(), cosine
        if not training:
            self._term = lam * self.penalty
            return self._term
        self._term = lam * self.every * self.penalty
        self._step += 1
        self._recorder = None
        forward.close()
        return lam * self.every * penalty if lam else _zero(x)

    def _error(self, delta: Tensor, guided: Tensor) -> Tensor:
        """The error of each sample, (N,)."""
        samples = len(delta)
        error = ERRORS[self.error] if isinstance(self.error, str) else self.error
        if self.transform is not None:
            delta, guided = self.transform(delta), self.transform(guided)
        value = error(delta, guided)
        if not isinstance(value, Tensor) or value.shape != (samples,):
            received = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"expected the error to have one value per sample, shape ({samples},), got {received}: "
                "reduce over all dimensions but the first."
            )
        return value

    @uninterrupted_context
    def shared_forward(self) -> Iterator[None]:
        """Record the forward pass of the model inside, for the next call of the loss.

        The model sees a copy of its first argument, in which gradients can be taken; attention layers run
        on the kernel that has a double backward. Nothing is recorded, at no cost, under `torch.no_grad()`
        and at the calls before `start` and those that `every` skips.

        Raises RuntimeError if the model was not called inside.
        """
        self._recorder = None
        if not (torch.is_grad_enabled() and self._is_due()):
            yield
            return
        self._recorder = Recorder(self.batch_norm)
        with self._recorder.recording(self.model):
            yield

    def logs(self) -> dict[str, float]:
        """What to log of the last computed call: penalty, cosine and term, what was added to the loss.

        Plain numbers, which any logger takes; empty before `start`. On a GPU it waits for the result.
        """
        if self.penalty is None or self.cosine is None or self._term is None:
            return {}
        return {"penalty": float(self.penalty), "cosine": float(self.cosine), "term": float(self._term)}

    def _weight(self) -> float:
        """Lam, less during the warm-up, and nothing before."""
        since = self._step - self.start
        if since < 0:
            return 0.0
        return self.lam * min(1, since / self.warmup) if self.warmup else self.lam

    def _is_due(self) -> bool:
        return self._step >= self.start and (self._step - self.start) % self.every == 0

    def __setattr__(self, name: str, value: Any) -> None:
        """Hold modules without registering them: the optimizer and the checkpoint must not see them twice."""
        if isinstance(value, nn.Module):
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        """Copied and pickled without a recorded graph."""
        return self.__dict__ | {"_recorder": None}

    def get_extra_state(self) -> Tensor:
        """The step counter of `every`, `start` and `warmup`: all there is in `state_dict()`."""
        return torch.tensor(self._step, device="cpu")  # whatever the default

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the step counter."""
        self._step = int(state)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """Nothing is missing from a checkpoint of before the loss was there: the counter stays."""
        super()._load_from_state_dict(state_dict, prefix, *rest)
        missing = rest[2]
        missing[:] = [key for key in missing if key != f"{prefix}_extra_state"]

    def extra_repr(self) -> str:
        """The settings, in the order of the constructor."""
        names = ("error", "lam", "criterion", "batch_norm", "every", "start", "warmup", "activations")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


_eager: list[Callable[..., Tensor]] = []  # the loss as torch.compile leaves it alone, once it is asked for


def _same_images(recorded: Forward, x: Tensor) -> Forward:
    if x is not recorded.x:
        raise RuntimeError(
            "expected the tensor that was passed to the model inside shared_forward(), got another one of shape "
            f"{tuple(x.shape)}: call the loss with the same x, after any .to(device) or augmentation."
        )
    return recorded


def _zero(x: Tensor) -> Tensor:
    """A zero that can be added to a loss, or backpropagated through by itself."""
    return torch.zeros((), dtype=at_least_single(x[:0]).dtype, device=x.device, requires_grad=True)
