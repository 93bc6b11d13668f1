"""Two ways to a forward pass whose graph begins at the images: one of its own without a trace, or the user's."""

from __future__ import annotations

import functools
import inspect
import itertools
import random
import sys
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from interpgrad import graph, private
from interpgrad.autocast import without_autocast
from interpgrad.cleanup import OfAllThreads, finally_call, removed_hooks
from interpgrad.double_backward import fast_double_backward
from interpgrad.double_backward.engine import Root
from interpgrad.double_backward.sync_batch_norm import replaced_sync_batch_norm
from interpgrad.model import call, logits_of, unwrap
from interpgrad.private import is_compiled_in_place, is_compiled_wrapper
from interpgrad.sharded import parameters_kept

_ROOT: Any = Root._backward_cls


class Forward(NamedTuple):
    """A forward pass.

    Attributes:
        x: the images as the user passed them, (N, C, H, W).
        image: the same values at the root of the graph, in which gradients are taken.
        root: the node between that and the copy the model was given.
        output: what the model returned.
        module: the model, unwrapped.
        recomputes: whether backward passes run some of its layers again, as under checkpointing.
    """

    x: Tensor
    image: Tensor
    root: Any
    output: Any
    module: nn.Module
    recomputes: bool

    @property
    def logits(self) -> Tensor:
        """The logits in the output: itself, its `.logits`, or the first of a tuple."""
        return logits_of(self.output)

    @contextmanager
    def inner_passes(self, *, create_graph: bool) -> Iterator[None]:
        """The context of backward passes that are not the user's, of whose results he takes derivatives or not.

        Layers that run again count no batch twice. Nothing is cast: the user's autocast is for forward passes.
        """
        buffers = _own_buffers(self.module) if self.recomputes else nullcontext()
        with buffers, parameters_kept(self.module, afterwards=create_graph), without_autocast(self.image.device):
            yield

    def close(self) -> None:
        """Say that no backward pass from now on needs the images' gradient, unless the user does."""
        if not self.x.requires_grad:
            self.root.consumers -= 1


def forward_without_trace(
    model: nn.Module,
    x: Tensor,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    batch_norm: str = "frozen",
) -> Forward:
    """A forward pass of its own.

    It reads and writes clones of the buffers, so batch norm does not count the batch twice. The random state is
    restored, so the training loop draws the numbers it would have drawn.
    """
    module = unwrap(model)
    _refuse_unusable(module)
    image, model_input = _root_of_graph(x)
    root: Any = model_input.grad_fn
    root.without_trace = True
    with (
        random_state_restored(module, x),
        _recording(module, batch_norm, without_trace=True) as recording,
        eager(),
    ):
        try:
            output = call(module, model_input, args, kwargs)
        except TypeError as error:
            if recording.higher_order is None:
                raise
            raise graph.hidden_by(recording.higher_order) from error  # some do not run outside of their compiler
        return Forward(x, image, root, output, module, recording.recomputes)


class Recorder:
    """The user's own forward pass: the last outermost one inside `recording`, on the thread that entered it."""

    def __init__(self, batch_norm: str) -> None:
        self.forward: Forward | None = None
        self.arguments: list[Any] = []  # of that call, the images among them
        self.finished = 0
        self._batch_norm = batch_norm
        self._thread: int | None = threading.get_ident()
        self._calls: list[tuple[Tensor, Tensor, Any] | None] = []  # those under way

    def __deepcopy__(self, memo: dict[int, Any]) -> Recorder:
        """One that never records: the hooks of a copy of the model, made inside, are nobody's."""
        copied = Recorder(self._batch_norm)
        copied._thread = None
        return copied

    @contextmanager
    def recording(self, model: nn.Module) -> Iterator[None]:
        """Record the calls of the model inside, and leave it as it was."""
        # Inside DDP: the inner gradients must not run through its nodes, which would start the reduction.
        module = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        _refuse_unusable(module)
        if is_compiled(module):
            raise RuntimeError(
                "expected a module that runs eagerly inside shared_forward(), got one under torch.compile, whose graph "
                "has no double backward: call the loss without shared_forward(); it runs the original module."
            )
        with removed_hooks() as hooks:
            hooks.append(module.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True))
            hooks.append(module.register_forward_hook(self._after, always_call=True))
            with _recording(module, self._batch_norm) as self._mode:
                yield
        if not self.finished:
            raise RuntimeError(
                "expected a forward pass inside shared_forward(), got none: call the model that was given to the "
                "loss inside the with block, `with reg.shared_forward(): logits = model(x)`."
            )

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Put a copy of the images, the first floating point argument, on a graph."""
        if threading.get_ident() != self._thread:
            return None
        self._calls.append(None)
        given: dict[Any, Any] = dict(enumerate(args)) | _in_order_of_signature(module, kwargs)
        key = next((key for key, value in given.items() if _is_floating_point(value)), next(iter(given), None))
        x = given.get(key)
        root: Any = x.grad_fn if isinstance(x, Tensor) and isinstance(x.grad_fn, _ROOT) else None
        if len(self._calls) > 1 or not torch.is_grad_enabled() or (root and root.without_trace):
            return None  # not the call the user makes for this loss
        if root:  # another loss is recording the same call: both take their gradients in the same images
            root.consumers += 1
            self._calls[-1] = (*root.source, root)
            return None
        x = check_images(x)
        self.arguments = list(given.values())
        image, model_input = _root_of_graph(x)
        self._calls[-1] = x, image, model_input.grad_fn
        given[key] = model_input
        return tuple(given.pop(index) for index in range(len(args))), given

    def _after(self, module: nn.Module, _: Any, output: Any) -> None:
        """Called on the way out of every call, also of one that raised: its output is then None."""
        if threading.get_ident() != self._thread or not self._calls:
            return
        begun = self._calls.pop()
        if begun and output is not None:
            self.forward = Forward(*begun, _as_returned(output), module, self._mode.recomputes)
            self.finished += 1
            self._state = _state_of(module)

    def up_to_date(self) -> bool:
        """Whether the weights and modes are still those of the recorded pass."""
        return all(parameter._version == version for parameter, version in self._state[0]) and all(
            part.training == training for part, training in self._state[1]
        )


def _as_returned(output: Any) -> Any:
    """The logits in it, which the user may edit in place before the loss is called."""
    try:
        return logits_of(output).clone()
    except TypeError:  # the loss says what is wrong, when it is called
        return output


def _state_of(module: nn.Module) -> tuple[list[tuple[nn.Parameter, int]], list[tuple[nn.Module, bool]]]:
    versions = [(parameter, parameter._version) for parameter in module.parameters()]
    return versions, [(part, part.training) for part in module.modules()]


def check_images(x: Any) -> Tensor:
    """Images in which gradients can be taken: x itself, or an error that says what is wrong with it."""
    if not _is_floating_point(x):
        received = f"a tensor of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(
            f"expected x to be a floating point tensor, got {received}: convert the images, for instance x / 255."
        )
    if x.dim() == 0 or x.numel() == 0:
        raise ValueError(
            f"expected x to hold at least one image (N, C, H, W), got shape {tuple(x.shape)}: skip empty batches."
        )
    if torch.is_inference_mode_enabled() or x.is_inference():
        where = "torch.inference_mode()" if torch.is_inference_mode_enabled() else "a tensor made under it"
        raise RuntimeError(
            f"expected images in which gradients can be taken, got {where}: use torch.no_grad() instead of "
            "torch.inference_mode()."
        )
    images: Tensor = x
    return images


def check_batch(x: Any, y: Any) -> None:
    """Images as above, and as many targets."""
    x = check_images(x)
    shape = getattr(y, "shape", (len(y),) if isinstance(y, (list, tuple)) else None)
    if shape is not None and (len(shape) == 0 or shape[0] != len(x)):
        raise ValueError(
            f"expected one target for each of the {len(x)} images, got y of shape {tuple(shape)}: "
            + (
                "pass one image as a batch, x[None]."
                if tuple(shape) in ((), (1,))
                else "pass the x and y of the same batch."
            )
        )


def _is_floating_point(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _root_of_graph(x: Tensor) -> tuple[Tensor, Tensor]:
    """The tensor to differentiate in, and a copy for the model, which may work on its input in place.

    Where x itself requires a gradient, both stay connected to it.
    """
    image = x.clone() if x.requires_grad else x.detach().requires_grad_()
    model_input: Tensor = Root.apply(image)
    root: Any = model_input.grad_fn
    root.source = x, image
    return image, model_input


def _in_order_of_signature(module: nn.Module, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    names = [name for name in inspect.signature(unwrap(module).forward).parameters if name in kwargs] if kwargs else []
    return {name: kwargs[name] for name in names} | dict(kwargs)


@contextmanager
def _recording(module: nn.Module, batch_norm: str, *, without_trace: bool = False) -> Iterator[fast_double_backward]:
    """Operations that can be differentiated twice, also in the layers that backward passes run again."""
    buffers = _own_buffers(module) if without_trace else nullcontext()
    with buffers, fast_double_backward() as mode:
        with replaced_sync_batch_norm(module, differentiable=batch_norm == "coupled"):
            mode.recompute_in = functools.partial(_recording, module, batch_norm, without_trace=without_trace)
            yield mode


Buffers = dict[str, "Tensor | None"]


class _Lent(NamedTuple):
    """A module whose buffers are clones: what each part held, what it was lent, its attributes, and who is using it."""

    parts: list[nn.Module]
    own: list[Buffers]
    clones: list[Buffers]
    attributes: list[dict[str, Any]]
    users: set[object]


_lent: weakref.WeakKeyDictionary[nn.Module, _Lent] = weakref.WeakKeyDictionary()
_lending = threading.Lock()


@contextmanager
def _own_buffers(module: nn.Module) -> Iterator[None]:
    """Lend the modules clones of their buffers, and give back their own, with what they hold.

    By hand: torch.func.functional_call loses the buffers of a module that is reachable under two names. Layers that run
    again in a backward pass, on whatever thread, find them lent, and the last to leave gives back.

    NOTE. Not kept and copied back: a graph may have saved a buffer that the pass has changed in place.
    """
    user = object()
    lent: _Lent | None = None

    def give_back() -> None:
        with _lending:
            if lent is None:
                return
            lent.users.discard(user)
            if lent.users:
                return
            _lent.pop(module, None)
            for each in zip(*lent[:4], strict=True):
                _give_back(*each)

    with finally_call(give_back):
        with _lending:
            lent = _lent.get(module)
            if lent is None:
                parts = list(module.modules())
                own = [dict(part._buffers) for part in parts]
                lent = _Lent(parts, own, _clones(own), [_attributes(part) for part in parts], set())
                _lent[module] = lent
            lent.users.add(user)
            if len(lent.users) == 1:
                for part, clones in zip(lent.parts, lent.clones, strict=True):
                    part._buffers.update(clones)
        yield


def _clones(own: list[Buffers]) -> list[Buffers]:
    """Of all buffers, one for each, however often it is reachable."""
    clones = {id(buffer): buffer.clone() for each in own for buffer in each.values() if buffer is not None}
    return [{name: clones.get(id(buffer)) for name, buffer in each.items()} for each in own]


def _attributes(part: nn.Module) -> dict[str, Any]:
    return vars(part) | part._parameters | part._modules


def _give_back(part: nn.Module, own: Buffers, clones: Buffers, before: dict[str, Any]) -> None:
    """Its own buffers, and plain attributes if no others changed: one may be the size that a table is for.

    Where the pass made a buffer, or one of another shape, all that it replaced stay: attributes may say what they hold.

    NOTE. Not covered: a size in a dict, a list or another module, beside a table of the same shape. Nor one that is a
    buffer written in place, beside a table of another shape.
    """
    found = part._buffers
    reshaped = {name for name in own if _shape(found.get(name)) != _shape(own[name])}
    if reshaped or found.keys() - own.keys():
        replaced = {name for name in own if found.get(name) is not clones[name]}
        found.update((name, buffer) for name, buffer in own.items() if name not in reshaped | replaced)
    elif own:
        found.update(own)
        vars(part).update(_plain_before(before, _attributes(part)))


def _shape(buffer: Tensor | None) -> torch.Size | None:
    return None if buffer is None else buffer.shape


def _plain_before(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """The values before of those that have others now, if all are numbers, strings, None, or tuples of these."""
    changed = {name: value for name, value in before.items() if after.get(name) is not value}
    values = [*changed.values(), *(after.get(name) for name in changed)]
    parts = [part for value in values for part in (value if isinstance(value, tuple) else (value,))]
    plain = all(type(part) in (bool, int, float, str, type(None)) for part in parts)
    return changed if plain and before.keys() == after.keys() else {}


@contextmanager
def random_state_restored(module: nn.Module, x: Tensor) -> Iterator[None]:
    """Restore the generators of the CPU, of every device that x and the module live on, of Python and of numpy."""
    numpy, of_python = sys.modules.get("numpy"), random.getstate()
    of_numpy = numpy and numpy.random.get_state()
    tensors = itertools.chain([x], module.parameters(), module.buffers())
    devices = {tensor.device for tensor in tensors if tensor.device.type not in ("cpu", "meta")}
    kind = next(iter(devices)).type if devices else "cuda"
    try:
        with torch.random.fork_rng([device.index or 0 for device in devices], device_type=kind):
            yield
    finally:
        random.setstate(of_python)
        if numpy:
            numpy.random.set_state(of_numpy)


# Modules and functions that were compiled run eagerly: their graphs have no double backward.
eager = OfAllThreads(private.stance, private.set_stance, lambda stance: type(stance)("force_eager"))


def is_compiled(module: nn.Module) -> bool:
    """Whether the module, or one in it, is under torch.compile."""
    return any(is_compiled_in_place(part) or is_compiled_wrapper(part) for part in module.modules())


def _refuse_unusable(module: nn.Module) -> None:
    """Refuse TorchScript, and what has no parameters yet or does not keep them through several backward passes."""
    sharded = sys.modules.get("torch.distributed.fsdp")  # as whoever shards has imported it
    for part in module.modules():
        if sharded and isinstance(part, sharded.FullyShardedDataParallel):
            raise RuntimeError(
                "expected parameters that stay for several backward passes, got a FullyShardedDataParallel module: "
                "use FSDP2, torch.distributed.fsdp.fully_shard, or DDP."
            )
        if isinstance(part, torch.jit.ScriptModule):
            raise RuntimeError(
                f"expected nn.Modules, got a TorchScript module ({part.original_name}), whose graph hides its "
                "activations: use the nn.Module it was scripted from."
            )
        if isinstance(part, LazyModuleMixin) and part.has_uninitialized_params():
            raise RuntimeError(
                f"expected layers that have their parameters, got a {type(part).__name__} without: call the model once "
                "first, model(x)."
            )
