"""SwAV against versions with loops, its queue and its frozen prototypes, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from obowlab.config import Backbone, Optimizer, Swav, Views
from obowlab.errors import UserError
from obowlab.methods import Batch, OneProcess, SwAV
from obowlab.methods.swav import balanced_codes, prediction_losses
from obowlab.training.optimizers import build_optimizer

SMALL = Backbone(stem="small", width=4)
NUM_IMAGES, HIDDEN, SIZE, PROTOTYPES = 4, 8, 6, 5
SCORES = [[0.9, 0.1, -0.2], [0.3, 0.5, 0.0]]


def build(**options: Any) -> SwAV:
    settings = {"hidden_size": HIDDEN, "projection_size": SIZE, "num_prototypes": PROTOTYPES, **options}
    return SwAV(Swav(**settings), backbone=SMALL, total_steps=10, seed=0, num_classes=3, comm=OneProcess()).double().train()


def draw_batch(step: int = 0, *, crops: int = 2, small_crops: int = 3, num_images: int = NUM_IMAGES) -> Batch:
    generator = torch.Generator().manual_seed(step)
    sizes = {"crops": (crops, 16), "small_crops": (small_crops, 12)}
    return Batch(
        original=torch.zeros(num_images, 3, 1, 1),
        views={
            kind: torch.randn(num_images * count, 3, size, size, generator=generator, dtype=torch.float64)
            for kind, (count, size) in sizes.items()
            if count
        },
        uniforms=torch.zeros(num_images, 0),
        step=step,
        labels=torch.arange(num_images) % 3,
    )


def slow_codes(scores: Any, *, epsilon: float, iterations: int) -> np.ndarray:
    """Return the codes [N, K] of rows, by alternate sums, none of them in the log domain."""
    q = np.exp(np.asarray(scores, dtype=np.float64) / epsilon)
    q = q / q.sum()
    num_rows, num_prototypes = q.shape
    for _ in range(iterations):
        for k in range(num_prototypes):
            q[:, k] = q[:, k] / q[:, k].sum() / num_prototypes
        for n in range(num_rows):
            q[n] = q[n] / q[n].sum() / num_rows
    return q * num_rows


def codes(scores: Any, *, epsilon: float = 0.05, iterations: int = 3) -> np.ndarray:
    rows = torch.as_tensor(scores)[:, None]
    return balanced_codes(rows, epsilon=epsilon, iterations=iterations, all_gather=OneProcess().all_gather)[:, 0].numpy()


@pytest.mark.parametrize(
    ("epsilon", "expected"),
    [
        (0.5, [[0.516172, 0.211208, 0.272620], [0.150615, 0.455379, 0.394006]]),
        (0.05, [[0.939308, 0.001163, 0.059529], [0.000001, 0.516053, 0.483947]]),
    ],
)
def test_codes_of_two_images(epsilon: float, expected: list[list[float]]) -> None:
    assert slow_codes(SCORES, epsilon=epsilon, iterations=3) == pytest.approx(np.array(expected), abs=1e-6)
    assert codes(SCORES, epsilon=epsilon) == pytest.approx(np.array(expected), abs=1e-6)


def unit_scores(num_rows: int, num_prototypes: int) -> np.ndarray:
    generator = np.random.default_rng(0)
    rows, prototypes = generator.normal(size=(num_rows, 128)), generator.normal(size=(num_prototypes, 128))
    return (rows / np.linalg.norm(rows, axis=1)[:, None]) @ (prototypes / np.linalg.norm(prototypes, axis=1)[:, None]).T


@pytest.mark.parametrize("iterations", [1, 2, 3, 10])
def test_codes_are_those_of_alternate_sums(iterations: int) -> None:
    scores = unit_scores(64, 100)
    slow = slow_codes(scores, epsilon=0.05, iterations=iterations)
    assert codes(scores, iterations=iterations) == pytest.approx(slow, rel=1e-12)
    assert codes(scores.astype(np.float32), iterations=iterations) == pytest.approx(slow, rel=2e-5)


def test_every_image_has_a_sum_of_1_and_prototypes_come_to_equal_shares() -> None:
    scores = unit_scores(64, 100)
    errors = []
    for iterations in (1, 3, 10, 100):
        found = codes(scores, iterations=iterations)
        assert found.sum(axis=1) == pytest.approx(np.ones(64), rel=1e-12)
        errors.append(np.abs(found.sum(axis=0) / (64 / 100) - 1).max())
    assert errors[0] > errors[1] > 0.01 > errors[2] > 1e-12 > errors[3]  # three iterations, as the authors take, are not all
    assert codes(np.full((3, 4), 0.7)) == pytest.approx(np.full((3, 4), 0.25))
    assert np.isfinite(codes(np.array([[1.0, -1.0], [1.0, -1.0]], dtype=np.float32), epsilon=1e-4)).all()


def test_each_of_the_assigned_crops_is_a_batch_of_its_own() -> None:
    scores = np.stack([unit_scores(8, 5), unit_scores(8, 5)[::-1] * 0.5], axis=1)
    found = balanced_codes(torch.from_numpy(scores), epsilon=0.05, iterations=3, all_gather=OneProcess().all_gather)
    for crop in range(2):
        assert found[:, crop].numpy() == pytest.approx(slow_codes(scores[:, crop], epsilon=0.05, iterations=3), rel=1e-12)


def test_the_loss_of_two_crops_and_a_small_one() -> None:
    crops = [SCORES, [[0.7, 0.2, 0.1], [0.0, 0.6, 0.1]], [[0.5, 0.4, -0.1], [0.2, 0.2, 0.3]]]
    scores_BVK = torch.tensor(crops, dtype=torch.float64).transpose(0, 1)
    assigned = balanced_codes(scores_BVK[:, :2], epsilon=0.05, iterations=3, all_gather=OneProcess().all_gather)
    log_predictions = torch.log_softmax(scores_BVK / 0.1, dim=-1)
    losses = prediction_losses({"crops": log_predictions[:, :2], "small_crops": log_predictions[:, 2:]}, assigned)
    assert float(sum(losses.values())) == pytest.approx(1.6927086, abs=1e-7)


def unit(rows: torch.Tensor) -> torch.Tensor:
    return torch.stack([row / sum(value**2 for value in row) ** 0.5 for row in rows])


def slow_loss(method: SwAV, batch: Batch, *, queue: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss, and the projections of the first two crops, [B, 2, C]; `queue` has [Q, C] for each of them, or none."""
    rows = torch.cat([method.student(images) for images in batch.views.values()])
    first, norm, _, last = method.projection
    hidden = rows @ first.weight.T + first.bias  # type: ignore[operator]
    hidden = (hidden - hidden.mean(0)) / (hidden.var(0, correction=0) + 1e-5).sqrt() * norm.weight + norm.bias
    unit_rows = unit(hidden.clamp(min=0) @ last.weight.T + last.bias)  # type: ignore[operator]
    prototypes = method.prototypes.weight
    with torch.no_grad():  # no gradient goes through the scaling
        prototypes.copy_(unit(prototypes))
    views = []  # of every view, the rows of all images
    start = 0
    for images in batch.views.values():
        count = len(images) // NUM_IMAGES
        for view in range(count):
            views.append(torch.stack([unit_rows[start + image * count + view] for image in range(NUM_IMAGES)]))
        start += len(images)
    loss = torch.zeros((), dtype=torch.float64)
    for i in (0, 1):
        known = torch.cat([views[i], *queue[i : i + 1]]).detach()
        q = slow_codes(known @ prototypes.detach().T, epsilon=0.05, iterations=3)[:NUM_IMAGES]
        others = [v for v in range(len(views)) if v != i]
        for v in others:
            for image in range(NUM_IMAGES):
                exponents = [torch.exp(views[v][image] @ prototype / 0.1) for prototype in prototypes]
                for k in range(PROTOTYPES):
                    log_p = torch.log(exponents[k] / sum(exponents))
                    loss = loss - q[image, k] * log_p / (2 * len(others) * NUM_IMAGES)
    return loss, torch.stack(views[:2], dim=1).detach()


@pytest.mark.parametrize(("crops", "small_crops"), [(2, 0), (2, 3), (3, 1)])
@pytest.mark.parametrize("full", [False, True])
def test_loss_and_gradient_are_those_of_loops(crops: int, small_crops: int, full: bool) -> None:
    method, other = build(queue_size=8), build(queue_size=8)
    queue = []
    if full:
        rows = torch.nn.functional.normalize(torch.randn(8, 2, SIZE, dtype=torch.float64), dim=-1)
        method.queue.copy_(rows)
        queue = [rows[:, 0], rows[:, 1]]
    batch = draw_batch(2 if full else 1, crops=crops, small_crops=small_crops)
    output = method(batch)
    output.loss.backward()
    loss, projected = slow_loss(other, batch, queue=queue)
    loss.backward()
    assert float(output.metrics["loss"]) == pytest.approx(loss.item(), rel=1e-9)
    kinds = {"loss_crops", "loss_small_crops"} if small_crops else {"loss_crops"}
    assert float(sum(output.metrics[kind] for kind in kinds)) == pytest.approx(loss.item(), rel=1e-9)
    names = {"loss", "loss_kl", *kinds, "code_entropy", "prototypes_used", "monitor_loss", "monitor_accuracy"}
    assert output.metrics.keys() == names
    assert float(output.metrics["loss_kl"]) == pytest.approx(loss.item() - float(output.metrics["code_entropy"]), rel=1e-9)
    found = dict(method.named_parameters())
    for name, parameter in other.named_parameters():
        if not name.startswith("monitor."):
            torch.testing.assert_close(found[name].grad, parameter.grad, rtol=1e-6, atol=1e-10, msg=name)
    torch.testing.assert_close(method.queue[:NUM_IMAGES], projected, rtol=1e-9, atol=0.0)


def test_the_queue_holds_the_newest_first_and_is_used_when_it_is_full() -> None:
    method, alone = build(queue_size=12, queue_start_step=2), build(queue_size=0)
    alone.load_state_dict({name: value for name, value in method.state_dict().items() if name != "queue"}, strict=False)
    seen = []
    for step in range(7):
        batch = draw_batch(step)
        method.load_state_dict({**alone.state_dict(), "queue": method.queue})  # no rows but the queue's may differ
        queue = [method.queue[:, 0].clone(), method.queue[:, 1].clone()] if step >= 5 else []  # three batches from step 2 on
        with torch.no_grad():
            expected, projected = slow_loss(method, batch, queue=queue)
            method.load_state_dict({**alone.state_dict(), "queue": method.queue})
            assert float(method(batch).metrics["loss"]) == pytest.approx(expected.item(), rel=1e-9), step
            differs = float(alone(batch).metrics["loss"]) != pytest.approx(expected.item(), rel=1e-9)
        assert differs == (step >= 5)
        if step >= 2:
            seen.insert(0, projected)
        rows = torch.cat([*seen, torch.zeros(12, 2, SIZE, dtype=torch.float64)])[:12]
        torch.testing.assert_close(method.queue, rows, rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("name", ["larc", "lars_byol", "sgd"])
def test_frozen_prototypes_stay_as_they_began_and_then_move(name: Any) -> None:
    method = build(frozen_steps=3)
    # A decay of its own: what weight decay does to prototypes along themselves must not be seen.
    settings = Optimizer(name=name, learning_rate=0.6 if name != "sgd" else 0.05, weight_decay=1e-2)
    optimizer = build_optimizer(settings, method=method)
    before = torch.nn.functional.normalize(method.prototypes.weight.detach(), dim=1)
    student = method.student.conv1.weight.detach().clone()
    for step in range(5):
        output = method(draw_batch(step))
        seen = method.prototypes.weight.detach().clone()
        torch.testing.assert_close(seen.norm(dim=1), torch.ones(PROTOTYPES, dtype=torch.float64), rtol=1e-12, atol=0.0)
        assert torch.allclose(seen, before, rtol=0.0, atol=1e-12) == (step <= 3)
        optimizer.zero_grad()
        output.loss.backward()
        gradient = method.prototypes.weight.grad
        assert gradient is not None
        assert bool(gradient.any()) == (step >= 3)
        optimizer.step()
    assert not torch.equal(method.student.conv1.weight, student)


def test_codes_have_no_gradient_and_the_loss_starts_near_that_of_chance() -> None:
    method = build(num_prototypes=200, projection_size=128)
    scores = torch.randn(3, 2, PROTOTYPES, requires_grad=True)
    assert not method.assign(scores, torch.zeros(PROTOTYPES, SIZE), step=0).requires_grad
    metrics = method(draw_batch(num_images=32)).metrics
    assert float(metrics["loss"]) == pytest.approx(math.log(200), abs=0.7)
    assert 0 < float(metrics["code_entropy"]) < math.log(200)
    assert 0 < float(metrics["prototypes_used"]) <= 32


def test_bf16_leaves_codes_queue_and_loss_in_float32() -> None:
    method = build(queue_size=8).float()
    batch = draw_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = method(Batch(**{**vars(batch), "views": {kind: x.float() for kind, x in batch.views.items()}}))
    assert output.loss.dtype == method.queue.dtype == torch.float32
    lengths = method.queue[:NUM_IMAGES].norm(dim=-1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=1e-6, atol=0.0)  # bfloat16 would round them to 2^-9
    output.loss.backward()
    assert method.prototypes.weight.grad is not None


@pytest.mark.parametrize(
    ("views", "message"),
    [
        ({"num_crops": 1, "num_small_crops": 6}, r"SwAV assigns two crops .* views\.num_crops is 1: set it to 2"),
        ({"num_crops": 2, "num_patches": 5}, r"SwAV has no use for views\.num_patches \(5\): set it to 0"),
        ({"num_crops": 2, "cutmix_probability": 0.5}, r"SwAV has no targets .* views\.cutmix_probability to 0\.0"),
    ],
)
def test_views_that_cannot_be_assigned_are_refused(views: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SwAV.check_views(Swav(), backbone=SMALL, views=Views(**views))
    for small_crops in (0, 6):
        SwAV.check_views(Swav(), backbone=SMALL, views=Views(num_crops=2, num_small_crops=small_crops))


@pytest.mark.parametrize(("size", "advice"), [(3840, 3584), (100, 512), (513, 512)])
def test_a_queue_that_is_no_multiple_of_the_batch_is_refused(size: int, advice: int) -> None:
    with pytest.raises(UserError, match=rf"method\.queue_size \({size}\) .* training\.batch_size \(512\).* set it to {advice}, "):
        SwAV.check_batch(Swav(queue_size=size), batch_size=512, world_size=1)
    for even in (0, 512, advice):
        SwAV.check_batch(Swav(queue_size=even), batch_size=512, world_size=4)
