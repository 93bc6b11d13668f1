"""Every private name of PyTorch that this package uses, with its risk, and what replaces it.

Functions below have those that are asked here. Elsewhere, where they belong to what is done there:

| name | where | without it |
| --- | --- | --- |
| `_batch_norm_impl_index`, `_batch_norm_impl_index_backward` | batch_norm.py | `native_batch_norm`, without cuDNN |
| `_softmax_backward_data` | attention.py | products and sums, which are slower |
| `_adaptive_avg_pool*d`, `_adaptive_avg_pool*d_backward` | pooling.py | stock, whose double backward is slower |
| `_saved_training`, `_saved_weight`, `_saved_result2` | frozen.py | refuse stock's batch norm nodes |
| `_saved_running_mean` | frozen.py | refuse those of one row |
| `_saved_min`, `_saved_self`, `_saved_other` | guided.py | clamps and maxima are guided no more |
| `_higher_order_ops` | graph.py | refuse cond, scan and others where they are called |
| `_forward_cls`, `_backward_cls` | graph.py, report.py, forward.py | the names of Functions and their nodes |
| `_functions.SyncBatchNorm`, `_check_input_dim` | sync_batch_norm.py | the differentiable layer, which is slower |
| `_buffers` | forward.py | `register_buffer` for each buffer |
| `_parameters`, `_modules` | forward.py | `named_parameters` and `named_children`, which are slower |
| `_version` | forward.py, loss.py | no notice where weights change after a shared forward pass, or images come again |
| `_is_view` | on_views.py | copies for all activations in place |
| `_Loss` | criteria.py | a list of torch's losses |
| `_orig_mod` | model.py | only modules compiled in place |

All are in torch 2.8 to 2.14; tests/test_private.py holds that this list is whole. If one is missing, there is an
AttributeError or what is said here, never a wrong value.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import Node
from torch.utils import checkpoint as checkpointing

P = ParamSpec("P")
T = TypeVar("T")


def will_run(node: Node) -> bool:
    """Whether the running backward pass will execute the node: `_will_engine_execute_node`.

    Without it everything is taken for needed, and gradients are computed in vain.
    """
    ask = getattr(torch._C, "_will_engine_execute_node", None)
    try:
        return ask is None or bool(ask(node))
    except RuntimeError:  # a leaf that torch.autograd.grad was asked for: it does not run, it is collected
        return True


def number_of_backward_pass() -> int:
    """Unique in the process, -1 outside of backward passes: `_current_graph_task_id`; for frozen statistics."""
    return int(torch._C._current_graph_task_id())


def casts_to(node: Node, dtype: torch.dtype) -> bool:
    """Whether a cast's gradient arrives in dtype: `_input_metadata`.

    Without it, yes: gradients are scaled as in float16, which costs a look at their size.
    """
    metadata = getattr(node, "_input_metadata", None)
    return metadata is None or any(gradient.dtype == dtype for gradient in metadata)


def zeros_for(node: Node) -> list[Tensor]:
    """A gradient of zeros for each that a node takes: `_input_metadata`; without it none, and no node is tried."""
    metadata = getattr(node, "_input_metadata", ())
    return [torch.zeros(each.shape, dtype=each.dtype, device=each.device) for each in metadata]


def rows_of(node: Any) -> int:
    """How many the first gradient that it takes has: `_input_metadata`.

    Without it those of its `_saved_input`. A checkpointed layer runs again for that.
    """
    metadata = getattr(node, "_input_metadata", None) or [node._saved_input]
    return int(metadata[0].shape[0])


def checkpoint_under_way() -> Any:
    """What non-reentrant checkpointing keeps of the layer it runs here, with its `recompute_fn`; None outside of it.

    In the closure of its hook, the last that intercepts saved tensors: `_top_saved_tensors_default_hooks`. Where it is
    not found there is an error: layers recomputed as stock may yield wrong values, silently.
    """
    pack: Any = (torch._C._autograd._top_saved_tensors_default_hooks(False) or [None])[0]
    if getattr(pack, "__module__", None) != checkpointing.__name__ or "_recomputation_hook" in pack.__qualname__:
        return None
    checkpointed = inspect.getclosurevars(pack).nonlocals.get("frame")
    if not hasattr(checkpointed, "recompute_fn"):
        raise RuntimeError(
            f"expected to find what activation checkpointing recomputes, not so in torch {torch.__version__}: train "
            "without checkpointing, or with another release of torch."
        )
    return checkpointed


def enabled_attention() -> dict[str, bool]:
    """Which attention kernels may run: `_get_*_sdp_enabled`, of which a release may lack some.

    `torch.nn.attention.sdpa_kernel` sets the same, but what interrupts it leaves some set and some not.
    """
    kinds = ("flash", "mem_efficient", "math", "cudnn", "overrideable")
    asked = {kind: getattr(torch._C, f"_get_{kind}_sdp_enabled", None) for kind in kinds}
    return {kind: bool(ask()) for kind, ask in asked.items() if ask}


def enable_attention(enabled: Mapping[str, bool]) -> None:
    """Let these kernels run, or not: `_set_sdp_use_*`."""
    for kind, on in enabled.items():
        getattr(torch._C, f"_set_sdp_use_{kind}")(on)


def under_a_transform() -> bool:
    """Whether vmap, jvp or another of torch.func is under way: `peek_interpreter_stack`."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def has_dual_numbers() -> bool:
    """Whether forward-mode differentiation is under way: `_current_level`."""
    return forward_ad._current_level >= 0


def is_traced() -> bool:
    """Whether torch.jit.trace is under way: `_get_tracing_state`, as torch.jit.is_tracing asks, which is slower."""
    return torch._C._get_tracing_state() is not None


def is_higher_order(function: Any) -> bool:
    """Whether it is one of torch's operators that take functions: `HigherOrderOperator`."""
    return isinstance(function, torch._ops.HigherOrderOperator)


def is_batched(gradient: Tensor) -> bool:
    """Whether it stands for many, under `is_grads_batched=True`: `is_legacy_batchedtensor`."""
    return bool(torch._C._functorch.is_legacy_batchedtensor(gradient))


def each_of(gradient: Tensor) -> tuple[Tensor, ...]:
    """Those it stands for: `_remove_batch_dim`."""
    singles: tuple[Tensor, ...] = torch._remove_batch_dim(gradient, _level_of(gradient), 1, 0).unbind()
    return singles


def batched(gradients: Sequence[Tensor], like: Tensor) -> Tensor:
    """One that stands for these, as `like` does for others: `_add_batch_dim`."""
    return torch._add_batch_dim(torch.stack(list(gradients)), 0, _level_of(like))


def _level_of(gradient: Tensor) -> int:
    """Of vmap, the innermost. Asked of the tensor: threads count for themselves, and a GPU's passes run on another.

    At a level that is not its own `_remove_batch_dim` adds a dimension, of the size that it is given: here 0.
    """
    return next(level for level in range(63, 0, -1) if len(torch._remove_batch_dim(gradient, level, 0, 0)))


def untraced(function: Callable[P, T]) -> Callable[P, T]:
    """The function as torch.compile leaves it alone: `_disable_dynamo`. torch.compiler.disable imports the compiler."""
    disabled: Callable[P, T] = torch._disable_dynamo(function)  # type: ignore[attr-defined]
    return disabled


def stance() -> Any:
    """Of torch.compile, None before somebody imports it: `_stance`."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    return dynamo and dynamo._stance


def set_stance(stance: Any) -> None:
    """`_set_stance`. `torch.compiler.set_stance` does the same, but leaves what it has set where it is interrupted."""
    sys.modules["torch._dynamo.eval_frame"]._set_stance(stance)


def is_compiled_wrapper(module: nn.Module) -> bool:
    """Whether torch.compile(module) returned this: `OptimizedModule`. Asked of the type: it delegates look-ups."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # not imported before somebody compiles
    return dynamo is not None and isinstance(module, dynamo.OptimizedModule)


def is_compiled_in_place(module: nn.Module) -> bool:
    """Whether module.compile() was called: `_compiled_call_impl`."""
    return module._compiled_call_impl is not None


def parameter_groups(module: nn.Module) -> list[Any]:
    """The groups by which FSDP2 gathers and frees parameters: `_fsdp_param_group(s)`, without which it fails."""
    sharded = [part for part in module.modules() if hasattr(type(part), "set_reshard_after_backward")]
    states: list[Any] = [part._get_fsdp_state() for part in sharded]  # type: ignore[operator]
    of_each = [getattr(state, "_fsdp_param_groups", [getattr(state, "_fsdp_param_group", None)]) for state in states]
    return [group for groups in of_each for group in groups if group is not None]
