"""PyTorch's private names are there, mean what they are used for, and their absence is survived."""

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from nets import Checkpointed, data, small_net
from torch import nn
from torch.utils import checkpoint as checkpointing
from torch.utils.checkpoint import checkpoint

from interpgrad import InterpretableGradientLoss, input_gradients, private

PACKAGE = Path(private.__file__).parent


def test_every_private_name_is_listed():
    """In one file, with what replaces it: those of operators, nodes, modules and tensors too."""
    listed = (PACKAGE / "private.py").read_text()
    owner = r"(?:torch|aten|node|saved|part|layer|module|parameter|input|function|nn|functions|model)(?:\.\w+)*"
    for path in PACKAGE.rglob("*.py"):
        if path.name != "private.py":
            text = path.read_text()
            found = re.findall(rf"\b{owner}\.(_[a-zA-Z]\w*)", text)
            found += re.findall(r"(?:getattr\([^()]*, f?|get_submodule\()\"(_[a-z]\w+)", text)
            missing = [name for name in found if f"{name}`" not in listed and f"`{name}" not in listed]
            assert missing == [], path


def test_what_will_run_and_in_which_pass():
    x, y = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    product = x * y
    seen = []

    def note(_):
        nodes = [node for node, _ in product.grad_fn.next_functions]
        seen.append(([private.will_run(node) for node in nodes], private.number_of_backward_pass()))

    product.grad_fn.register_prehook(note)
    torch.autograd.grad(product.sum(), x, retain_graph=True)
    product.sum().backward()
    assert [wanted for wanted, _ in seen] == [[True, False], [True, True]]
    assert len({number for _, number in seen} | {-1}) == 3
    assert private.number_of_backward_pass() == -1


def test_casts():
    x = torch.ones(2, requires_grad=True)
    node = x.half().grad_fn
    assert private.casts_to(node, torch.float16)
    assert not private.casts_to(node, torch.bfloat16)
    (zeros,) = private.zeros_for(node)
    assert zeros.dtype == torch.float16
    assert zeros.tolist() == [0, 0]


def test_checkpoints():
    seen = []

    def layer(x):
        seen.append(private.checkpoint_under_way())
        return x.exp()

    x = torch.ones(2, requires_grad=True)
    layer(x)
    y = checkpoint(layer, x, use_reentrant=False)
    checkpoint(layer, x, use_reentrant=True)
    y.sum().backward()  # recomputes
    assert [frame is None for frame in seen] == [True, False, True, True]
    assert callable(seen[1].recompute_fn)


def test_checkpoints_of_another_make(monkeypatch):
    """An error, where it is not found what is recomputed."""

    class Renamed(checkpointing._CheckpointFrame):
        def __init__(self, recompute_fn, *rest):
            super().__init__(recompute_fn, *rest)
            self.rerun = vars(self).pop("recompute_fn")

    monkeypatch.setattr(checkpointing, "_CheckpointFrame", Renamed)
    with pytest.raises(RuntimeError, match="what activation checkpointing recomputes"):
        InterpretableGradientLoss(Checkpointed(small_net()))(*data())


def test_transforms_and_batches():
    seen = []
    assert not private.under_a_transform()
    torch.func.vmap(lambda x: seen.append(private.under_a_transform()) or x)(torch.ones(2))
    assert seen == [True]
    x = torch.ones(3, requires_grad=True)
    y = x * 2
    batches = []

    def note(gradients):
        batches.append(private.is_batched(gradients[0]))
        if batches[-1]:
            with ThreadPoolExecutor(1) as worker:  # as the engine's, where there is a GPU
                singles = worker.submit(private.each_of, gradients[0]).result()
                same = worker.submit(private.batched, singles, gradients[0]).result()
            assert private.is_batched(same)
            assert len(singles) == 2
            assert not any(map(private.is_batched, singles))
            return (same,)
        return None

    y.grad_fn.register_prehook(note)
    outer = torch.arange(6.0).view(2, 3)
    (found,) = torch.autograd.grad(y, x, outer, is_grads_batched=True, retain_graph=True)
    assert torch.equal(found, 2 * outer)
    torch.autograd.grad(y, x, outer[0])
    assert batches == [True, False]


def test_compiled_modules():
    module = nn.Linear(2, 2)
    assert not private.is_compiled_wrapper(module)
    assert private.is_compiled_wrapper(torch.compile(module, backend="eager"))
    module.compile(backend="eager")
    assert private.is_compiled_in_place(module)
    assert not private.is_compiled_in_place(nn.Linear(2, 2))


def take_away(name, monkeypatch):
    """From what `private` sees: torch needs some of these itself."""
    monkeypatch.setattr(private, "getattr", lambda each, asked, *default: default[0] if asked == name else getattr(each, asked, *default), raising=False)  # fmt: skip  # noqa: E501


@pytest.mark.parametrize("absent", ["_will_engine_execute_node", "_input_metadata", "_top_saved_tensors_default_hooks"])
def test_without(absent, monkeypatch):
    """The same values, by more work; of layers under checkpointing perhaps an error."""
    model, (x, y) = Checkpointed(small_net()), data()

    def values():
        loss = F.cross_entropy(model(x), y) + InterpretableGradientLoss(model, lam=1.0)(x, y)
        return *input_gradients(model, x, y), *torch.autograd.grad(loss, list(model.parameters()))

    expected = values()
    take_away(absent, monkeypatch)
    try:
        found = values()
    except RuntimeError as error:
        if absent != "_top_saved_tensors_default_hooks" or "without checkpointing" not in str(error):
            raise
        return
    for value, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-9, atol=1e-12)


OWNERS = {
    "_current_graph_task_id": torch._C,
    "peek_interpreter_stack": torch._C._functorch,
    "is_legacy_batchedtensor": torch._C._functorch,
    "_compiled_call_impl": nn.Module,
}


@pytest.mark.parametrize("absent", OWNERS)
def test_an_error_without(absent, monkeypatch):
    reg, (x, y) = InterpretableGradientLoss(small_net()), data()
    monkeypatch.delattr(OWNERS[absent], absent)
    with pytest.raises(AttributeError, match=absent), reg.shared_forward():
        reg(x, y)


@pytest.mark.cpu("the operation is the CPU's")
def test_a_failing_double_backward_without(monkeypatch):
    """It is refused all the same."""

    def attend(h):
        q = h.flatten(2)[:, None]
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, q, q)[0][:, 0].view_as(h)

    class Net(nn.Sequential):
        def forward(self, x):
            return super().forward(attend(x))

    take_away("_input_metadata", monkeypatch)
    with pytest.raises(RuntimeError, match="expected operations with a double backward"):
        InterpretableGradientLoss(Net(*small_net()))(*data())
