"""Laws of the mathematics of bags of visual words, on drawn examples; the same examples every time."""

from __future__ import annotations

import math
from collections import deque

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from obowlab.methods import bow

drawn = settings(derandomize=True, deadline=None, max_examples=40, database=None)
seeds = st.integers(0, 2**32)


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def distributions(rows: int, num_words: int, *, seed: int) -> Tensor:
    return torch.softmax(3 * randn(rows, num_words, seed=seed), dim=-1)


@drawn
@given(num_words=st.integers(1, 12), batches=st.lists(st.integers(1, 30), min_size=1, max_size=6))
def test_the_ring_holds_what_a_deque_holds(num_words: int, batches: list[int]) -> None:
    newest: deque[int] = deque([-1] * num_words, maxlen=num_words)
    ring, pointer, number = torch.full((num_words,), -1), torch.tensor(0), 0
    for size in batches:
        vectors = torch.arange(number, number + size)
        slots = bow.queue_slots(pointer, num_vectors=size, num_words=num_words)
        assert len(set(slots.tolist())) == len(slots), "no slot is written twice"
        ring[slots] = vectors[-len(slots) :]
        pointer = (pointer + size) % num_words
        newest.extend(vectors.tolist())
        number += size
    assert ring.roll(-int(pointer)).tolist() == list(newest), "from the pointer on, the oldest first"


@drawn
@given(seed=seeds, num_words=st.integers(1, 9), delta=st.floats(1e-3, 1e3))
def test_soft_codes_are_distributions_that_prefer_the_nearest_word(seed: int, num_words: int, delta: float) -> None:
    local, words = randn(3, 4, 5, seed=seed), randn(num_words, 5, seed=seed + 1)
    dist = bow.squared_distances(local.flatten(0, 1), words).view(3, 4, num_words)
    codes = bow.soft_assign(dist, delta=torch.tensor(delta, dtype=torch.float64))
    assert (codes >= 0).all()
    torch.testing.assert_close(codes.sum(-1), torch.ones(3, 4, dtype=torch.float64))
    nearest = dist.argmin(-1, keepdim=True)
    assert (codes.gather(-1, nearest) >= codes.amax(-1, keepdim=True) - 1e-12).all()
    order = torch.randperm(num_words, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(bow.soft_assign(dist[..., order], delta=torch.tensor(delta)), codes[..., order])
    torch.testing.assert_close(bow.soft_assign(dist + 7.0, delta=torch.tensor(delta)), codes, rtol=1e-6, atol=1e-6)


@drawn
@given(seed=seeds, images=st.integers(1, 6), limit=st.integers(1, 300), pooling=st.sampled_from(["max", "mean"]))
def test_no_result_depends_on_the_size_of_chunks(seed: int, images: int, limit: int, pooling: str) -> None:
    local, words = randn(images, 7, 3, seed=seed), randn(6, 3, seed=seed + 1)
    delta = torch.tensor(0.5, dtype=torch.float64)
    chunked, whole = bow.nearest_words(bow.Distances(local, words, limit=limit)), bow.nearest_words(bow.Distances(local, words))
    torch.testing.assert_close(chunked[0], whole[0])
    assert torch.equal(chunked[1], whole[1])
    targets = bow.soft_bow(bow.Distances(local, words), delta=delta, pooling=pooling)
    torch.testing.assert_close(bow.soft_bow(bow.Distances(local, words, limit=limit), delta=delta, pooling=pooling), targets)
    torch.testing.assert_close(targets.sum(1), torch.ones(images, dtype=torch.float64))
    potentials = [
        bow.sinkhorn(bow.Distances(local, words, limit=each), epsilon=delta, iterations=2, all_gather=lambda x: x)
        for each in (limit, None)
    ]
    torch.testing.assert_close(*potentials)


@drawn
@given(seed=seeds, shift=st.floats(-5, 5))
def test_distances_are_those_of_the_definition(seed: int, shift: float) -> None:
    x, words = randn(6, 4, seed=seed), randn(5, 4, seed=seed + 1)
    expected = (x[:, None] - words[None]).square().sum(-1)
    torch.testing.assert_close(bow.squared_distances(x, words), expected)
    torch.testing.assert_close(bow.squared_distances(x + shift, words + shift), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(bow.mean_squared_distance(x[None], words), expected.mean())


@drawn
@given(seed=seeds, locations=st.integers(1, 12), pooling=st.sampled_from(["max", "mean"]))
def test_hard_targets_are_those_of_one_hot_codes(seed: int, locations: int, pooling: str) -> None:
    nearest = torch.randint(5, (3, locations), generator=torch.Generator().manual_seed(seed))
    codes = torch.nn.functional.one_hot(nearest, 5).double()
    expected = bow.bow_target(bow.pool(codes, pooling=pooling))
    torch.testing.assert_close(bow.hard_bow(nearest, num_words=5, pooling=pooling, dtype=torch.float64), expected)
    counts, sums = bow.word_sums(torch.ones(3 * locations, 2), nearest.flatten(), num_words=5)
    assert counts.tolist() == nearest.flatten().bincount(minlength=5).tolist()
    assert torch.equal(sums, counts[:, None].expand(-1, 2))


@drawn
@given(seed=seeds, pairs=st.integers(1, 3), views=st.integers(1, 3))
def test_mixed_targets_are_between_the_two_images(seed: int, pairs: int, views: int) -> None:
    target = distributions(2 * pairs, 5, seed=seed)
    share = torch.rand(2 * pairs, views, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mixed = bow.mixed_targets(target, share)
    torch.testing.assert_close(mixed.sum(-1), torch.ones_like(share))
    torch.testing.assert_close(bow.mixed_targets(target, torch.ones_like(share)), target[:, None].expand(-1, views, -1))
    torch.testing.assert_close(
        bow.mixed_targets(target, torch.zeros_like(share)), bow.neighbours(target)[:, None].expand(-1, views, -1)
    )
    assert torch.equal(bow.neighbours(bow.neighbours(target)), target)
    swapped = bow.mixed_targets(bow.neighbours(target), 1.0 - share)
    torch.testing.assert_close(swapped, mixed)


@drawn
@given(seed=seeds, views=st.integers(1, 3), mixed=st.booleans())
def test_no_prediction_has_a_smaller_loss_than_the_target_itself(seed: int, views: int, mixed: bool) -> None:
    target = distributions(4, 6, seed=seed)
    share = torch.rand(4 * views, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    cutmix_lambda = {"crops": share} if mixed else {}
    prediction = distributions(4 * views, 6, seed=seed + 1).log()
    losses, entropies = bow.prediction_losses({"crops": prediction}, target, cutmix_lambda=cutmix_lambda)
    assert float(losses["crops"]) >= float(entropies["crops"]) - 1e-12
    best = bow.mixed_targets(target, share.view(4, views)) if mixed else target[:, None].expand(-1, views, -1)
    least, _ = bow.prediction_losses({"crops": best.flatten(0, 1).log()}, target, cutmix_lambda=cutmix_lambda)
    torch.testing.assert_close(least["crops"], entropies["crops"])


@drawn
@given(seed=seeds, num_words=st.integers(1, 20))
def test_entropy_is_between_zero_and_the_logarithm(seed: int, num_words: int) -> None:
    probability = distributions(3, num_words, seed=seed)
    entropy = bow.entropy(probability)
    assert (entropy >= -1e-12).all()
    assert (entropy <= math.log(num_words) + 1e-12).all()
    torch.testing.assert_close(bow.perplexity(probability), entropy.exp())
    torch.testing.assert_close(bow.entropy_of_logs(probability.log()), entropy)


@drawn
@given(seed=seeds, scale=st.floats(1e-3, 1e3))
def test_unit_rows_are_the_librarys_and_so_is_their_gradient(seed: int, scale: float) -> None:
    x = (scale * randn(4, 3, seed=seed)).requires_grad_(True)
    weight = randn(4, 3, seed=seed + 1)
    ours, theirs = bow.unit_rows(x), torch.nn.functional.normalize(x, dim=1)
    torch.testing.assert_close(ours, theirs)
    (grad,) = torch.autograd.grad((ours * weight).sum(), x)
    torch.testing.assert_close(grad, torch.autograd.grad((theirs * weight).sum(), x)[0])


@drawn
@given(seed=seeds, height=st.integers(3, 6), width=st.integers(3, 6))
def test_what_an_image_offers_to_the_queue_is_one_of_its_vectors(seed: int, height: int, width: int) -> None:
    maps = randn(3, 2, height, width, seed=seed)
    uniforms = torch.rand(3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for kind, choices in (
        ("local", maps.flatten(2)),
        ("local_average", torch.nn.functional.avg_pool2d(maps, 3, stride=1).flatten(2)),
        ("global_average", maps.mean((2, 3))[..., None]),
    ):
        vectors = bow.queue_vectors(maps, kind=kind, uniforms_B=uniforms)
        place = (uniforms * choices.shape[2]).floor().long()
        torch.testing.assert_close(vectors, torch.stack([choices[image, :, place[image]] for image in range(3)]))
