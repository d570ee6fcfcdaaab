from __future__ import annotations

import numpy as np
import pytest
import torch

from obowlab.config import Knn
from obowlab.errors import UserError
from obowlab.evaluation.knn import nearest_neighbours, neighbour_votes


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
    monkeypatch.setattr("obowlab.evaluation.knn.MAX_SIMILARITIES", 300 * 9)  # several chunks
    config = Knn(num_neighbours=k, temperature=temperature)
    predicted = neighbour_votes(queries, bank=bank, bank_labels=labels, num_classes=7, config=config)
    expected = [
        slow_vote(q, bank.double().numpy(), labels.numpy(), k=k, temperature=temperature) for q in queries.double().numpy()
    ]
    assert predicted.tolist() == expected
    assert len(set(expected)) > 3


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
