import math

import pytest
import torch

from obowlab.methods import bow
from tests.oracles import balanced_assignment


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_squared_distances() -> None:
    x, words = randn(50, 7), randn(9, 7, seed=1)
    expected = torch.stack([((row - words) ** 2).sum(1) for row in x])
    assert torch.allclose(bow.squared_distances(x, words), expected, atol=1e-5)
    assert bow.squared_distances(x, x).diagonal().min() >= 0


def test_distances_stay_in_float32_under_bf16_autocast() -> None:
    # Neighbours far from the origin: in bfloat16 the cross term swallows their distance.
    words = 10 + 0.1 * randn(16, 64)
    exact = bow.squared_distances(words.double(), words.double())
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = bow.squared_distances(words, words)
            logits = bow.bow_logits(words, words, kappa=1.0)
        assert torch.get_float32_matmul_precision() == "medium", "put back"
    finally:
        torch.set_float32_matmul_precision(before)
    assert found.dtype == logits.dtype == torch.float32
    assert torch.allclose(found.double(), exact, atol=0.02)
    assert torch.allclose(logits.double(), words.double() @ words.double().T, rtol=1e-5)


@pytest.mark.parametrize("kept_elements", [0, 10**9])
@pytest.mark.parametrize("chunk_elements", [1, 300, 10**9])
@pytest.mark.parametrize("pooling", ["max", "mean"])
def test_chunks_do_not_change_the_targets(kept_elements: int, chunk_elements: int, pooling: str) -> None:
    local, words = randn(5, 12, 6), randn(10, 6, seed=1)
    distances = bow.Distances(local, words, kept_elements=kept_elements, chunk_elements=chunk_elements)
    dist = torch.stack([torch.stack([((x - words) ** 2).sum(1) for x in image]) for image in local])
    nearest_dist, nearest = distances.nearest()
    assert torch.equal(nearest, dist.argmin(-1))
    assert torch.allclose(nearest_dist, dist.min(-1).values, atol=1e-5)
    assert float(distances.mean()) == pytest.approx(float(dist.mean()), rel=1e-5)
    codes = torch.softmax(-dist / 0.7, dim=-1)
    expected = codes.amax(1) if pooling == "max" else codes.mean(1)
    expected = expected / expected.sum(1, keepdim=True)
    assert torch.allclose(bow.soft_bow(distances, delta=torch.tensor(0.7), pooling=pooling), expected, atol=1e-6)


def test_hard_bow_marks_or_counts_words() -> None:
    nearest = torch.tensor([[0, 0, 0, 2], [1, 1, 3, 3]])
    assert torch.equal(bow.hard_bow(nearest, num_words=4, pooling="max"), torch.tensor([[0.5, 0, 0.5, 0], [0, 0.5, 0, 0.5]]))
    assert torch.equal(bow.hard_bow(nearest, num_words=4, pooling="mean"), torch.tensor([[0.75, 0, 0.25, 0], [0, 0.5, 0, 0.5]]))


def test_soft_codes_become_hard_as_delta_falls() -> None:
    distances = bow.Distances(randn(3, 8, 4), randn(6, 4, seed=1))
    hard = bow.hard_bow(distances.nearest()[1], num_words=6, pooling="max")
    assert torch.allclose(bow.soft_bow(distances, delta=torch.tensor(1e-6), pooling="max"), hard, atol=1e-6)


def test_crop_border() -> None:
    x = torch.arange(25.0).view(1, 1, 5, 5)
    assert bow.crop_border(x, border=1).flatten().tolist() == [6, 7, 8, 11, 12, 13, 16, 17, 18]
    assert torch.equal(bow.crop_border(x, border=0), x)


def test_queue_vectors() -> None:
    x = torch.arange(32.0).view(1, 2, 4, 4).repeat(4, 1, 1, 1)
    draws = torch.tensor([0.0, 0.49, 0.5, math.nextafter(1.0, 0.0)], dtype=torch.float64)
    assert bow.queue_vectors(x, kind="local", draws_B=draws)[:, 0].tolist() == [0, 7, 8, 15]
    # 3x3 means have their centres at 5, 6, 9 and 10.
    assert bow.queue_vectors(x, kind="local_average", draws_B=draws).tolist() == [[5, 21], [6, 22], [9, 25], [10, 26]]
    assert bow.queue_vectors(x, kind="global_average", draws_B=draws).tolist() == [[7.5, 23.5]] * 4


def test_a_draw_next_to_one_stays_inside() -> None:
    draw = torch.tensor([math.nextafter(1.0, 0.0)], dtype=torch.float64)
    for num_locations in range(1, 200):
        vectors = torch.arange(float(num_locations)).view(1, -1, 1)
        assert int(bow.pick_locations(draw, vectors)) == num_locations - 1


@pytest.mark.parametrize("num_words", [5, 6, 7])
def test_queue_slots_are_those_of_one_by_one_insertion(num_words: int) -> None:
    for start in range(num_words):
        for num_vectors in range(1, 3 * num_words + 2):
            ring, pointer = [-1] * num_words, start
            for vector in range(num_vectors):
                ring[pointer] = vector
                pointer = (pointer + 1) % num_words
            slots = bow.queue_slots(torch.tensor(start), num_vectors=num_vectors, num_words=num_words)
            found = torch.full((num_words,), -1)
            found[slots] = torch.arange(num_vectors)[-len(slots) :]
            assert found.tolist() == ring


def test_word_sums() -> None:
    counts, sums = bow.word_sums(torch.tensor([[1.0, 2], [3, 4], [5, 6]]), torch.tensor([2, 0, 2]), num_words=4)
    assert counts.tolist() == [1, 0, 2, 0]
    assert sums.tolist() == [[3, 4], [0, 0], [6, 8], [0, 0]]


@pytest.mark.parametrize("kept_elements", [0, 10**9])
def test_sinkhorn_is_the_plain_scaling(kept_elements: int) -> None:
    local, words = randn(4, 6, 3), randn(8, 3, seed=1)
    distances = bow.Distances(local, words, kept_elements=kept_elements, chunk_elements=100)
    epsilon = 0.4
    expected = balanced_assignment(bow.squared_distances(local.flatten(0, 1), words), epsilon=epsilon, iterations=3)
    potential = bow.sinkhorn(distances, epsilon=torch.tensor(epsilon), iterations=3, gather=lambda x: x)
    codes = torch.cat([bow.balanced_log_codes(d, potential, epsilon=torch.tensor(epsilon)).exp() for _, d in distances.chunks()])
    assert torch.allclose(codes.flatten(0, 1).double(), expected, atol=1e-5)


def test_sinkhorn_balances_words_that_plain_scaling_cannot_even_represent() -> None:
    # exp(-D / epsilon) of the far words underflows to 0 in float32 for every location.
    local, words = randn(4, 32, 3), torch.cat([randn(4, 3, seed=1), 100 + randn(4, 3, seed=2)])
    distances, epsilon = bow.Distances(local, words), torch.tensor(5.0)
    potential = bow.sinkhorn(distances, epsilon=epsilon, iterations=200, gather=lambda x: x)
    codes = torch.cat([bow.balanced_log_codes(d, potential, epsilon=epsilon).exp() for _, d in distances.chunks()])
    assert torch.allclose(codes.sum(-1), torch.ones(4, 32), atol=1e-5)
    assert torch.allclose(codes.mean((0, 1)), torch.full((8,), 1 / 8), rtol=0.02)


def test_cross_entropy_asks_every_view_for_the_whole_bag() -> None:
    logits = randn(3, 2, 5)
    target = torch.softmax(randn(3, 5, seed=1), dim=-1)
    expected = sum(torch.nn.functional.cross_entropy(logits[b, v], target[b]) for b in range(3) for v in range(2)) / 6
    assert float(bow.cross_entropy(torch.log_softmax(logits, -1), target)) == pytest.approx(float(expected), rel=1e-6)


def test_perplexity_takes_zero_log_zero_as_zero() -> None:
    rows = torch.tensor([[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0.25, 0.25, 0.25, 0.25]])
    assert bow.perplexity(rows).tolist() == pytest.approx([1, 2, 4])
    assert bow.entropy(rows)[0] == 0


def test_next_msd() -> None:
    assert float(bow.next_msd(torch.tensor(0.5), torch.tensor(10.0), momentum=0.99)) == pytest.approx(0.595)
