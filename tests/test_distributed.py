"""Collective operations of `utils.distributed`, in two processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from flash_attn.utils import distributed

RANKS = 2


def _check_a_rank(rank: int, folder: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS
    )
    group = dist.group.WORLD
    assert group is not None
    parts = [torch.arange(6.0).reshape(2, 3) + 10 * r for r in range(RANKS)]
    own = parts[rank].clone().requires_grad_()

    out = distributed.all_gather(own, group)
    assert torch.equal(out, torch.cat(parts))
    weights = torch.arange(12.0).reshape(4, 3)
    (grad,) = torch.autograd.grad((out * weights).sum(), own)
    assert torch.equal(grad, RANKS * weights[2 * rank : 2 * rank + 2])

    out = distributed.reduce_scatter(own, group)
    assert torch.equal(out, sum(parts)[rank : rank + 1])
    (grad,) = torch.autograd.grad(out.sum() * (rank + 1), own)
    assert torch.equal(grad, torch.tensor([[1.0], [2.0]]).expand(2, 3))

    out = distributed.all_reduce(own, group)
    assert torch.equal(out, sum(parts))
    assert torch.equal(own, parts[rank])
    (grad,) = torch.autograd.grad((out * (rank + 1)).sum(), own)
    assert torch.equal(grad, torch.full((2, 3), rank + 1.0))

    gathered, handle = distributed.all_gather_raw(own.detach(), group, async_op=True)
    handle.wait()
    assert torch.equal(gathered, torch.cat(parts))

    model = nn.Linear(2, 2)
    model.weight._shared_params = True  # type: ignore[attr-defined]
    model.bias._sequence_parallel = True  # type: ignore[attr-defined]
    with torch.no_grad():
        model.weight.fill_(rank + 1)
    model.bias.grad = torch.full((2,), rank + 1.0)
    distributed.sync_shared_params(model, group)
    distributed.allreduce_sequence_parallel_grad(model, group)
    assert torch.equal(model.weight, torch.ones(2, 2))
    assert torch.equal(model.bias.grad, torch.full((2,), 3.0))

    with pytest.raises(ValueError, match="input_ has 3 rows; the 2 ranks"):
        distributed.reduce_scatter_raw(torch.zeros(3), group)
    dist.destroy_process_group()


def test_two_ranks_have_the_results_and_gradients(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_check_a_rank, (str(tmp_path),), nprocs=RANKS)


@pytest.mark.parametrize(
    ("dim", "world_size", "multiple_of", "parts"),
    [(10, 4, 1, [3, 3, 2, 2]), (64, 4, 8, [16, 16, 16, 16]), (40, 4, 8, [16, 8, 8, 8])],
)
def test_a_dimension_is_dealt_out(
    dim: int, world_size: int, multiple_of: int, parts: list[int]
) -> None:
    found = [
        distributed.get_dim_for_local_rank(dim, world_size, rank, multiple_of)
        for rank in range(world_size)
    ]
    assert found == parts
