"""Everything of a model and of the process that a call must not change."""

import copy

import torch


def trace(model):
    """Everything of a model and of the process that a call must not change."""
    modules = dict(model.named_modules())
    return {
        "modules": {name: id(module) for name, module in modules.items()},
        "classes": {name: type(module) for name, module in modules.items()},
        "training": {name: module.training for name, module in modules.items()},
        "hooks": {
            name: {
                key: len(value) for key, value in vars(module).items() if "_hooks" in key and isinstance(value, dict)
            }
            for name, module in modules.items()
        },
        "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
        "parameters": {name: (id(value), value.detach().clone()) for name, value in model.named_parameters()},
        "gradients": {name: (id(v.grad), copy.deepcopy(v.grad)) for name, v in model.named_parameters()},
        "buffers": {name: (id(value), value.clone()) for name, value in model.named_buffers()},
        "requires_grad": {name: value.requires_grad for name, value in model.named_parameters()},
        "random state": torch.get_rng_state(),
        "grad mode": torch.is_grad_enabled(),
        "attention": torch.backends.cuda.flash_sdp_enabled(),
    }


def same(before, after):
    if isinstance(before, torch.Tensor):
        return isinstance(after, torch.Tensor) and torch.equal(before, after)
    if isinstance(before, dict):
        return before.keys() == after.keys() and all(same(before[key], after[key]) for key in before)
    if isinstance(before, tuple):
        return all(same(*pair) for pair in zip(before, after, strict=True))
    return before == after


def assert_same_trace(before, after):
    assert before.keys() == after.keys()
    assert [key for key in before if not same(before[key], after[key])] == []
