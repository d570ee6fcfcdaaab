from __future__ import annotations

import numpy as np
import pytest
import torch

from obowlab.config import Knn
from obowlab.errors import UserError
from obowlab.evaluation.knn import BLOCKS, Blocks, largest, nearest_neighbours, neighbour_votes, neighbours
from tests.largest import LargestFloats


def random_case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(7, 12, generator=generator)
    labels = torch.randint(0, 7, (300,), generator=generator)
    bank = centres[labels] + 1.5 * torch.randn(300, 12, generator=generator)
    return bank, labels, centres.repeat(20, 1) + 1.5 * torch.randn(140, 12, generator=generator)


def slow_vote(query: np.ndarray, bank: np.ndarray, labels: np.ndarray, *, k: int, temperature: float) -> int:
    cosines = [float(query @ row / np.linalg.norm(query) / np.linalg.norm(row)) for row in bank]
    votes = np.zeros(7)
    for position in sorted(range(len(bank)), key=lambda i: -cosines[i])[:k]:
        votes[labels[position]] += np.exp(cosines[position] / temperature)
    return int(votes.argmax())


@pytest.mark.parametrize(("k", "temperature"), [(20, 0.07), (5, 1.0), (1, 0.07)])
def test_votes_equal_the_slow_way(monkeypatch: pytest.MonkeyPatch, k: int, temperature: float) -> None:
    bank, labels, queries = random_case()
    monkeypatch.setitem(BLOCKS, "cpu", Blocks(queries=9, images=37))  # the last of both are smaller
    config = Knn(num_neighbours=k, temperature=temperature)
    predicted = neighbour_votes(queries, bank=bank, bank_labels=labels, num_classes=7, config=config)
    expected = [
        slow_vote(q, bank.double().numpy(), labels.numpy(), k=k, temperature=temperature) for q in queries.double().numpy()
    ]
    assert predicted.tolist() == expected
    assert len(set(expected)) > 3


def in_order(similarity: list[float], *, count: int) -> list[int]:
    """The slow way: of equal cosines the first image of the bank."""
    return sorted(range(len(similarity)), key=lambda image: (-similarity[image], image))[:count]


def signs(num_rows: int, *, seed: int) -> torch.Tensor:
    """Rows of 4 signs: lengths and cosines are exact in float32, and most are equal to others."""
    return torch.randint(0, 2, (num_rows, 4), generator=torch.Generator().manual_seed(seed)).float() * 2 - 1


@pytest.mark.parametrize("count", [1, 7, 60, 150])
@pytest.mark.parametrize("blocks", [Blocks(5, 11), Blocks(1, 1), Blocks(64, 149), Blocks(64, 150), None], ids=str)
def test_of_equal_cosines_the_earlier_image_is_nearer_whatever_the_blocks(count: int, blocks: Blocks | None) -> None:
    queries, bank = signs(13, seed=0), signs(150, seed=1)
    cosines, positions = neighbours(queries, bank=bank, num_neighbours=count, blocks=blocks)
    exact = (queries @ bank.T / 4).tolist()
    assert positions.tolist() == [in_order(row, count=count) for row in exact]
    assert torch.equal(cosines, torch.tensor(exact).gather(1, positions))


def test_blocks_change_no_neighbour() -> None:
    bank, _, queries = random_case()
    _, whole = neighbours(queries, bank=bank, num_neighbours=20, blocks=Blocks(len(queries), len(bank)))
    _, parts = neighbours(queries, bank=bank, num_neighbours=20, blocks=Blocks(9, 37))
    assert torch.equal(whole, parts)


def test_of_equal_votes_the_lower_class_wins() -> None:
    bank = torch.eye(4)
    config = Knn(num_neighbours=3)
    votes = neighbour_votes(torch.ones(1, 4), bank=bank, bank_labels=torch.tensor([2, 1, 0, 0]), num_classes=3, config=config)
    assert votes.tolist() == [0]  # one vote for each class; the fourth image is as near as the third, and later


@pytest.mark.parametrize("count", [1, 3, 6])
def test_the_largest_entries(count: int) -> None:
    rows = [[1.0, 3.0, 3.0, 2.0, 3.0, 0.0], [0.0] * 6, [5.0, 4.0, 3.0, 2.0, 1.0, 0.0]]
    values, columns = largest(torch.tensor(rows), count=count)
    assert columns.tolist() == [in_order(row, count=count) for row in rows]
    assert values.tolist() == [sorted(row, reverse=True)[:count] for row in rows]


def test_the_bank_is_not_copied() -> None:
    bank = torch.randn(2000, 8, generator=torch.Generator().manual_seed(0))
    queries = bank[:500]
    with LargestFloats() as seen:
        neighbours(queries, bank=bank, num_neighbours=3, blocks=Blocks(10, 50))
    assert seen.largest == max(10 * 50, 50 * 8, 500 * 3)  # similarities, a block, the result


def test_a_tiny_temperature_does_not_overflow() -> None:
    bank, labels, queries = random_case()
    cold = neighbour_votes(queries, bank=bank, bank_labels=labels, num_classes=7, config=Knn(num_neighbours=20, temperature=1e-4))
    nearest = neighbour_votes(queries, bank=bank, bank_labels=labels, num_classes=7, config=Knn(num_neighbours=1))
    assert torch.equal(cold, nearest)


def test_measures_top1() -> None:
    bank, labels, _ = random_case()
    (top1,) = nearest_neighbours(bank, labels=labels, bank=bank, bank_labels=labels, num_classes=7, config=Knn(num_neighbours=1))
    assert (top1.name, top1.value, top1.count) == ("knn_top1", 100.0, 300)
    assert 0 < top1.interval < 2


def test_more_neighbours_than_images() -> None:
    bank, labels, queries = random_case()
    with pytest.raises(UserError, match="num_neighbours = 20 exceeds the 10 training images"):
        neighbour_votes(queries, bank=bank[:10], bank_labels=labels[:10], num_classes=7, config=Knn())
