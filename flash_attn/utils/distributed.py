"""Collective operations that gradients flow through, for tensor and sequence parallelism.

Tensors are spread over the ranks of `process_group` along their first dimension. The `_raw`
functions know nothing of autograd, and return what to wait for as well: None unless `async_op`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Pending = tuple[Tensor, Any]


def all_gather_raw(input_: Tensor, process_group: ProcessGroup, async_op: bool = False) -> Pending:
    """The tensors of all ranks, one behind the other."""
    ranks = dist.get_world_size(process_group)
    output = input_.new_empty(ranks * input_.shape[0], *input_.shape[1:])
    handle = dist.all_gather_into_tensor(
        output, input_.contiguous(), group=process_group, async_op=async_op
    )
    return output, handle


def reduce_scatter_raw(
    input_: Tensor, process_group: ProcessGroup, async_op: bool = False
) -> Pending:
    """This rank's part of the sum over all ranks."""
    ranks = dist.get_world_size(process_group)
    if input_.shape[0] % ranks != 0:
        raise ValueError(
            f"reduce_scatter_raw: input_ has {input_.shape[0]} rows; the {ranks} ranks of "
            "process_group must divide them"
        )
    output = input_.new_empty(input_.shape[0] // ranks, *input_.shape[1:])
    handle = dist.reduce_scatter_tensor(
        output, input_.contiguous(), group=process_group, async_op=async_op
    )
    return output, handle


def all_reduce_raw(input_: Tensor, process_group: ProcessGroup, async_op: bool = False) -> Pending:
    """The sum over all ranks, in place where input_ is contiguous."""
    output = input_.contiguous()
    return output, dist.all_reduce(output, group=process_group, async_op=async_op)


class AllGatherFunc(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input_: Tensor, process_group: ProcessGroup) -> Tensor:
        ctx.process_group = process_group
        return all_gather_raw(input_, process_group)[0]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return reduce_scatter_raw(grad_output, ctx.process_group)[0], None


class ReduceScatterFunc(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input_: Tensor, process_group: ProcessGroup) -> Tensor:
        ctx.process_group = process_group
        return reduce_scatter_raw(input_, process_group)[0]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return all_gather_raw(grad_output, ctx.process_group)[0], None


class AllReduceFunc(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input_: Tensor, process_group: ProcessGroup) -> Tensor:
        return all_reduce_raw(input_.clone(), process_group)[0]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad_output, None


all_gather = AllGatherFunc.apply
reduce_scatter = ReduceScatterFunc.apply
all_reduce = AllReduceFunc.apply


def sync_shared_params(model: nn.Module, process_group: ProcessGroup) -> None:
    """Gives parameters marked with `_shared_params` the values of the group's first rank."""
    source = dist.get_global_rank(process_group, 0)
    for parameter in _marked(model, "_shared_params"):
        with torch.no_grad():
            dist.broadcast(parameter, src=source, group=process_group)


def allreduce_sequence_parallel_grad(model: nn.Module, process_group: ProcessGroup) -> None:
    """Adds up, in one operation, gradients of parameters marked with `_sequence_parallel`: each
    rank has those of its part of the sequence.
    """
    grads = [x.grad for x in _marked(model, "_sequence_parallel") if x.grad is not None]
    if not grads:
        return
    with torch.no_grad():
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        dist.all_reduce(flat, group=process_group)
        for grad, part in zip(grads, flat.split([grad.numel() for grad in grads])):
            grad.copy_(part.view_as(grad))


def _marked(model: nn.Module, mark: str) -> list[nn.Parameter]:
    """In the order of names, which is the same on all ranks."""
    named = sorted(model.named_parameters(), key=lambda item: item[0])
    return [parameter for _, parameter in named if getattr(parameter, mark, False)]


def get_dim_for_local_rank(dim: int, world_size: int, local_rank: int, multiple_of: int = 1) -> int:
    """A rank's part of `dim`, a multiple of `multiple_of`: the first ranks have what is over."""
    each, over = divmod(dim // multiple_of, world_size)
    return (each + int(local_rank < over)) * multiple_of
