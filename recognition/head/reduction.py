"""One autograd function from unit rows to the target cosines and the reduced other logits.

Its forward goes through the chunks of this rank's sampled classes and makes both collectives of the
loss; its backward gets both gradients as arguments and walks the chunks once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from recognition.distributed import collectives
from recognition.head.chunked_softmax import Formula, Kernel, Reducer
from recognition.head.chunks import Chunks, TargetCosines

# From the target cosines and class values of the whole batch [B, 1 + k], and the target cosines of
# this rank: the formula of the other classes' logits. It is called without gradient.
FormulaOf = Callable[[Tensor, TargetCosines], Formula]


def reduced_logits(
    x: Tensor,  # [B, D] unit rows
    weight: Tensor,  # its gradient goes to chunks.class_rows; here it ties the result to the graph
    class_values: Tensor,  # [m, k] the margin's values of the targets' classes
    learned: Sequence[Tensor],  # [] each: numbers of the margin on which negatives() may depend
    chunks: Chunks,
    formula_of: FormulaOf,
    kernel: Kernel,
    group: collectives.ProcessGroup,
) -> tuple[Tensor, Tensor]:
    """The target cosine and the class values of every row, [B, 1 + k]; and the reduction [B] over
    all sampled classes but the row's own, as logits.Reducer states it. Both are the same on all
    ranks. Margin.negatives() sees target cosines and class values as constants, so no gradient
    flows from the reduction into them.

    Forward: one all-reduce (sum) of B * (1 + k) elements, one all-gather of W * B elements or, for
    a "sigmoid" margin, one all-reduce of B. Backward: none; the gradient of a row's target cosine
    and class values counts on the rank that holds its class alone, and rank r's share of a
    log-sum-exp is exp(lse_r - LSE).
    """
    return _ReducedLogits.apply(
        x, weight, class_values, chunks, formula_of, kernel, group, *learned
    )


def reduce_over_ranks(
    reducer: Reducer, formula: Formula, x: Tensor, group: collectives.ProcessGroup
) -> tuple[Tensor, Tensor | float]:
    """The reduction [B] over the classes of all ranks, and its slope with respect to this rank's.

    Forward: the second collective of reduced_logits(); no backward.
    """
    local = reducer.reduce(x)
    if formula.margin.reduction == "softmax":
        return collectives.merge_log_sum_exp(local, group)
    return collectives.sum_over_ranks(local, group), 1.0


def full_precision(x: Tensor) -> torch.autocast:
    """Autocast off: logits of scale 64 need fp32, bf16 ones are off by a quarter."""
    return torch.autocast(x.device.type, enabled=False)


class _ReducedLogits(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        class_values: Tensor,
        chunks: Chunks,
        formula_of: FormulaOf,
        kernel: Kernel,
        group: collectives.ProcessGroup,
        *learned: Tensor,
    ) -> tuple[Tensor, Tensor]:
        own = chunks.target_cosines(x)
        values = torch.cat([own.cos[:, None], class_values], 1)  # [m, 1 + k]
        filled = values.new_zeros(len(x), values.shape[1])
        filled.index_copy_(0, chunks.targets.row, values)
        shared = collectives.sum_over_ranks(filled, group)  # [B, 1 + k]
        formula = formula_of(shared, own)
        reducer = kernel(chunks, formula)
        reduced, slope = reduce_over_ranks(reducer, formula, x, group)  # [B]
        ctx.save_for_backward(x)
        ctx.own, ctx.reducer, ctx.slope, ctx.learned = own, reducer, slope, list(learned)
        ctx.target_row = chunks.targets.row
        return shared, reduced

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_shared: Tensor, grad_reduced: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        held = grad_shared[ctx.target_row]  # [m, 1 + k]
        with full_precision(x):
            grad_x, grads = ctx.reducer.gradients(
                x, ctx.own, held[:, 0], grad_reduced * ctx.slope, ctx.learned
            )
        return grad_x, None, held[:, 1:], None, None, None, None, *grads
