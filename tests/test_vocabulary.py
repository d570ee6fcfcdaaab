import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from obowlab.config import Obow
from obowlab.methods import Comm, OneProcess, bow
from obowlab.methods.vocabulary import VOCABULARIES, Vocabulary, level_metrics

NUM_CHANNELS = 4


def build(seed: int = 0, **options: Any) -> Vocabulary:
    torch.manual_seed(seed)
    method = Obow(**{"num_words": 10, "border": 0, "queue_vector": "local", **options})
    return VOCABULARIES[method.vocabulary](method, num_channels=NUM_CHANNELS)


def maps(num_images: int, *, seed: int, size: int = 4) -> Tensor:
    return torch.randn(num_images, NUM_CHANNELS, size, size, generator=torch.Generator().manual_seed(seed)).clamp(min=0)


def uniforms(num_images: int, *, seed: int) -> Tensor:
    return torch.rand(num_images, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assign_and_update(vocabulary: Vocabulary, map_BCHW: Tensor, *, uniforms_B: Tensor, step: int, comm: Comm) -> Any:
    assignment = vocabulary.assign(map_BCHW, comm=comm)
    vocabulary.update(assignment, uniforms_B=uniforms_B, step=step, comm=comm)
    return assignment


def take(vocabulary: Vocabulary, step: int, num_images: int = 4) -> Any:
    """Let a vocabulary assign the images of a step and move on."""
    images, numbers = maps(num_images, seed=step), uniforms(num_images, seed=step)
    return assign_and_update(vocabulary, images, uniforms_B=numbers, step=step, comm=OneProcess())


@pytest.mark.parametrize("vocabulary", sorted(VOCABULARIES))
@pytest.mark.parametrize("codes", ["soft", "hard"])
def test_assigning_changes_nothing(vocabulary: str, codes: str) -> None:
    words = build(vocabulary=vocabulary, codes=codes)
    take(words, 0)
    before = {name: value.clone() for name, value in words.state_dict().items()}
    x = maps(4, seed=1)
    copy = x.clone()
    first, second = (words.assign(x, comm=OneProcess()) for _ in range(2))
    assert torch.equal(x, copy)
    assert all(torch.equal(value, before[name]) for name, value in words.state_dict().items())
    assert torch.equal(first.targets, second.targets)
    assert torch.equal(first.msd, second.msd)
    words.update(first, uniforms_B=uniforms(4, seed=1), step=1, comm=OneProcess())
    assert torch.equal(words.msd, first.msd)
    assert not torch.equal(words.words, before["words"])


@pytest.mark.parametrize("num_words", [5, 8, 10])
@pytest.mark.parametrize("batch_size", [3, 8, 13, 20])
def test_the_queue_holds_the_newest_vectors_in_ring_order(num_words: int, batch_size: int) -> None:
    queue = build(num_words=num_words)
    ring, ages, pointer = list(queue.words.clone()), [0] * num_words, 0
    for step in range(7):
        take(queue, step, batch_size)
        for vector in bow.queue_vectors(maps(batch_size, seed=step), kind="local", uniforms_B=uniforms(batch_size, seed=step)):
            ring[pointer], ages[pointer] = vector, step
            pointer = (pointer + 1) % num_words
    assert torch.equal(queue.words, torch.stack(ring))
    assert int(queue.pointer) == pointer
    assert float(queue.mean_age(step=7)) == pytest.approx(7 - sum(ages) / num_words)


def test_codes_use_the_old_words_and_the_new_msd() -> None:
    queue = build(delta_base=1.0)
    old_words, local = queue.words.clone(), maps(4, seed=0).flatten(2).transpose(1, 2)
    assignment = take(queue, 0)
    nearest = float(bow.nearest_words(bow.Distances(local, old_words))[0].mean())
    assert float(queue.msd) == pytest.approx(0.99 * 0.5 + 0.01 * nearest)
    assert float(assignment.mean_distance) == pytest.approx(nearest)
    assert torch.allclose(assignment.targets, bow.soft_bow(bow.Distances(local, old_words), delta=queue.msd, pooling="max"))
    assert not torch.equal(queue.words, old_words)


def test_msd_can_start_at_the_first_batch() -> None:
    queue = build(msd_start="first_batch")
    first = take(queue, 0).mean_distance
    assert float(queue.msd) == float(first)
    second = take(queue, 1).mean_distance
    assert float(queue.msd) == pytest.approx(float(0.99 * first + 0.01 * second))


def test_words_used_is_the_share_of_nearest_words() -> None:
    queue = build()
    nearest = bow.nearest_words(bow.Distances(maps(4, seed=0).flatten(2).transpose(1, 2), queue.words))[1]
    assignment = queue.assign(maps(4, seed=0), comm=OneProcess())
    assert torch.equal(assignment.nearest, nearest)
    found = level_metrics("conv5", assignment, torch.zeros(1, 10), comm=OneProcess())
    assert float(found["words_used_conv5"]) == pytest.approx(100 * len(nearest.unique()) / 10)


def test_the_border_counts_for_targets_and_queue() -> None:
    inner, outer = build(border=1, queue_vector="global_average"), build(border=0, queue_vector="global_average")
    x, u = maps(4, seed=0, size=6), uniforms(4, seed=0)
    with_border = assign_and_update(inner, x, uniforms_B=u, step=0, comm=OneProcess())
    without = assign_and_update(outer, x[..., 1:-1, 1:-1], uniforms_B=u, step=0, comm=OneProcess())
    assert torch.equal(with_border.targets, without.targets)
    assert torch.equal(inner.words, outer.words)


def test_replacing_kmeans_follows_the_equations_and_replaces_the_longest_dead() -> None:
    patience, gamma, num_images = 3, 0.9, 2
    kmeans = build(vocabulary="kmeans_replace", kmeans_patience=patience, kmeans_momentum=gamma)
    words = [w.double() for w in kmeans.words]
    count, total = [1.0] * 10, [w.clone() for w in words]
    last_used = [-(patience + 1)] * 10
    replaced = 0
    for step in range(40):
        x, u = maps(num_images, seed=step), uniforms(num_images, seed=step)
        if step > 10:  # a drift leaves words behind
            x = x + 0.5 * (step - 10)
        assign_and_update(kmeans, x, uniforms_B=u, step=step, comm=OneProcess())
        features = [x[b, :, i, j].double() for b in range(num_images) for i in range(4) for j in range(4)]
        assigned = [min(range(10), key=lambda k, f=f: float(((f - words[k]) ** 2).sum())) for f in features]
        for k in range(10):
            mine = [f for f, a in zip(features, assigned, strict=True) if a == k]
            count[k] = gamma * count[k] + (1 - gamma) * len(mine)
            total[k] = gamma * total[k] + (1 - gamma) * (sum(mine) if mine else torch.zeros(NUM_CHANNELS))
            if mine:
                words[k], last_used[k] = total[k] / count[k], step
        dead = sorted((k for k in range(10) if step - last_used[k] > patience), key=lambda k: last_used[k])
        for k, b in zip(dead, range(num_images), strict=False):
            place = int(float(u[b]) * 16)
            words[k] = features[b * 16 + place]
            count[k], total[k], last_used[k] = 1.0, words[k].clone(), step
            replaced += 1
        assert torch.allclose(kmeans.words.double(), torch.stack(words), rtol=1e-4, atol=1e-5), step
    assert kmeans.last_used.tolist() == last_used
    assert replaced > 12, "words died after the start as well"


def test_the_noise_of_the_start_is_filled_from_the_batch_at_once() -> None:
    for name in ("kmeans_replace", "kmeans_sinkhorn"):
        kmeans = build(vocabulary=name)
        for step in range(5):
            take(kmeans, step)
        assert (kmeans.last_used >= 0).all(), name


def test_sinkhorn_words_are_the_balanced_means() -> None:
    kmeans = build(vocabulary="kmeans_sinkhorn", sinkhorn_epsilon=0.1, sinkhorn_iterations=30, kmeans_momentum=0.0)
    for step in range(4):
        take(kmeans, step)
    words = kmeans.words.clone()
    assignment = take(kmeans, 4)
    local = maps(4, seed=4).flatten(2).transpose(1, 2)
    dist = bow.squared_distances(local.flatten(0, 1), words)
    epsilon = 0.1 * dist.mean()
    potential = bow.sinkhorn(bow.Distances(local, words), epsilon=epsilon, iterations=30, all_gather=lambda x: x)
    codes = bow.balanced_codes(dist, potential, epsilon=epsilon)
    assert torch.allclose(codes.sum(0), torch.full((10,), 64 / 10), rtol=0.02), "every word has its share"
    assert torch.allclose(kmeans.words, (codes.T @ local.flatten(0, 1)) / codes.sum(0)[:, None], atol=1e-4)
    pooled = codes.view(4, 16, 10).amax(1)
    assert torch.allclose(assignment.targets, pooled / pooled.sum(1, keepdim=True), atol=1e-5)


@pytest.mark.parametrize("vocabulary", sorted(VOCABULARIES))
@pytest.mark.parametrize("codes", ["soft", "hard"])
@pytest.mark.parametrize("pooling", ["max", "mean"])
def test_targets_are_distributions(vocabulary: str, codes: str, pooling: str) -> None:
    words = build(vocabulary=vocabulary, codes=codes, pooling=pooling)
    for step in range(3):
        targets = take(words, step).targets
        assert targets.shape == (4, 10)
        assert (targets >= 0).all()
        assert torch.allclose(targets.sum(1), torch.ones(4))


class TwoThreads:
    """A Comm between two threads, to see what two processes would do."""

    world_size = 2

    def __init__(self, rank: int, shared: list[Any], barrier: threading.Barrier):
        self.rank, self.shared, self.barrier = rank, shared, barrier

    def exchange(self, x: Tensor, combine: Callable[[list[Tensor]], Tensor]) -> Tensor:
        self.shared[self.rank] = x.clone()
        self.barrier.wait(timeout=240)
        result = combine(list(self.shared))
        self.barrier.wait(timeout=240)
        return result

    def all_gather(self, x: Tensor) -> Tensor:
        return self.exchange(x, torch.cat)

    def all_reduce_mean(self, x: Tensor) -> Tensor:
        return self.exchange(x, lambda both: (both[0] + both[1]) / 2)


@pytest.mark.parametrize("codes", ["soft", "hard"])
@pytest.mark.parametrize("vocabulary", sorted(VOCABULARIES))
def test_two_processes_with_half_the_batch_each_equal_one(vocabulary: str, codes: str) -> None:
    options = {"vocabulary": vocabulary, "codes": codes, "kmeans_patience": 2, "delta_base": 1.0}
    whole = build(**options)
    halves = [build(**options) for _ in range(2)]
    shared, barrier, targets = [None, None], threading.Barrier(2), [[], []]

    def work(rank: int) -> None:
        comm = TwoThreads(rank, shared, barrier)
        mine = slice(2 * rank, 2 * rank + 2)
        for step in range(6):
            x, u = maps(4, seed=step)[mine], uniforms(4, seed=step)[mine]
            targets[rank].append(assign_and_update(halves[rank], x, uniforms_B=u, step=step, comm=comm).targets)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for step in range(6):
        expected = take(whole, step).targets
        if step == 5:
            last = expected
    for thread in threads:
        thread.join(timeout=240)
    assert torch.allclose(torch.cat([targets[0][5], targets[1][5]]), last, atol=1e-4)
    for half in halves:
        for name, value in whole.state_dict().items():
            assert torch.allclose(half.state_dict()[name].double(), value.double(), rtol=1e-4, atol=1e-4), name
