"""Batch norm over ranks with the kernels of CUDA equals torch's own, and the host waits for nothing."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from obowlab.training.sync_batchnorm import CudaBatchNorm
from tests.fork_server import fork_all
from tests.test_sync_batchnorm import ROWS, TorchBatchNorm, row_norm, steps

pytestmark = pytest.mark.gpu

CHANNELS = 16
TYPES = (torch.float32, torch.bfloat16)
LAYOUTS = (torch.contiguous_format, torch.channels_last)


def plain(device: torch.device) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(CHANNELS, momentum=0.3).to(device)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(-1, 2, CHANNELS))
        norm.bias.copy_(torch.linspace(3, -3, CHANNELS))
    return norm


def compared(rank: int, file: str, world_size: int) -> None:
    """Compare both on this rank's images, and a step of ours without any waiting of the host."""
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", init_method=f"file://{file}", rank=rank, world_size=world_size, device_id=device)
    generator = torch.Generator().manual_seed(rank)
    for kind, layout in itertools.product(TYPES, LAYOUTS):
        x, counts = torch.randn(2, 8, CHANNELS, 7, 5, generator=generator).unbind()
        x = ((1 + rank) * x + rank).to(device, kind).to(memory_format=layout)
        counts = counts.to(device)
        expected: dict[str, Any] = steps(TorchBatchNorm.like(plain(device)), x, counts)
        found = steps(CudaBatchNorm.like(plain(device)), x, counts)
        for name, value in expected.items():
            assert torch.equal(found[name], value), (kind, layout, name)
        alone = steps(plain(device), x, counts)
        for name in ("out", "x", "running_mean", "running_var") if world_size == 1 else ():
            tolerance = 1e-4 if kind == torch.float32 else 0.05
            torch.testing.assert_close(found[name], alone[name], rtol=tolerance, atol=tolerance)
        norm = CudaBatchNorm.like(plain(device))
        torch.cuda.set_sync_debug_mode("error")
        steps(norm, x, counts)
        torch.cuda.set_sync_debug_mode("default")
    for rows in ROWS:  # those of heads
        head = row_norm(rows).float().to(device)
        x, counts = torch.randn(2, 8, head.num_features, generator=generator).to(device).unbind()
        expected, found = (steps(kind.like(copy.deepcopy(head)), x, counts) for kind in (TorchBatchNorm, CudaBatchNorm))
        for name, value in expected.items():
            assert torch.equal(found[name], value), (rows, name)
    dist.barrier(device_ids=[rank])
    dist.destroy_process_group()


def test_one_gpu_does_what_torch_does_without_waiting(tmp_path: Path) -> None:
    fork_all(compared, ranks=1, arguments=(str(tmp_path / "rendezvous"), 1))


def test_two_gpus_do_what_torch_does_without_waiting(tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two NVIDIA GPUs")
    fork_all(compared, ranks=2, arguments=(str(tmp_path / "rendezvous"), 2))
