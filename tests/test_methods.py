from functools import partial
from typing import Any

import pytest
import torch

from obowlab.config import Backbone, Obow, Views, load_recipe
from obowlab.errors import UserError
from obowlab.methods import METHODS, Batch, OBoW, OneProcess, build_backbone, compile_encoders
from obowlab.runs.metrics import lookup
from obowlab.training.work import Work
from tests.contracts import MethodContract
from tests.gpu import steps

SMALL = Backbone(stem="small", width=4)


class TestMethods(MethodContract):
    """Every registered method."""


def step(method: OBoW, *, size: int = 40, kinds: tuple[str, ...] = ("crops",), number: int = 0) -> Any:
    generator = torch.Generator().manual_seed(number)
    views = {kind: torch.randn(8, 3, 16, 16, generator=generator) for kind in kinds}
    uniforms = torch.rand(4, method.num_uniforms, generator=generator, dtype=torch.float64)
    original = torch.randn(4, 3, size, size, generator=generator)
    return method(Batch(original=original, views=views, uniforms=uniforms, step=number))


def build(**options: Any) -> OBoW:
    method = Obow(**{"num_words": 20, **options})
    return OBoW(method, backbone=SMALL, total_steps=10, seed=0, num_classes=None, comm=OneProcess())


def test_metrics_bear_the_agreed_names() -> None:
    output = step(build(levels=("conv4", "conv5")), kinds=("crops", "patches"))
    per_level = ["perplexity_image", "perplexity_batch", "words_used", "word_age", "distance", "msd"]
    per_level += ["target_entropy", "prediction_entropy", "kappa"]
    expected = {f"{name}_{level}" for name in per_level for level in ("conv4", "conv5")}
    assert output.metrics.keys() == expected | {"loss", "loss_kl", "loss_crops", "loss_patches", "teacher_momentum"}
    m = {name: float(value) for name, value in output.metrics.items()}
    assert m["loss"] == pytest.approx(m["loss_crops"] + m["loss_patches"])
    assert m["loss"] == pytest.approx(m["loss_kl"] + m["target_entropy_conv4"] + m["target_entropy_conv5"])
    assert m["loss_kl"] > 0
    assert m["teacher_momentum"] == pytest.approx(0.99)
    assert 1 <= m["perplexity_image_conv5"] <= m["perplexity_batch_conv5"] <= 20


def test_small_crops_are_one_more_kind_of_views() -> None:
    metrics = step(build(), kinds=("crops", "small_crops")).metrics
    for name in metrics:
        lookup(name)
    assert float(metrics["loss"]) == pytest.approx(float(metrics["loss_crops"] + metrics["loss_small_crops"]))
    recipe = load_recipe(
        "demo-moco", overrides=["views.num_small_crops=2", "views.small_crop_size=16", "backbone.width=4"]
    ).recipe
    work = Work(recipe, batch_size=8, device=torch.device("cpu"))
    assert work.views["small_crops"].shape == (16, 3, 16, 16)
    work.step()


def test_the_fixed_head_has_neither_kappa_nor_words() -> None:
    method = build(head="fixed", kappa=50.0)
    head = method.heads["conv5"]
    assert [name for name, _ in head.named_parameters()] == ["fc.weight"]
    assert torch.equal(head(torch.zeros(20, 32)), head.fc.weight)
    assert float(step(method).metrics["kappa_conv5"]) == 1.0


def test_the_head_without_batch_norm_is_the_papers() -> None:
    head = build(head_batchnorm=False).heads["conv5"]
    words = torch.randn(20, 32)
    unit = torch.nn.functional.normalize
    expected = unit(head.fc2(torch.relu(head.fc1(unit(words, dim=1)))), dim=1)
    assert torch.allclose(head(words), expected)
    assert head.fc1.weight.shape == (64, 32)
    assert head.fc1.bias is not None


def test_learnt_kappa_moves_one_per_level() -> None:
    method = build(levels=("conv4", "conv5"), learn_kappa=True)
    step(method).loss.backward()
    grads = [method.heads[level].kappa.grad for level in ("conv4", "conv5")]
    assert all(grad is not None for grad in grads)
    assert grads[0] != grads[1]
    assert not any("kappa" in name for name, p in build().named_parameters() if p.requires_grad)


def test_the_teacher_keeps_its_own_batch_norm_statistics() -> None:
    method = build()
    step(method)
    student, teacher = method.student.state_dict(), method.teacher.state_dict()
    assert torch.equal(student["layer1.0.conv1.weight"], teacher["layer1.0.conv1.weight"])
    assert not torch.equal(student["layer1.0.bn1.running_mean"], teacher["layer1.0.bn1.running_mean"])


def test_the_student_starts_as_build_backbone_of_the_same_seed() -> None:
    method, alone = build(), build_backbone(SMALL, seed=0).state_dict()
    assert all(torch.equal(value, alone[name]) for name, value in method.student.state_dict().items())


def test_bf16_encoders_leave_distances_and_loss_in_float32() -> None:
    method = build(levels=("conv4", "conv5"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = step(method)
    assert output.loss.dtype == torch.float32
    assert method.vocabularies["conv5"].words.dtype == torch.float32
    output.loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in method.student.parameters())


@pytest.mark.parametrize("original_size", [24, 32])
def test_a_map_too_small_for_the_vocabulary_is_refused_in_one_sentence(original_size: int) -> None:
    views = Views(original_size=original_size, original_resize=40, crop_size=16)
    with pytest.raises(UserError, match=r"conv5.*method\.border.*views\.original_size") as early:
        OBoW.check_views(Obow(), backbone=SMALL, views=views)
    with pytest.raises(UserError) as late:
        step(build(), size=original_size)
    assert str(early.value) == str(late.value)
    assert str(early.value).count(". ") == 0


@pytest.mark.parametrize(
    "options", [{"border": 0}, {"queue_vector": "local"}, {"queue_vector": "global_average"}, {"vocabulary": "kmeans_replace"}]
)
def test_small_maps_serve_the_other_choices(options: dict[str, Any]) -> None:
    views = Views(original_size=32, original_resize=40, crop_size=16)
    method = Obow(num_words=20, **options)
    OBoW.check_views(method, backbone=SMALL, views=views)
    assert torch.isfinite(step(build(**options), size=32).loss)


@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"detector"}))  # its images have all sizes: it is not compiled
def test_compiled_encoders_learn_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch takes each network apart whole, once for every size of images; what it then makes of it is its own matter."""
    graphs: list[object] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend, fullgraph=True))
    plain, compiled = (steps.build(name, device=torch.device("cpu"), dtype=torch.float64)[0] for _ in range(2))
    compile_encoders(compiled)
    for step in range(2):
        batch = steps.draw_batch(step, plain, device=torch.device("cpu"), dtype=torch.float64)
        losses = [method(batch).loss for method in (plain, compiled)]
        torch.testing.assert_close(*losses)
        gradients = [
            torch.autograd.grad(loss, list(method.encoder.parameters()), allow_unused=True)
            for loss, method in zip(losses, (plain, compiled), strict=True)
        ]
        torch.testing.assert_close(*gradients)
        if step == 0:
            first = len(graphs)
    assert 1 <= first == len(graphs) <= 4, "compiled once"
    assert compiled.state_dict().keys() == plain.state_dict().keys()
