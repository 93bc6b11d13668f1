"""Scaled dot-product attention inside fast_double_backward, against stock's math kernel in double precision."""

import math

import pytest
import torch
import torch.nn.functional as F
from nets import autocast, data, seeded, small_net
from test_double_backward import assert_same_derivatives
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from interpgrad import InterpretableGradientLoss, fast_double_backward, input_gradients

double = {"dtype": torch.float64}
OURS = "WeightsBackward"


def drawn(*shape, seed=0, **options):
    return torch.randn(*shape, generator=seeded(seed), **(double | options))


def inputs(lead=(2, 3), length=5, other=5, width=4, value_width=4):
    shapes = (length, width), (other, width), (other, value_width)
    return [drawn(*lead, *shape, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)]


def nodes_of(y):
    found, todo = set(), [y.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in found:
            found.add(node)
            todo += [each for each, _ in node.next_functions]
    return {node.name() for node in found}


def booleans(*shape):
    mask = torch.rand(*shape, generator=seeded(1)) > 0.4
    mask[..., 2, :] = False  # a row without any
    return mask


SHAPES = {
    "four dimensions": ({}, {}),
    "three": ({"lead": (2,)}, {}),
    "five": ({"lead": (1, 2, 3)}, {}),
    "more keys, wider values": ({"other": 7, "value_width": 6}, {}),
    "dropout": ({}, {"dropout_p": 0.4}),
    "a scale": ({}, {"scale": 0.3}),
    "a negative scale": ({}, {"scale": -0.3}),
    "causal": ({}, {"is_causal": True}),
    "causal, more keys": ({"other": 7}, {"is_causal": True}),
    "causal, fewer keys": ({"other": 3}, {"is_causal": True}),
}
MASKS = {
    "booleans": booleans(5, 5),
    "booleans of each image": booleans(2, 1, 5, 5),
    "numbers": drawn(5, 5, seed=5),
    "of keys": drawn(1, 5, seed=5),
    "windows": torch.where(drawn(5, 5, seed=6) > 0.5, -math.inf, 0.0),
    "learned, of each head": drawn(3, 5, 5, seed=5).requires_grad_(),
    "learned, of each image": drawn(2, 1, 5, 5, seed=5).requires_grad_(),
    "learned, in single precision": drawn(5, 5, seed=5, dtype=torch.float32).requires_grad_(),
}


@pytest.mark.parametrize("name", SHAPES)
def test_derivatives(name):
    """The value, the first and the second ones; third ones below."""
    shapes, settings = SHAPES[name]
    tensors = inputs(**shapes)

    def call(*tensors):
        torch.manual_seed(0)
        return F.scaled_dot_product_attention(*tensors, **settings)

    with sdpa_kernel(SDPBackend.MATH):
        assert_same_derivatives(call, *tensors)
    with fast_double_backward():
        assert OURS in nodes_of(call(*tensors))


@pytest.mark.parametrize("name", MASKS)
def test_derivatives_under_masks(name):
    with sdpa_kernel(SDPBackend.MATH):
        assert_same_derivatives(F.scaled_dot_product_attention, *inputs(), MASKS[name])
    with fast_double_backward():
        assert OURS in nodes_of(F.scaled_dot_product_attention(*inputs(), MASKS[name]))


@pytest.mark.parametrize("name", ["booleans", "learned, of each head"])
def test_gradcheck(name):
    """Of the first derivatives, the second, and the third: of a penalty on a Hessian, say."""
    mask = MASKS[name]
    tensors = inputs(lead=(1, 3), length=5, width=2, value_width=2)

    def attend(*tensors):
        with fast_double_backward():
            return F.scaled_dot_product_attention(*tensors, mask[:1] if mask.dim() == 4 else mask)

    assert gradcheck(attend, tensors)
    assert gradgradcheck(attend, tensors)

    def first(*tensors):
        y = attend(*tensors)
        return torch.autograd.grad(y, tensors, torch.ones_like(y), create_graph=True)

    assert gradgradcheck(first, tensors)


def no_replacement(**changes):
    query, key, value = inputs()
    return {"query": query, "key": key, "value": value} | changes


LEFT_TO_STOCK = {
    "groups of queries": no_replacement(key=drawn(2, 1, 5, 4), value=drawn(2, 1, 5, 4), enable_gqa=True),
    "keys for all images": no_replacement(key=drawn(1, 3, 5, 4)),
    "two dimensions": {name: drawn(5, 4, seed=7).requires_grad_() for name in ("query", "key", "value")},
}


@pytest.mark.parametrize("name", LEFT_TO_STOCK)
def test_the_rest_runs_on_the_math_kernel(name):
    arguments, found = LEFT_TO_STOCK[name], []
    for context in (fast_double_backward(), sdpa_kernel(SDPBackend.MATH)):
        torch.manual_seed(0)
        with context:
            y = F.scaled_dot_product_attention(**arguments)
        assert OURS not in nodes_of(y)
        (gradient,) = torch.autograd.grad(y.square().sum(), arguments["query"], create_graph=True)
        found.append([y, gradient, *torch.autograd.grad(gradient.square().sum(), arguments["query"])])
    torch.testing.assert_close(*found)


ERRORS = {
    "a mask of another shape": no_replacement(attn_mask=drawn(4, 5)),
    "a mask of another precision": no_replacement(attn_mask=drawn(5, 5).half()),
    "a mask and causal": no_replacement(attn_mask=drawn(5, 5), is_causal=True),
    "keys of another width": no_replacement(key=drawn(2, 3, 5, 6)),
    "keys of another precision": no_replacement(key=drawn(2, 3, 5, 4).float()),
    "a word for a scale": no_replacement(scale="1"),
    "a dropout of 2": no_replacement(dropout_p=2.0),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_those_of_stock(name):
    """Of the math kernel: fused ones of older releases take some of these."""
    with sdpa_kernel(SDPBackend.MATH), pytest.raises(Exception) as expected:  # noqa: PT011
        F.scaled_dot_product_attention(**ERRORS[name])
    with fast_double_backward(), pytest.raises(type(expected.value)):
        F.scaled_dot_product_attention(**ERRORS[name])


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, size):
    """As near to double precision as the fused kernel of the plain step is, whose double backward there is none."""
    shape = (2, 3, 50, 16)
    tensors = [(drawn(*shape, seed=seed) * (size if seed < 2 else 1)).to(dtype) for seed in range(3)]
    g = drawn(*shape, seed=3).to(dtype)
    outer = [drawn(*shape, seed=4 + seed).to(dtype) for seed in range(3)]

    def derived(precision, kernel, second=True):
        given = [each.to(precision).requires_grad_() for each in (*tensors, g)]
        with kernel:
            y = F.scaled_dot_product_attention(*given[:3])
        first = torch.autograd.grad(y, given[:3], given[3], create_graph=second)
        if not second:
            return [y, *first]
        return [y, *first, *torch.autograd.grad(first, given, [each.to(precision) for each in outer])]

    def errors(found):
        return torch.tensor([float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=False)])

    expected = derived(torch.float64, sdpa_kernel(SDPBackend.MATH))
    ours = errors(derived(dtype, fast_double_backward()))
    fused = errors(derived(dtype, sdpa_kernel(SDPBackend.FLASH_ATTENTION), second=False))
    assert (ours[:4] < 1.5 * fused + 1e-4).all(), (ours, fused)
    assert ours[4:].max() < 4 * fused.max(), (ours, fused)  # products of two such derivatives


def test_autocast_casts_as_stock_does():
    tensors = [each.float() for each in inputs()]
    mask = drawn(5, 5).float()
    with autocast(torch.bfloat16), fast_double_backward():
        ours = F.scaled_dot_product_attention(*tensors, mask)
    with autocast(torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        stock = F.scaled_dot_product_attention(*tensors, mask)
    assert ours.dtype == stock.dtype == torch.bfloat16
    torch.testing.assert_close(ours, stock, rtol=0.02, atol=0.02)


class Attentive(nn.Module):
    """Attention before a small network."""

    def __init__(self, checkpointed=False, named=False):
        super().__init__()
        self.net, self.checkpointed, self.named = small_net(), checkpointed, named

    def attend(self, x):
        q = x.flatten(2).transpose(1, 2)
        named = {"query": q, "key": q, "value": q}
        y = F.scaled_dot_product_attention(**named) if self.named else F.scaled_dot_product_attention(q, q, q)
        return y.transpose(1, 2).view_as(x)

    def forward(self, x):
        return self.net(checkpoint(self.attend, x, use_reentrant=False) if self.checkpointed else self.attend(x))


@pytest.mark.parametrize("settings", [{"checkpointed": True}, {"named": True}], ids=str)
def test_of_the_loss(settings):
    (x, y), found = data(), []
    for model in (Attentive(**settings), Attentive()):
        value = InterpretableGradientLoss(model, lam=1.0)(x, y)
        found.append([value, *torch.autograd.grad(value, list(model.parameters()), allow_unused=True)])
        found[-1] += input_gradients(model, x, y)
    torch.testing.assert_close(*found)


def test_a_mask_is_not_kept():
    """So the user may write over it."""
    mask = drawn(5, 5).requires_grad_(False)
    with fast_double_backward():
        y = F.scaled_dot_product_attention(*inputs(), mask)
    mask.zero_()
    y.sum().backward()


@pytest.mark.parametrize("first_pass", [False, True])
def test_autocast_in_the_backward_passes(first_pass):
    """Products of the Functions are as they were recorded; stock's, with the values, are cast, and rounded."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        tensors = [each.detach().float().requires_grad_() for each in inputs()]
        with fast_double_backward():
            y = F.scaled_dot_product_attention(*tensors)
        with autocast(dtype if first_pass else torch.float32):
            first = torch.autograd.grad(y.square().sum(), tensors, create_graph=True)
        with autocast(dtype):
            found.append([*first, *torch.autograd.grad(sum(each.square().sum() for each in first), tensors)])
    for single, half in zip(*found, strict=True):
        assert half.dtype == single.dtype
        assert (half - single).norm() < 2**-6 * single.norm()


def test_batched_gradients():
    """A Jacobian with is_grads_batched has its graph."""
    tensors, g = inputs(), drawn(2, 2, 3, 5, 4)
    with fast_double_backward():
        y = F.scaled_dot_product_attention(*tensors)
    batched = torch.autograd.grad(y, tensors, g, is_grads_batched=True, create_graph=True)
    single = [torch.autograd.grad(y, tensors, each, create_graph=True) for each in g]
    expected = [torch.stack(each) for each in zip(*single, strict=True)]
    torch.testing.assert_close(list(batched), expected)
    second = [
        torch.autograd.grad(sum(each.square().sum() for each in first), tensors, retain_graph=True)
        for first in (batched, expected)
    ]
    torch.testing.assert_close(*second)


TWICE = {
    "attention": (F.scaled_dot_product_attention, inputs()),
    "attention with a learned mask": (F.scaled_dot_product_attention, [*inputs(), MASKS["learned, of each head"]]),
    "layer norm": (lambda x, w: F.layer_norm(x, (4,), w), [drawn(3, 4).requires_grad_(), drawn(4).requires_grad_()]),
    "group norm": (lambda x: F.group_norm(x, 2), [drawn(3, 4, 2).requires_grad_()]),
    "GELU": (F.gelu, [drawn(3, 4).requires_grad_()]),
    "SiLU": (F.silu, [drawn(3, 4).requires_grad_()]),
}


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("name", TWICE)
def test_batched_second_derivatives(name, create_graph):
    """As of a Hessian by vectorized passes."""
    function, tensors = TWICE[name]
    with fast_double_backward():
        y = function(*tensors)
    first = torch.autograd.grad(y, tensors, drawn(*y.shape, seed=8), create_graph=True)
    outer = [drawn(2, *each.shape, seed=9) for each in first]
    options = {"create_graph": create_graph, "retain_graph": True}
    batched = torch.autograd.grad(first, tensors, outer, is_grads_batched=True, **options)
    single = [torch.autograd.grad(first, tensors, each, **options) for each in zip(*outer, strict=True)]
    torch.testing.assert_close(list(batched), [torch.stack(each) for each in zip(*single, strict=True)])
