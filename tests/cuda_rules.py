"""What CUDA's kernels refuse and the CPU's take, read off PyTorch's sources, as a mode that refuses it on the CPU.

R1 to R10 are rules of cuda/Normalization.cu, cudnn/BatchNorm.cpp, layer_norm_kernel.cu, group_norm.cpp,
Convolution.cpp and AveragePool2d.cu, torch 2.4 to 2.14; R8 and R9 are what this package promises.
"""

from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class RefusedOnCudaError(AssertionError):
    """An operation that CUDA would not take."""


class CudaRules(TorchDispatchMode):
    """Refuses what CUDA refuses.

    Args:
        synchronizations: whether waiting for the device is allowed.
    """

    def __init__(self, *, synchronizations=True):
        super().__init__()
        self.synchronizations = synchronizations
        self.checked = {}  # rule -> how many operations it was asked of

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if torch._C._current_graph_task_id() != -1:
            self.check("R8", not torch.is_autocast_enabled("cpu"), func, "autocast is on in a backward pass")
        if func in (aten._local_scalar_dense.default, aten.nonzero.default):
            self.check("R9", self.synchronizations, func, "a host synchronization")
        rule = RULES.get(func)
        if rule:
            rule(self, func, *args)
        return func(*args, **(kwargs or {}))

    def check(self, rule, allowed, func, why):
        self.checked[rule] = self.checked.get(rule, 0) + 1
        if not allowed:
            raise RefusedOnCudaError(f"{rule}, {func}: {why}")


def batch_norm(rules, func, x, weight, bias, running_mean, running_var, training, *_):
    rules.check("R3", one_dtype(weight, bias), func, f"weight and bias of {dtypes(weight, bias)}")
    rules.check("R3", training or running_mean is not None, func, "evaluation without running statistics")
    rules.check("R2", parameters_match(x, weight, bias, running_mean, running_var), func, "parameters of other dtypes")


def batch_norm_backward(rules, func, g, x, weight, running_mean, running_var, mean, invstd, training, _, mask):
    rules.check("R1", weight is not None or not (mask[1] or mask[2]), func, "sums without a weight")
    rules.check("R2", one_dtype(g, x), func, f"gradient and x of {dtypes(g, x)}")
    rules.check("R2", parameters_match(x, weight, running_mean, running_var), func, "parameters of other dtypes")
    rules.check("R2", one_dtype(mean, invstd), func, f"mean and invstd of {dtypes(mean, invstd)}")
    if training and weight is not None and x.dim() >= 3:
        rules.check("R4", dense(x), func, f"x of {tuple(x.shape)} with strides {x.stride()}")
        rules.check("R4", weight.is_contiguous(), func, "weight is not contiguous")


def layer_norm(rules, func, x, _, weight, bias, *__):
    rules.check("R5", one_dtype(x, weight, bias), func, dtypes(x, weight, bias))


def layer_norm_backward(rules, func, g, x, _, mean, invstd, weight, bias, mask):
    rules.check("R5", one_dtype(g, x, weight, bias), func, dtypes(g, x, weight, bias))
    rules.check("R5", (weight is not None or not mask[1]) and (bias is not None or not mask[2]), func, "mask")


def group_norm(rules, func, x, weight, bias, *_):
    rules.check("R5", one_dtype(x, weight, bias), func, dtypes(x, weight, bias))
    rules.check("R6", x.is_contiguous(), func, f"x with strides {x.stride()}")


def group_norm_backward(rules, func, g, x, mean, invstd, weight, *rest):
    rules.check("R5", one_dtype(g, x, weight), func, dtypes(g, x, weight))
    rules.check("R5", weight is not None or not (rest[-1][1] or rest[-1][2]), func, "sums without a weight")
    rules.check("R6", g.is_contiguous() and x.is_contiguous(), func, f"strides {g.stride()}, {x.stride()}")


def convolution(rules, func, x, weight, bias, *_):
    rules.check("R7", one_dtype(x, weight, bias), func, dtypes(x, weight, bias))


def convolution_backward(rules, func, g, x, weight, *_):
    rules.check("R7", one_dtype(g, x, weight), func, dtypes(g, x, weight))


class Cudnn:
    """torch.ops.aten, whose batch norm is in training and evaluation what cuDNN's is: another implementation (1).

    It takes a dense x and weight, saves nothing in evaluation mode, goes by the reserve of its own forward pass, and
    computes all three gradients whatever the mask says. In evaluation mode the native backward pass follows it.
    Without a weight the native kernels run, whose backward pass in channels_last returns empty tensors for the others.
    """

    def __init__(self):
        self.forwards = self.backwards = 0
        self._batch_norm_impl_index = SimpleNamespace(default=self.batch_norm)
        self._batch_norm_impl_index_backward = SimpleNamespace(default=self.batch_norm_backward)

    def __getattr__(self, name):
        return getattr(aten, name)

    def batch_norm(self, x, weight, bias, *rest):
        y, mean, invstd, reserve, _ = aten._batch_norm_impl_index(x, weight, bias, *rest)
        training = rest[2]
        if weight is None or bias is None or (training and (rest[0] is None) != (rest[1] is None)):
            return y, mean, invstd, reserve, 0
        self.refuse(x, weight)
        self.forwards += 1
        reserve = torch.tensor([x.data_ptr() % 251, 1], dtype=torch.uint8)
        return (y, mean, invstd, reserve, 1) if training else (y, x.new_empty(0), x.new_empty(0), reserve, 1)

    def batch_norm_backward(self, index, x, g, weight, running_mean, running_var, mean, invstd, *rest):
        training, eps, mask, reserve = rest
        if index == 1 and training:
            self.refuse(x, weight)
            if not torch.equal(reserve, torch.tensor([x.data_ptr() % 251, 1], dtype=torch.uint8)):
                raise RefusedOnCudaError("cuDNN: not the reserve of this x")
            self.backwards += 1
            mask = [True, True, True]
        statistics = running_mean, running_var, mean, invstd
        if weight is None and training and (x.dim() == 2 or x.is_contiguous(memory_format=torch.channels_last)):
            dx = aten.native_batch_norm_backward(g, x, weight, *statistics, training, eps, mask)[0]
            return dx, x.new_empty(0), x.new_empty(0)
        return aten.native_batch_norm_backward(g, x, weight, *statistics, training, eps, mask)

    def refuse(self, x, weight):
        if not (dense(x) and weight.is_contiguous()):
            raise RefusedOnCudaError(f"cuDNN: strides {x.stride()}, {weight.stride()}")


def avg_pool2d_backward(rules, func, g, x, kernel_size, stride, padding, *_):
    """It does not raise there: its values are wrong (pytorch #188344)."""
    rules.check("R10", x.is_contiguous() or not any(padding), func, f"padding {padding} with strides {x.stride()}")


RULES = {
    aten.avg_pool2d_backward.default: avg_pool2d_backward,
    aten.native_batch_norm.default: batch_norm,
    aten.native_batch_norm_backward.default: batch_norm_backward,
    aten.native_layer_norm.default: layer_norm,
    aten.native_layer_norm_backward.default: layer_norm_backward,
    aten.native_group_norm.default: group_norm,
    aten.native_group_norm_backward.default: group_norm_backward,
    aten.convolution.default: convolution,
    aten.convolution_backward.default: convolution_backward,
}


def one_dtype(*tensors):
    return len({each.dtype for each in tensors if each is not None}) <= 1


def dtypes(*tensors):
    return str([None if each is None else each.dtype for each in tensors])


def parameters_match(x, *parameters):
    """All of one dtype: that of x, or single precision beside an x in half."""
    given = {each.dtype for each in parameters if each is not None}
    half = x.dtype in (torch.float16, torch.bfloat16)
    return len(given) <= 1 and given <= ({x.dtype, torch.float32} if half else {x.dtype})


def dense(x):
    formats = {4: [torch.channels_last], 5: [torch.channels_last_3d]}.get(x.dim(), [])
    return any(x.is_contiguous(memory_format=each) for each in [torch.contiguous_format, *formats])
