"""Batch norm over all ranks is batch norm over all images: both kinds, the one for CUDA with formulas in place of its kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm as TorchFunction

from obowlab.methods import OneProcess
from obowlab.methods.detection.masks import UnevenBatchNorm2d
from obowlab.methods.projection import GlobalBatchNorm1d
from obowlab.methods.split_batchnorm import SplitBatchNorm2d
from obowlab.training.distributed import World
from obowlab.training.sync_batchnorm import CudaBatchNorm, GlooBatchNorm, SyncBatchNorm, synchronise_batchnorm
from tests.fork_server import fork_all

CHANNELS = 3
SHAPE = (1, -1, 1, 1)


# ----------------------------------------------------------------------------------------- what the kernels of torch compute


def wide(x: Tensor) -> Tensor:
    """Return a tensor of half precision in the type that sums are taken in."""
    return x if x.dtype == torch.float64 else x.float()


def stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x = wide(x)
    return x.mean((0, 2, 3)), (x.var((0, 2, 3), correction=0) + eps).rsqrt()


def gather_stats(
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
    counts: Tensor,
) -> tuple[Tensor, Tensor]:
    share, total = (counts / counts.sum()).to(mean)[:, None], counts.sum().to(mean)
    variance = invstd.pow(-2) - eps
    overall = (share * mean).sum(0)
    square = (share * (variance + mean**2)).sum(0) - overall**2
    running_mean.lerp_(overall, momentum)
    running_var.lerp_(square * total / (total - 1), momentum)
    return overall, (square + eps).rsqrt()


def elemt(x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, invstd: Tensor, eps: float) -> Tensor:
    scale = invstd if weight is None else invstd * weight
    scaled = (x - mean.view(SHAPE)) * scale.view(SHAPE)
    return (scaled if bias is None else scaled + bias.view(SHAPE)).to(x.dtype)


def backward_reduce(
    dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor, x_g: bool, weight_g: bool, bias_g: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dy = wide(dy)
    sum_dy, sum_dy_xmu = dy.sum((0, 2, 3)), (dy * (x - mean.view(SHAPE))).sum((0, 2, 3))
    return sum_dy, sum_dy_xmu, sum_dy_xmu * invstd, sum_dy


def backward_elemt(
    dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, sum_dy: Tensor, sum_dy_xmu: Tensor, count: Tensor
) -> Tensor:
    assert count.dtype == torch.int32, "all that the kernel takes"
    centred, norm = x - mean.view(SHAPE), count.sum()
    projected = centred * (invstd**2 * sum_dy_xmu / norm).view(SHAPE)
    scale = invstd if weight is None else invstd * weight
    return ((dy - (sum_dy / norm).view(SHAPE) - projected) * scale.view(SHAPE)).to(x.dtype)


def with_formulas() -> None:
    """Let this process compute with formulas what torch has for CUDA alone."""
    torch.batch_norm_stats = stats  # type: ignore[assignment]
    torch.batch_norm_gather_stats_with_counts = gather_stats  # type: ignore[assignment]
    torch.batch_norm_elemt = elemt  # type: ignore[assignment]
    torch.batch_norm_backward_reduce = backward_reduce  # type: ignore[assignment]
    torch.batch_norm_backward_elemt = backward_elemt  # type: ignore[assignment]


# ------------------------------------------------------------------------------------------------------------------ the test


def images(kind: str) -> tuple[Tensor, Tensor]:
    """Return the images of both ranks and how much every output counts, float64 [8, C, 5, 4]; the ranks' differ in scale."""
    generator = torch.Generator().manual_seed(0)
    x, counts = torch.randn(2, 8, CHANNELS, 5, 4, generator=generator, dtype=torch.float64).unbind()
    x = x * torch.tensor([1.0, 5.0]).repeat_interleave(4).view(8, 1, 1, 1) + torch.arange(8.0).view(8, 1, 1, 1)
    if kind == "channels_last":
        return x.to(memory_format=torch.channels_last), counts.to(memory_format=torch.channels_last)
    if kind == "strided":  # neither of the layouts that the kernels know
        return x.transpose(2, 3).contiguous().transpose(2, 3), counts.transpose(2, 3).contiguous().transpose(2, 3)
    return x, counts


def plain() -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(CHANNELS, eps=1e-3, momentum=0.3).double()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, -0.5, 2.0]))
        norm.bias.copy_(torch.tensor([0.0, 1.0, -3.0]))
    return norm


def uneven() -> UnevenBatchNorm2d:
    norm = UnevenBatchNorm2d(CHANNELS, eps=1e-3, momentum=0.3).double()
    norm.load_state_dict(plain().state_dict())
    return norm


def row_norm(kind: str) -> GlobalBatchNorm1d:
    """Return one of a head: with scale and shift, with a scale alone, or with neither."""
    norm = GlobalBatchNorm1d(CHANNELS, affine=kind != "bare").double()
    if kind != "bare":
        norm.load_state_dict(plain().state_dict())
    if kind == "unshifted":
        norm.bias = None
    return norm


def steps(norm: nn.Module, x: Tensor, counts: Tensor) -> dict[str, Tensor]:
    """Return what two training steps, one of them without gradients, and an evaluation give."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = norm(x)
    (out.tanh() * counts).sum().backward()
    with torch.no_grad():
        again = norm(x + 1)
    found = {"out": out.detach(), "again": again, "x": x.grad}
    found |= {name: parameter.grad for name, parameter in norm.named_parameters()}
    found |= {name: value.clone() for name, value in norm.named_buffers()}
    return {**found, "evaluated": norm.eval()(x.detach())}  # type: ignore[dict-item]


class TorchBatchNorm(CudaBatchNorm):
    """The same module around the function of `nn.SyncBatchNorm`, which works wherever its kernels do."""

    def _normalise(self, x: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float) -> Tensor:
        group, size = dist.group.WORLD, dist.get_world_size()
        return TorchFunction.apply(  # type: ignore[no-any-return]
            x, self.weight, self.bias, running_mean, running_var, self.eps, momentum, group, size
        )


KINDS: dict[str, type[SyncBatchNorm]] = {"cuda": CudaBatchNorm, "gloo": GlooBatchNorm}
ROWS = ("affine", "unshifted", "bare")
LAYOUTS = ("contiguous", "channels_last", "strided")


def one_of_two(rank: int, file: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    with_formulas()
    mine = slice(4 * rank, 4 * rank + 4)
    found: dict[str, Any] = {}
    for name, kind in {**KINDS, "torch": TorchBatchNorm}.items():
        for layout in LAYOUTS:
            x, counts = images(layout)
            found[f"{name} {layout}"] = steps(kind.like(plain()), x[mine], counts[mine])
        x, counts = images("contiguous")
        most = slice(6) if rank == 0 else slice(6, 8)
        found[f"{name} uneven"] = steps(kind.like(uneven()), x[most], counts[most])
        for rows in ROWS:
            x, counts = (each[:, :, 0, 0] for each in images("contiguous"))
            found[f"{name} {rows}"] = steps(kind.like(row_norm(rows)), x[mine], counts[mine])
        frozen = kind.like(plain()).requires_grad_(False)
        x = images("contiguous")[0][mine].requires_grad_()
        frozen(x).tanh().sum().backward()
        found[f"{name} frozen"] = [frozen.weight.grad, frozen.bias.grad, x.grad]
        low = kind.like(plain().float())
        x = images("contiguous")[0][mine].bfloat16().requires_grad_()
        out = low(x)
        out.sum().backward()
        assert x.grad is not None
        found[f"{name} bfloat16"] = [out.dtype, x.grad.dtype, low.running_mean.dtype]
    torch.save(found, f"{file}.{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    file = tmp_path_factory.mktemp("sync") / "rendezvous"
    fork_all(one_of_two, ranks=2, arguments=(str(file),))
    return [torch.load(f"{file}.{rank}", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("layout", [*LAYOUTS, *ROWS, "uneven"])
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_do_what_one_does_with_all_images(kind: str, layout: str, ranks: list[dict[str, Any]]) -> None:
    if layout in ROWS:
        expected = steps(row_norm(layout), *(each[:, :, 0, 0] for each in images("contiguous")))
    else:
        expected = steps(plain(), *images(layout))
    first, second = (rank[f"{kind} {layout}"] for rank in ranks)
    assert expected.keys() == first.keys()
    for name, value in expected.items():
        if name in ("out", "again", "x", "evaluated"):
            found = torch.cat((first[name], second[name]))
        elif name in ("weight", "bias"):
            found = first[name] + second[name]  # DistributedDataParallel averages them, and the losses are averages
        else:
            assert torch.equal(first[name], second[name]), name
            found = first[name]
        torch.testing.assert_close(found, value, rtol=1e-6, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("layout", [*LAYOUTS, *ROWS])
def test_with_known_counts_the_kernels_are_given_what_torch_gives_them(layout: str, ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        for name, value in rank[f"torch {layout}"].items():
            assert torch.equal(rank[f"cuda {layout}"][name], value), name


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_parameters_get_no_gradient_and_images_do(kind: str, ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        weight, bias, x = rank[f"{kind} frozen"]
        assert (weight, bias) == (None, None)
        assert x.abs().sum() > 0
        assert rank[f"{kind} bfloat16"] == [torch.bfloat16, torch.bfloat16, torch.float32]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_parameters_and_buffers_are_shared_and_other_layers_left_alone(device: str) -> None:
    network = nn.Sequential(
        nn.Sequential(nn.BatchNorm2d(4, eps=0.1, momentum=0.2)),
        nn.BatchNorm1d(4),
        GlobalBatchNorm1d(4, affine=False),
        SplitBatchNorm2d.like(nn.BatchNorm2d(4), num_groups=2, comm=OneProcess()),
        nn.BatchNorm2d(4).eval().requires_grad_(False),
    )
    before = dict([*network.named_parameters(), *network.named_buffers()])
    kinds = [type(module) for module in network.modules()]
    alone = World(rank=0, world_size=1, device=torch.device(device))
    synchronise_batchnorm(network, world=alone)
    assert [type(module) for module in network.modules()] == kinds
    synchronise_batchnorm(network, world=World(rank=0, world_size=2, device=torch.device(device)))
    after = dict([*network.named_parameters(), *network.named_buffers()])
    assert before.keys() == after.keys()
    assert all(value is after[name] for name, value in before.items())
    kind = KINDS["cuda" if device == "cuda" else "gloo"]
    assert [type(module) for module in network.modules()][2:] == [kind, nn.BatchNorm1d, kind, SplitBatchNorm2d, kind]
    inner, last = network[0][0], network[4]
    assert (inner.eps, inner.momentum, inner.training, last.training) == (0.1, 0.2, True, False)
    assert not last.weight.requires_grad
