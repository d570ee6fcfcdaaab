"""Supervised training against a version with loops, and images without labels."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from obowlab.config import Backbone, Machine, Supervised, load_recipe
from obowlab.data.datasets import prepare
from obowlab.launch.stages import find_obstacles
from obowlab.methods import Batch, OneProcess, SupervisedTraining, build_backbone
from obowlab.training import checkpoint
from obowlab.training.work import Work
from tests.runs import complete, points, small_recipe, start

SMALL = Backbone(stem="small", width=4)


def build(*, num_classes: int = 3) -> SupervisedTraining:
    return SupervisedTraining(
        Supervised(), backbone=SMALL, total_steps=1, seed=0, num_classes=num_classes, comm=OneProcess()
    ).double()


def draw_batch(*, num_images: int = 4, mixed: bool = False) -> Batch:
    generator = torch.Generator().manual_seed(0)
    crops, patches = (
        torch.randn(num_images * views, 3, size, size, generator=generator, dtype=torch.float64)
        for views, size in ((2, 16), (3, 12))
    )
    share = torch.rand(num_images * 2, generator=generator, dtype=torch.float64)
    return Batch(
        original=torch.zeros(num_images, 3, 1, 1),
        views={"crops": crops, "patches": patches},
        uniforms=torch.zeros(num_images, 0),
        step=0,
        labels=torch.tensor([2, 0, 1, 1])[:num_images],
        cutmix_lambda={"crops": share} if mixed else {},
    )


@pytest.mark.parametrize("mixed", [False, True])
def test_loss_and_gradient_are_those_of_loops(mixed: bool) -> None:
    method, batch = build().train(), draw_batch(mixed=mixed)
    assert batch.labels is not None
    output = method(batch)
    output.loss.backward()
    encoder = build_backbone(SMALL, seed=0).double().train()
    weight, bias = (value.detach().clone().requires_grad_() for value in (method.classifier.weight, method.classifier.bias))
    losses, hits = {}, []
    for kind, images in batch.views.items():
        terms = []
        for row, feature in enumerate(encoder(images)):
            logits = [(weight[c] * feature).sum() + bias[c] for c in range(3)]
            log_of_sum = torch.stack([logit.exp() for logit in logits]).sum().log()
            image = row // (len(images) // 4)
            own, pasted = int(batch.labels[image]), int(batch.labels[image ^ 1])  # images 0 and 1, 2 and 3 are mixed
            share = float(batch.cutmix_lambda[kind][row]) if kind in batch.cutmix_lambda else 1.0
            terms.append(share * (log_of_sum - logits[own]) + (1 - share) * (log_of_sum - logits[pasted]))
            values = [float(logit.detach()) for logit in logits]
            hits.append(values.index(max(values)) == (own if share >= 0.5 else pasted))
        losses[kind] = sum(terms) / len(terms)
    loss = losses["crops"] + losses["patches"]
    loss.backward()
    for kind, value in losses.items():
        assert float(output.metrics[f"loss_{kind}"]) == pytest.approx(float(value.detach()), rel=1e-12)
    assert float(output.metrics["class_accuracy"]) == pytest.approx(100 * sum(hits) / len(hits))
    torch.testing.assert_close(method.classifier.weight.grad, weight.grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(method.classifier.bias.grad, bias.grad, rtol=1e-9, atol=1e-12)
    for (name, found), expected in zip(method.student.named_parameters(), encoder.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-8, atol=1e-11, msg=name)
    assert output.metrics.keys() == {"loss", "loss_crops", "loss_patches", "class_accuracy"}


def test_it_begins_at_the_entropy_of_all_classes_and_with_torchvisions_weights() -> None:
    method = build(num_classes=1000)
    batch = draw_batch()
    loss = float(method(batch).metrics["loss_crops"])
    assert loss == pytest.approx(math.log(1000), abs=0.3)
    bound = method.student.num_features**-0.5
    for value in (method.classifier.weight, method.classifier.bias):
        assert 0.95 * bound < float(value.detach().abs().max()) <= bound


@pytest.mark.parametrize("kind", ["unlabelled", "one class"])
def test_images_without_labels_are_refused_before_the_run_and_in_it(tmp_path: Path, image_folder: Path, kind: str) -> None:
    if kind == "unlabelled":
        prepare("mine", source=image_folder / "train/class_0", data_root=tmp_path / "data", workers=1)
        reason = "'mine' has images without labels"
    else:
        (tmp_path / "one").mkdir()
        (tmp_path / "one/class_0").symlink_to(image_folder / "train/class_0")
        prepare("mine", source=tmp_path / "one", data_root=tmp_path / "data", workers=1)
        reason = "'mine' has one class only"
    sentence = (
        f"method.name is supervised, which learns from labels, but {reason}: choose images with labels (data.dataset), or a "
        "method that learns without."
    )
    machine = Machine(data_root=tmp_path / "data", runs_root=tmp_path / "runs", device="cpu", loader="torch", workers=0)
    without = small_recipe(tmp_path, dataset="mine", overrides=("training.batch_size=2", "evaluation.protocols=[]"))
    loaded = small_recipe(
        tmp_path, dataset="mine", overrides=("training.batch_size=2", "evaluation.protocols=[]", "method.name=supervised")
    )
    obstacles = find_obstacles([without, loaded], machine=machine, say=lambda line: None)
    assert obstacles.refused == (sentence,), "although the run before it has the same images"
    _, process = start(loaded, machine=machine)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 2
    assert sentence in errors.decode()


def test_a_run_ends_and_its_checkpoint_opens_without_the_images(tmp_path: Path, data_root: Path) -> None:
    machine = Machine(data_root=data_root, runs_root=tmp_path / "runs", device="cpu", loader="torch", workers=0)
    overrides = ("method.name=supervised", "training.monitor=true", "evaluation.protocols=[]")
    run = complete(small_recipe(tmp_path, dataset="small", epochs=2, overrides=overrides), machine=machine)
    last = points(run)[-1][1]
    assert {"loss", "class_accuracy"} <= last.keys()
    assert not {"monitor_loss", "monitor_accuracy"} & last.keys(), "it has a classifier as it is"
    method, step, complaints = checkpoint.open_method(run, map_location=torch.device("cpu"))
    assert (step, complaints) == (run.state.total_steps, [])
    assert isinstance(method, SupervisedTraining)
    assert len(method.classifier.bias) == 5


def test_its_step_can_be_timed_without_images() -> None:
    recipe = load_recipe("demo-supervised", overrides=["backbone.width=4", "optimizer.name=lars_byol"]).recipe
    work = Work(recipe, batch_size=4, device=torch.device("cpu"))
    before = work.model.encoder.conv1.weight.detach().clone()
    work.step()
    assert not work.has_encoder_work
    assert torch.equal(work.model.encoder.conv1.weight, before), "noise is not learnt"
