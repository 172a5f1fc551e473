"""BatchNorm over the rows of all ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from recognition.distributed.collectives import gather_parts, sum_over_ranks


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm over the rows of all ranks, of any number per rank, on the CPU too.

    Equal to torch's BatchNorm on the concatenated batch. Forward: one all-gather of 2 * channels
    + 1 statistics per rank. Backward: one all-reduce of 2 * channels sums. In eval mode: none.
    """

    group: ProcessGroup

    @classmethod
    def convert(cls, module: nn.Module, group: ProcessGroup) -> nn.Module:
        """`module` with every BatchNorm replaced; names, parameters and buffers stay the same."""
        for name, child in module.named_children():
            setattr(module, name, cls.convert(child, group))
        if not isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            return module
        new = cls(module.num_features, module.eps, module.momentum, module.affine)
        new._parameters, new._buffers = module._parameters, module._buffers
        new.training, new.group = module.training, group
        return new

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self, input: Tensor) -> Tensor:  # [b, channels, ...]
        if not self.training:
            return super().forward(input)
        output, mean, var, count = _SyncBatchNorm.apply(
            input, self.weight, self.bias, self.eps, self.group
        )
        assert self.num_batches_tracked is not None and self.momentum is not None
        assert self.running_mean is not None and self.running_var is not None
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            unbiased = var * (count / (count - 1).clamp_min(1))
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        return output


class _SyncBatchNorm(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, group: ProcessGroup
    ) -> tuple[Tensor, ...]:
        dims = [0, *range(2, x.dim())]
        wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        local_var, local_mean = torch.var_mean(wide, dims, correction=0)  # [channels]
        count = local_mean.new_full((1,), x.numel() // x.shape[1])
        local = torch.cat([local_mean, local_var, count])
        every = gather_parts(local[None], [1] * group.size(), group)  # [W, 2 * channels + 1]
        means, variances, counts = every.split([x.shape[1]] * 2 + [1], dim=1)
        total = counts.sum()
        mean = (means * counts).sum(0) / total
        var = ((variances + (means - mean).square()) * counts).sum(0) / total
        inverse_std = (var + eps).rsqrt()
        shape = [1, -1] + [1] * (x.dim() - 2)
        scale = inverse_std * weight
        output = wide * scale.view(shape) + (bias - mean * scale).view(shape)
        ctx.save_for_backward(x, weight, mean, inverse_std, total)
        ctx.group = group
        ctx.mark_non_differentiable(mean, var, total)
        return output.to(x.dtype), mean, var, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse_std, total = ctx.saved_tensors
        dims, shape = [0, *range(2, x.dim())], [1, -1] + [1] * (x.dim() - 2)
        wide = grad.to(mean.dtype)
        unit = (x.to(mean.dtype) - mean.view(shape)) * inverse_std.view(shape)
        local = torch.stack([wide.sum(dims), (wide * unit).sum(dims)])  # [2, channels]
        sums = sum_over_ranks(local, ctx.group)
        from_mean, from_var = (sums / total).unbind()
        grad_x = wide - from_mean.view(shape) - unit * from_var.view(shape)
        grad_x *= (inverse_std * weight).view(shape)
        # Weight and bias see this rank's rows only: DistributedDataParallel averages them over the
        # ranks, and the gather's factor W makes that the sum.
        return grad_x.to(x.dtype), local[1].to(weight.dtype), local[0].to(weight.dtype), None, None
