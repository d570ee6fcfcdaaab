from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from obowlab.config import Linear
from obowlab.errors import UserError
from obowlab.evaluation.evaluators import _without_later
from obowlab.evaluation.linear import PROBE_LANE, linear_probe, probe_learning_rate, train_probe
from obowlab.randomness import Stream, epoch_order, uniforms
from tests.largest import LargestFloats


def clusters(
    num_images: int, *, num_classes: int, num_features: int, seed: int, spread: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Non-negative features, as pooled features are, around one centre per class."""
    centres = torch.randn(num_classes, num_features, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, num_classes, (num_images,), generator=generator)
    return (centres[labels] + spread * torch.randn(num_images, num_features, generator=generator)).relu() * 0.5, labels


@pytest.mark.parametrize("num_views", [1, 2, 3])
@pytest.mark.parametrize("schedule", ["steps", "cosine"])
def test_training_equals_autograd_and_torch_sgd(schedule: str, num_views: int) -> None:
    centre, labels = clusters(70, num_classes=5, num_features=6, seed=0)
    views = tuple(centre + 0.1 * number for number in range(num_views))
    config = Linear(epochs=4, batch_size=16, learning_rate=0.5, decay_every=2, weight_decay=1e-2, schedule=schedule)
    weight, bias = train_probe(views, labels=labels, num_classes=5, config=config, seed=3)

    layer = torch.nn.Linear(6, 5)
    torch.nn.init.zeros_(layer.bias)
    layer.weight.data.normal_(0.0, 0.01, generator=torch.Generator().manual_seed(3))
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0, momentum=0.9, weight_decay=1e-2)
    for step in range(4 * 4):  # 70 images in batches of 16: the last 6 of an epoch are dropped
        epoch, batch = divmod(step, 4)
        positions = epoch_order(70, seed=3, epoch=epoch)[16 * batch : 16 * batch + 16]
        draws = uniforms(seed=3, epoch=epoch, indices=positions, stream=Stream.EPISODES, count=1, lane=PROBE_LANE)[:, 0]
        x = torch.stack([views[int(draw * num_views)][i] for i, draw in zip(positions, draws, strict=True)])
        optimizer.param_groups[0]["lr"] = (
            0.5 * 0.1 ** (epoch // 2) if schedule == "steps" else 0.25 * (1 + np.cos(np.pi * step / 16))
        )
        optimizer.zero_grad()
        F.cross_entropy(layer(x), labels[torch.from_numpy(positions)]).backward()
        optimizer.step()
    torch.testing.assert_close(weight, layer.weight.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(bias, layer.bias.detach(), rtol=1e-5, atol=1e-6)


def test_the_features_are_not_copied() -> None:
    centre, labels = clusters(3000, num_classes=4, num_features=8, seed=0)
    views = (centre, centre + 0.1)
    with LargestFloats() as seen:
        train_probe(views, labels=labels, num_classes=4, config=Linear(epochs=1, batch_size=50), seed=0)
    assert seen.largest == 50 * 16  # one batch, its rows filled up


def test_learning_rates_are_the_papers() -> None:
    rates = [probe_learning_rate(100 * epoch + 99, config=Linear(), steps_per_epoch=100) for epoch in range(50)]
    assert rates == pytest.approx([10.0] * 15 + [1.0] * 15 + [0.1] * 15 + [0.01] * 5)


def test_the_authors_cosine_stands_still_within_an_epoch() -> None:
    cosine = Linear(epochs=100, schedule="cosine")
    by_epoch = cosine.model_copy(update={"cosine_per": "epoch"})
    expected = {0: 10.0, 1: 9.997533, 25: 8.535534, 50: 5.0, 75: 1.464466, 99: 0.00246720}
    for epoch, rate in expected.items():
        for step in (1251 * epoch, 1251 * epoch + 1250):
            found = probe_learning_rate(step, config=by_epoch, steps_per_epoch=1251)
            assert found == pytest.approx(rate, abs=5e-7 if rate > 1 else 5e-9)
        assert probe_learning_rate(1251 * epoch, config=cosine, steps_per_epoch=1251) == pytest.approx(rate, abs=5e-7)
    assert probe_learning_rate(1250, config=cosine, steps_per_epoch=1251) < 10.0


def test_a_later_setting_at_its_default_leaves_the_hash_of_earlier_results() -> None:
    assert "cosine_per" not in _without_later(Linear(), "cosine_per")
    assert _without_later(Linear(), "cosine_per").keys() | {"cosine_per"} == Linear.model_fields.keys()
    assert _without_later(Linear(cosine_per="epoch"), "cosine_per")["cosine_per"] == "epoch"


def measure(seed: int, **changes: object) -> float:
    train, labels = clusters(600, num_classes=6, num_features=32, seed=1)
    test, test_labels = clusters(300, num_classes=6, num_features=32, seed=2)
    config = Linear().model_copy(update={"batch_size": 64, **changes})
    (top1,) = linear_probe(
        (train, train), labels=labels, test_features=test, test_labels=test_labels, num_classes=6, config=config, seed=seed
    )
    assert (top1.name, top1.count) == ("linear_top1", 300)
    return top1.value


def test_learns_repeats_and_depends_on_the_seed() -> None:
    assert measure(0) > 85
    assert measure(0) == measure(0)
    train, labels = clusters(200, num_classes=6, num_features=8, seed=1)
    first, again, other = (
        train_probe((train, train), labels=labels, num_classes=6, config=Linear(epochs=2), seed=s)[0] for s in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_both_views_are_trained_on() -> None:
    # The centre crops say nothing; only mirror images carry the class.
    train, labels = clusters(400, num_classes=4, num_features=16, seed=1, spread=0.3)
    test, test_labels = clusters(200, num_classes=4, num_features=16, seed=2, spread=0.3)
    config = Linear(epochs=10, batch_size=50, learning_rate=1.0)

    def top1(views: tuple[torch.Tensor, ...]) -> float:
        return linear_probe(
            views, labels=labels, test_features=test, test_labels=test_labels, num_classes=4, config=config, seed=0
        )[0].value

    assert top1((torch.zeros_like(train), train)) > 90
    assert top1((torch.zeros_like(train),)) < 50


def test_fewer_images_than_a_batch() -> None:
    train, labels = clusters(20, num_classes=3, num_features=8, seed=1)
    weight, _ = train_probe((train,), labels=labels, num_classes=3, config=Linear(epochs=3), seed=0)
    assert weight.std() > 0.05  # it was trained: the start is N(0, 0.01)


def test_divergence_is_said() -> None:
    train = torch.full((40, 4), 1e30)
    labels = torch.arange(40) % 2
    with pytest.raises(UserError, match=r"evaluation\.linear\.learning_rate"):
        train_probe((train,), labels=labels, num_classes=2, config=Linear(epochs=2, batch_size=8, learning_rate=1e30), seed=0)
