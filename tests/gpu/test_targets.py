"""BoW targets on a GPU: equal to the CPU's, and no operation writes over what is read again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from obowlab.methods import bow
from obowlab.methods.kmeans import kmeans

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
SHAPE = (6, 25, 48)
NUM_WORDS = 300


def features(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    local = torch.randn(SHAPE, generator=generator, dtype=torch.float64).relu()
    words = torch.randn(NUM_WORDS, SHAPE[2], generator=generator, dtype=torch.float64).relu()
    return local.to(dtype), words.to(dtype)


@pytest.mark.parametrize("pooling", ["max", "mean"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_soft_targets_equal_the_cpus(dtype: torch.dtype, bound: float, pooling: str) -> None:
    local, words = features(torch.float64)
    delta = torch.tensor(3.0, dtype=torch.float64)
    expected = bow.soft_bow(bow.Distances(local, words), delta=delta, pooling=pooling)
    local, words = (each.to(CUDA) for each in features(dtype))
    for limit in (1, SHAPE[1] * NUM_WORDS * 2, 1 << 28):  # one image at a time, two, all
        distances = bow.Distances(local, words, limit=limit)
        found = bow.soft_bow(distances, delta=delta.to(CUDA, dtype), pooling=pooling)
        error = float((found.cpu().double() - expected).abs().max() / expected.abs().max())
        assert error < bound, (limit, error)


@pytest.mark.parametrize("pooling", ["max", "mean"])
def test_hard_targets_and_nearest_words_equal_the_cpus(pooling: str) -> None:
    local, words = features(torch.float64)
    expected_distance, expected = bow.nearest_words(bow.Distances(local, words))
    distance, nearest = bow.nearest_words(bow.Distances(local.to(CUDA), words.to(CUDA)))
    assert torch.equal(nearest.cpu(), expected)
    torch.testing.assert_close(distance.cpu(), expected_distance, rtol=1e-10, atol=1e-10)
    found = bow.hard_bow(nearest, num_words=NUM_WORDS, pooling=pooling)
    torch.testing.assert_close(found.cpu(), bow.hard_bow(expected, num_words=NUM_WORDS, pooling=pooling), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kept_distances_survive_being_read(dtype: torch.dtype) -> None:
    """The softmax must not be taken in place: a step reads its distances twice."""
    local, words = (each.to(CUDA) for each in features(dtype))
    delta = torch.tensor(3.0, dtype=dtype, device=CUDA)
    distances = bow.Distances(local, words, keep=bow.KEEP_ELEMENTS)
    before = [dist.clone() for _, dist in distances]
    kept_local = local.clone()
    first = bow.soft_bow(distances, delta=delta, pooling="max")
    again = bow.soft_bow(distances, delta=delta, pooling="max")
    assert torch.equal(first, again)
    assert torch.equal(local, kept_local)
    for (_, dist), clone in zip(distances, before, strict=True):
        assert torch.equal(dist, clone)


def test_softmax_into_its_own_input_is_the_softmax() -> None:
    """`torch.softmax(x, out=x)`, whatever the size of a row: from one warp to many blocks."""
    for width in (20, 512, 1024, 8192, 65536):
        values = torch.randn(64, width, generator=torch.Generator().manual_seed(width)).mul_(5).to(CUDA)
        expected = torch.softmax(values, dim=1)
        torch.softmax(values, dim=1, out=values)
        assert torch.equal(values, expected), width


def test_words_of_kmeans_are_the_same_in_every_run_and_near_the_cpus() -> None:
    pytest.importorskip("faiss")  # the CPU's k-means
    points = torch.randn(20_000, 64, generator=torch.Generator().manual_seed(0)).to(CUDA)
    words = kmeans(points, num_words=500, iterations=10, seed=1, report=str)
    assert words.device.type == "cuda"
    assert torch.equal(words, kmeans(points, num_words=500, iterations=10, seed=1, report=str))
    ours, theirs = (torch.cdist(points, each.to(CUDA)).min(1).values.square().mean() for each in (words, _of_cpu(points)))
    assert float(ours) < 1.02 * float(theirs)


def _of_cpu(points: Tensor) -> Tensor:
    return kmeans(points.cpu(), num_words=500, iterations=10, seed=1, report=str)
