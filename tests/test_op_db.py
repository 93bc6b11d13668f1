"""PyTorch's own sample inputs of every function that is replaced, through stock and inside of fast_double_backward.

A tenth of them; all with `--hypothesis-profile=long`. In a process of their own, since torch.testing._internal changes
the one it is imported in: it forbids to set flags, patches TorchScript, and imports the compiler.
"""

import functools
import inspect
import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from contextlib import nullcontext

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from interpgrad import fast_double_backward
from interpgrad.double_backward import _REPLACEMENTS

pytestmark = pytest.mark.slow

# What was compared at least, of a tenth of the samples: some two thirds of what torch 2.14 has.
FLOORS = {
    "operators": {"functions": 100, "values": 700, "first derivatives": 350, "second derivatives": 350},
    "modules": {"modules": 30, "values": 80, "first derivatives": 80, "second derivatives": 50},
    "errors": {"errors": 65},
}


@pytest.mark.cpu("the samples are made there")
@pytest.mark.parametrize("kind", FLOORS)
def test_samples_of_pytorch(kind, record_property):
    step = 1 if hypothesis.settings.default.max_examples > 1000 else 10
    command = [sys.executable, "-W", "ignore", __file__, kind, str(step)]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, timeout=3600, env=one_thread)
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    record_property("samples", found["counts"])
    if found["missing"]:
        pytest.skip(found["missing"])
    assert not found["differences"]
    for name, floor in FLOORS[kind].items():
        assert found["counts"][name] >= floor, found["counts"]


class Calls(TorchFunctionMode):
    """Whether a function is called that is replaced."""

    met = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.met = self.met or func in _REPLACEMENTS
        return func(*args, **(kwargs or {}))


def spellings():
    """Every way to call what is replaced: a label, the names its operator may have, and the call."""
    for function in _REPLACEMENTS:
        name = function.__name__.strip("_").replace("clip", "clamp")
        label = f"{getattr(function, '__module__', 'torch.Tensor')}.{function.__name__}"
        operators = (f"nn.functional.{name}", name)
        if function in (torch.batch_norm, torch.instance_norm):
            yield label, operators, of_torch(function, getattr(F, name))
        elif function in (torch.max_pool2d, torch.max_pool3d):
            yield label, operators, lambda *args, return_indices, _f=function, **named: _f(*args, **named)
        elif function.__name__.endswith("_"):
            yield label, operators, lambda x, *args, _f=function, **named: _f(x * 1, *args, **named)
            yield f"{label} on a view", operators, lambda x, *args, _f=function, **named: _f(view(x), *args, **named)
        else:
            yield label, operators, function
            if inspect.isfunction(function) and "inplace" in inspect.signature(function).parameters:
                _f = functools.partial(function, inplace=True)
                yield f"{label} in place", operators, lambda x, *args, _f=_f, **named: _f(x * 1, *args, **named)
                yield f"{label} on a view", operators, lambda x, *args, _f=_f, **named: _f(view(x), *args, **named)


def view(x):
    return torch.stack([x, x])[0]


def of_torch(function, functional):
    """The norm of torch, which takes its arguments in another order, and all of them."""

    def call(*args, **named):
        given = inspect.signature(functional).bind(*args, **named)
        given.apply_defaults()
        order = ("input", "weight", "bias", "running_mean", "running_var", "training", "use_input_stats")
        settings = [given.arguments[each] for each in order if each in given.arguments]
        return function(*settings, given.arguments["momentum"], given.arguments["eps"], True)

    return call


def copied(arguments):
    """The same arguments, none of which another call has changed or recorded."""
    return tree_map(
        lambda each: each.detach().clone().requires_grad_(each.requires_grad) if isinstance(each, Tensor) else each,
        arguments,
    )


def stages(call, arguments, fast):
    """The values, the first and the second derivatives; the last of them may be an error's type."""
    arguments = copied(arguments)
    torch.manual_seed(0)
    given = [each for each in tree_flatten(arguments)[0] if isinstance(each, Tensor)]
    found, reached = {}, "values"
    try:
        args, named = arguments
        with fast_double_backward() if fast else nullcontext():
            output = call(*args, **named)
        given += call.parameters() if isinstance(call, nn.Module) else ()  # a lazy module has them now
        inputs = [each for each in given if each.requires_grad]
        y = [each for each in tree_flatten(output)[0] if isinstance(each, Tensor)]
        found[reached] = [*y, *given, *(call.buffers() if isinstance(call, nn.Module) else ())]  # statistics, updated
        y = [each for each in y if each.requires_grad]
        if y and inputs:
            reached = "first derivatives"
            g = [torch.randn_like(each).requires_grad_() for each in y]
            first = torch.autograd.grad(y, inputs, g, create_graph=True, allow_unused=True)
            found[reached] = first
            reached = "second derivatives"
            outer = [None if each is None else torch.randn_like(each) for each in first]
            second = []
            for wanted in (1, len(first)):  # the first input's gradient alone, as in a penalty; and all of them
                pairs = zip(first[:wanted], outer, strict=False)
                pairs = [(each, a) for each, a in pairs if each is not None and each.requires_grad]
                outputs, a = zip(*pairs, strict=True) if pairs else ((), ())
                nothing = [None] * len([*g, *inputs])
                options = {"retain_graph": True, "allow_unused": True}
                second += torch.autograd.grad(outputs, [*g, *inputs], a, **options) if pairs else nothing
            found[reached] = second
    except Exception as error:
        found[reached] = type(error)
    return found


def same(ours, stock, precise):
    """None is as good as zeros."""
    if isinstance(stock, type) or isinstance(ours, type):
        return stock is ours
    return len(ours) == len(stock) and all(map(functools.partial(close, precise=precise), ours, stock))


def close(value, expected, precise):
    if value is None or expected is None:
        rest = expected if value is None else value
        return rest is None or not (rest.abs() > 1e-9).any()
    if value.dtype != expected.dtype or value.shape != expected.shape:
        return False
    value, expected = value.detach().double(), expected.detach().double()
    tolerance = (1e-9 if precise else 1e-5) * max([1.0, *expected[expected.isfinite()].abs().flatten().tolist()])
    return torch.allclose(value, expected, rtol=1e-9, atol=tolerance, equal_nan=True)


class Comparison:
    """What differs between stock and the replacements, and how much was compared."""

    def __init__(self):
        self.counts, self.differences, self.missing = Counter(), [], ""

    def of(self, label, calls, arguments, precise=True):
        """Of two equal calls: two, since a module has a state."""
        stock, ours = (stages(call, arguments, fast) for call, fast in zip(calls, (False, True), strict=True))
        for stage, expected in stock.items():
            if isinstance(expected, type) and stage == "second derivatives":
                continue  # stock has none
            if not same(ours.get(stage), expected, precise):
                self.differences.append(f"{label}: {stage}: {shown(expected)}, inside {shown(ours.get(stage))}")
                return
            self.counts["errors" if isinstance(expected, type) else stage] += 1


def shown(values):
    if isinstance(values, type):
        return values.__name__
    return str([None if each is None else each.detach().flatten()[:3].tolist() for each in values or ()])


def with_samples(op_db):
    """The label, the operator and the call of each."""
    infos = {each.name: each for each in op_db if not each.variant_test_name}
    for label, names, call in spellings():
        yield label, next(infos[name] for name in names if name in infos), call


def operators(step, compared, op_db):
    for label, info, call in with_samples(op_db):
        compared.counts["functions"] += 1
        for dtype in (torch.float64, torch.float32):
            samples = info.sample_inputs("cpu", dtype, requires_grad=dtype == torch.float64)
            for sample in itertools.islice(samples, 0, None, step):
                arguments = ((sample.input, *sample.args), sample.kwargs)
                compared.of(f"{label}, {dtype}: {sample.summary()}", (call, call), arguments, dtype == torch.float64)


def errors(step, compared, op_db):
    for label, info, call in with_samples(op_db):
        for error in info.error_inputs("cpu") if info.error_inputs_func else ():
            sample = error.sample_input
            arguments = ((sample.input, *sample.args), sample.kwargs)
            compared.of(f"{label}: {sample.summary()}", (call, call), arguments)


def modules(step, compared, module_db):
    for info in module_db:
        for training in (True, False):
            samples = info.module_inputs_func(
                info, device="cpu", dtype=torch.float64, requires_grad=True, training=training
            )
            for i, sample in enumerate(samples):
                if i and i % step:
                    continue
                arguments = (sample.forward_input.args, sample.forward_input.kwargs)
                one, *two = (made(info.module_cls, sample.constructor_input).train(training) for _ in range(3))
                if not i and not is_concerned(one, *copied(arguments)):
                    break
                compared.counts["modules"] += not i and training
                compared.of(f"{info.name}, training={training}, sample {i}", two, arguments)


def made(kind, arguments):
    torch.manual_seed(0)
    return kind(*arguments.args, **arguments.kwargs).double()


def is_concerned(module, args, named):
    """Whether what is replaced is called below it."""
    with Calls() as calls:
        module(*args, **named)
    return calls.met


if __name__ == "__main__":
    result = Comparison()
    try:
        from torch.testing._internal.common_methods_invocations import op_db
        from torch.testing._internal.common_modules import module_db
    except ImportError as error:
        result.missing = f"PyTorch's samples: {error}"
    else:
        kinds = {"operators": (operators, op_db), "modules": (modules, module_db), "errors": (errors, op_db)}
        compare, samples = kinds[sys.argv[1]]
        compare(int(sys.argv[2]), result, samples)
    print(json.dumps(vars(result)))
