"""MoCo v2 against a version with loops, and batch-norm in groups against ordinary batch-norm on each group."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from obowlab.config import Backbone, Moco, Views
from obowlab.errors import UserError
from obowlab.methods import Batch, MoCo, OneProcess
from obowlab.methods.moco import contrast_logits
from obowlab.methods.split_batchnorm import SplitBatchNorm2d, split_batchnorm
from obowlab.training.distributed import World
from obowlab.training.sync_batchnorm import synchronise_batchnorm
from tests.oracles import MocoOracle

SMALL = Backbone(stem="small", width=4)
BATCH = 6


def build(**options: Any) -> MoCo:
    method = Moco(**{"queue_size": 10, "batchnorm_splits": 3, "projection_size": 5, "teacher_momentum": 0.8, **options})
    return MoCo(method, backbone=SMALL, total_steps=10, seed=0, num_classes=None, comm=OneProcess()).double()


def draw_batch(step: int, *, num_crops: int = 2, num_patches: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(step)
    views = {"crops": torch.randn(BATCH * num_crops, 3, 16, 16, generator=generator, dtype=torch.float64)}
    if num_patches:
        views["patches"] = torch.randn(BATCH * num_patches, 3, 12, 12, generator=generator, dtype=torch.float64)
    uniforms = torch.rand(BATCH, 1, generator=generator, dtype=torch.float64)
    return Batch(original=torch.zeros(BATCH, 3, 1, 1), views=views, uniforms=uniforms, step=step)


@pytest.mark.parametrize(("num_crops", "num_patches"), [(2, 0), (3, 2), (1, 1)])
def test_steps_are_those_of_the_oracle(num_crops: int, num_patches: int) -> None:
    method = build().train()
    oracle = MocoOracle(method.method, method.state_dict(), stem="small", lr=0.05)
    optimizer = torch.optim.SGD(method.param_groups(weight_decay=0.0), lr=0.05)
    for step in range(3):
        batch = draw_batch(step, num_crops=num_crops, num_patches=num_patches)
        output = method(batch)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        loss, accuracy = oracle.step(dict(batch.views), num_images=BATCH, uniforms=batch.uniforms)
        assert float(output.loss.detach()) == pytest.approx(loss, rel=1e-9)
        assert float(output.metrics["contrast_accuracy"]) == pytest.approx(accuracy)
        torch.testing.assert_close(method.queue, torch.stack(oracle.queue), rtol=1e-9, atol=1e-12)
        state = method.state_dict()
        for name, value in oracle.teacher.items():
            ours = f"teacher_{name}" if name.startswith("projection") else f"teacher.{name}"
            torch.testing.assert_close(state[ours], value, rtol=1e-9, atol=1e-12, msg=ours)
    assert int(method.pointer) == 18 % 10
    expected = {"loss", "contrast_accuracy", "queue_age", "teacher_momentum"}
    expected |= {"loss_crops"} if num_crops > 1 else set()
    expected |= {"loss_patches"} if num_patches else set()
    assert output.metrics.keys() == expected


def test_age_counts_the_steps_since_a_key_came() -> None:
    method = build(queue_size=12)
    ages = [float(method(draw_batch(step)).metrics["queue_age"]) for step in range(4)]
    assert ages == [0.0, 1.0, 1.5, 1.5], "12 keys, 6 of them new in every step"


def test_the_shuffle_decides_who_is_normalised_together() -> None:
    batch = draw_batch(0)
    shuffled = dataclasses.replace(batch, uniforms=batch.uniforms.flip(0))
    assert not torch.equal(build()(batch).loss, build()(shuffled).loss)
    first, second = build(batchnorm_splits=1)(batch).loss, build(batchnorm_splits=1)(shuffled).loss
    torch.testing.assert_close(first, second, rtol=1e-9, atol=0.0, msg="in one group the order cannot matter")


def test_logits_put_the_own_key_first() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, queue = (torch.randn(n, 4, generator=generator) for n in (3, 3, 5))
    logits = contrast_logits(query, key, queue, temperature=0.5)
    expected = [[float(q @ k) / 0.5, *(float(q @ old) / 0.5 for old in queue)] for q, k in zip(query, key, strict=True)]
    torch.testing.assert_close(logits, torch.tensor(expected))


def test_groups_are_normalised_as_by_batch_norms_of_their_own() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 4, 3, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    plain = nn.BatchNorm2d(4).double()
    with torch.no_grad():
        plain.weight.copy_(torch.rand(4, generator=generator))
        plain.bias.copy_(torch.rand(4, generator=generator))
    split = SplitBatchNorm2d.like(nn.BatchNorm2d(4).double(), num_groups=3, comm=OneProcess())
    split.load_state_dict(plain.state_dict())
    parts, means, variances = [], [], []
    for start in range(0, 6, 2):
        alone = nn.BatchNorm2d(4, momentum=1.0).double()
        alone.weight, alone.bias = plain.weight, plain.bias
        parts.append(alone(x[start : start + 2]))
        means.append(alone.running_mean)
        variances.append(alone.running_var)
    found, expected = split(x), torch.cat(parts)
    torch.testing.assert_close(found, expected)
    weights = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(*(torch.autograd.grad((y * weights).sum(), x)[0] for y in (found, expected)))
    torch.testing.assert_close(split.running_mean, 0.1 * torch.stack(means).mean(0))
    torch.testing.assert_close(split.running_var, 0.9 + 0.1 * torch.stack(variances).mean(0))
    assert int(split.num_batches_tracked) == 1
    split.eval()
    by_hand = (x - split.running_mean.view(1, -1, 1, 1)) / (split.running_var.view(1, -1, 1, 1) + split.eps).sqrt()
    torch.testing.assert_close(split(x), by_hand * plain.weight.view(1, -1, 1, 1) + plain.bias.view(1, -1, 1, 1))


def test_synchronising_leaves_groups_alone() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.BatchNorm2d(4)))
    split_batchnorm(network, num_groups=2, comm=OneProcess())
    synchronise_batchnorm(network, world=World(rank=0, world_size=2, device=torch.device("cpu")))
    assert [type(part) for part in network.modules()][-1] is SplitBatchNorm2d


@pytest.mark.parametrize(
    ("views", "message"),
    [
        ({"num_crops": 1}, r"views\.num_crops is 1 and views\.num_patches 0: set views\.num_crops to 2"),
        ({"num_crops": 0, "num_patches": 5}, r"one crop as the key .* set views\.num_crops to 2"),
        ({"num_crops": 2, "cutmix_probability": 0.5}, r"MoCo has no targets .* views\.cutmix_probability to 0\.0"),
    ],
)
def test_views_that_make_no_pair_are_refused(views: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        MoCo.check_views(Moco(), backbone=SMALL, views=Views(**views))


def test_one_crop_is_enough_beside_patches() -> None:
    MoCo.check_views(Moco(), backbone=SMALL, views=Views(num_crops=1, num_patches=1))


@pytest.mark.parametrize(
    ("batch_size", "world_size", "message"),
    [
        (100, 1, r"batchnorm_splits \(8\) must divide training\.batch_size \(100\)"),
        (8, 1, r"groups of two images or more"),
        (48, 3, r"must be a multiple of the number of processes \(3\)"),
        (256, 16, r"must be a multiple of the number of processes \(16\)"),
    ],
)
def test_a_batch_that_cannot_be_split_is_refused(batch_size: int, world_size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        MoCo.check_batch(Moco(), batch_size=batch_size, world_size=world_size)
    MoCo.check_batch(Moco(), batch_size=128, world_size=4)
