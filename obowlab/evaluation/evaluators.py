"""The protocols by name: what each reads, what it measures, and the settings that its number depends on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch
from pydantic import BaseModel
from torch import nn

from obowlab.config import Detector, Evaluation, Recipe, canonical_hash
from obowlab.data.class_lists import class_list
from obowlab.data.objects import Annotations, read_objects
from obowlab.data.protocol_needs import refuse_unmet, same_classes_need, several_classes_need
from obowlab.evaluation.classes import accuracies
from obowlab.evaluation.detection import coco_testing, pictures, scoring, testing
from obowlab.evaluation.detection.coco_metric import RECALLS
from obowlab.evaluation.detection.detecting import Pixels, detect_all
from obowlab.evaluation.detection.judged import JudgedDetections
from obowlab.evaluation.features import FeatureStore, View
from obowlab.evaluation.fewshot import few_shot
from obowlab.evaluation.knn import nearest_neighbours
from obowlab.evaluation.linear import linear_probe
from obowlab.evaluation.result import Measurement
from obowlab.methods.detection.two_stage import Detections, TwoStageDetector
from obowlab.runs.detection_facts import ClassCurves
from obowlab.runs.folder import RunFolder

PROBE_SEED = 0
"""Seed of probes and of counter-based episodes: part of the protocols, not of a run."""


@dataclass(frozen=True)
class Outcome:
    """What an evaluator found.

    Attributes:
        measurements: the numbers.
        settings: everything they depend on besides weights, images and views; JSON values, hashed into the protocol.
        remarks: worth knowing, yet without influence, such as the path of a class list; JSON values.
    """

    measurements: tuple[Measurement, ...]
    settings: dict[str, Any]
    remarks: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Learned:
    """What a training has learned on the encoder.

    Attributes:
        classifier: of its features, in evaluation mode; None where none was learned.
        detector: likewise.
        folder: of the run that learned the detector, for pictures of its test; None where none are wanted.
    """

    classifier: nn.Module | None
    detector: TwoStageDetector | None
    folder: RunFolder | None


@dataclass(frozen=True)
class Evaluator:
    """One protocol.

    Attributes:
        version: raised whenever the same weights and settings would give another number.
        needs: the views it reads of every split, by its settings; they are computed before it runs.
        run: measures, given the features, what was learned on the encoder, the recipe and a function that reports progress.
    """

    version: int
    needs: Callable[[Evaluation], Mapping[str, tuple[View, ...]]]
    run: Callable[[FeatureStore, Learned, Recipe, Callable[[str], None]], Outcome]


def _few_shot(store: FeatureStore, learned: Learned, recipe: Recipe, report: Callable[[str], None]) -> Outcome:
    split, config = store.split("val"), recipe.evaluation.fewshot
    classes = class_list(config.classes, class_names=split.class_names, folder=store.folder)
    (features,) = store.get("val")
    measurements = few_shot(
        features, labels=store.labels("val"), classes=classes, class_names=split.class_names, config=config, seed=PROBE_SEED
    )
    settings = config.model_dump(mode="json", exclude={"classes"})
    return Outcome(
        measurements=measurements,
        settings={**settings, "seed": PROBE_SEED, "classes_hash": classes.names_hash, "num_classes": len(classes.indices)},
        remarks={"classes": config.classes, "images": "validation", "interval": "1.96 standard errors over episodes"},
    )


def _linear(store: FeatureStore, learned: Learned, recipe: Recipe, report: Callable[[str], None]) -> Outcome:
    num_classes, facts = _labelled(store)
    config = recipe.evaluation.linear
    measurements = linear_probe(
        store.get("train", views=("centre", "mirrored")),
        labels=torch.from_numpy(store.labels("train")).to(store.device),
        test_features=store.get("val")[0],
        test_labels=torch.from_numpy(store.labels("val")).to(store.device),
        num_classes=num_classes,
        config=config,
        seed=PROBE_SEED,
        report=report,
    )
    return Outcome(
        measurements=measurements,
        settings={**_without_later(config, "cosine_per"), "seed": PROBE_SEED, **facts},
        remarks={"classifier": "weight and bias on plain features", "interval": "Wilson, over validation images"},
    )


def _knn(store: FeatureStore, learned: Learned, recipe: Recipe, report: Callable[[str], None]) -> Outcome:
    num_classes, facts = _labelled(store)
    config = recipe.evaluation.knn
    measurements = nearest_neighbours(
        store.get("val")[0],
        labels=torch.from_numpy(store.labels("val")).to(store.device),
        bank=store.get("train")[0],
        bank_labels=torch.from_numpy(store.labels("train")).to(store.device),
        num_classes=num_classes,
        config=config,
    )
    return Outcome(
        measurements=measurements,
        settings={**config.model_dump(mode="json"), **facts},
        remarks={"interval": "Wilson, over validation images"},
    )


def _voc07_svm(store: FeatureStore, learned: Learned, recipe: Recipe, report: Callable[[str], None]) -> Outcome:
    from obowlab.evaluation import svm  # late: scipy takes half a second to import

    config, train, val = recipe.evaluation.voc07_svm, store.split("train"), store.split("val")
    refuse_unmet(several_classes_need(train, val, config=config))
    assert train.targets is not None
    assert val.targets is not None
    features, test_features = (store.get(name, views=(config.view,))[0].double().cpu().numpy() for name in ("train", "val"))
    standard = {}
    if config.features == "pool5_bn":
        standard = {"mean": features.mean(axis=0), "variance": features.var(axis=0)}
    targets_hash = canonical_hash([train.targets.tolist(), val.targets.tolist()])
    settings = {**config.model_dump(mode="json"), "targets_hash": targets_hash}
    fits = svm.fit_classes(
        svm.normalised(features, **standard),
        targets=train.targets,
        test_features=svm.normalised(test_features, **standard),
        class_names=train.class_names,
        config=config,
        processes=store.num_processes,
        kept=store.place_beside("voc07-svm", {"version": EVALUATORS["voc07-svm"].version, **settings}),
        report=report,
    )
    measurement, precisions = svm.mean_average_precision(fits, targets=val.targets)
    return Outcome(
        measurements=(measurement,),
        settings=settings,
        remarks={
            "interval": "jackknife over validation images",
            "precision_of_classes": precisions,
            "cost_of_classes": {fit.name: fit.cost for fit in fits},
            "fits_at_the_limit": sum(fit.unconverged for fit in fits),
        },
    )


def _classes(store: FeatureStore, learned: Learned, recipe: Recipe, report: Callable[[str], None]) -> Outcome:
    config = recipe.evaluation.classes
    assert learned.classifier is not None, "refused before"
    labels = torch.from_numpy(store.labels("val")).to(store.device)
    measurements = accuracies(
        learned.classifier, features=store.get("val")[0], labels=labels, ranks=config.ranks, name=config.name
    )
    num_classes, facts = _labelled(store)
    training = recipe.training_settings()
    return Outcome(
        measurements=measurements,
        settings={**config.model_dump(mode="json"), **facts, "training": training, "training_data": store.data_hash(["train"])},
        remarks={"interval": "Wilson, over validation images", "classes": num_classes},
    )


def _voc_detection(store: FeatureStore, learned: Learned, recipe: Recipe, report: Callable[[str], None]) -> Outcome:
    split, truths = store.split("val"), read_objects(store.split("val"))
    found = _detections(store, learned, recipe, report)
    test = testing.judge_voc_images(found, truths=truths, class_names=split.class_names)
    measurements, of_classes = scoring.measure(test.judged, num_images=split.num_images)
    curves = scoring.class_curves(test.judged, num_images=split.num_images)
    metric = "average precision of PASCAL VOC 2007, at 11 recalls"
    _show(store, learned, recipe, detections=test.detections, truths=truths, curves=curves, metric=metric)
    objects = canonical_hash([[*each.boxes.tolist(), *each.labels.tolist()] for each in truths])
    return Outcome(
        measurements=measurements,
        settings={"training": recipe.training_settings(), "training_data": store.data_hash(["train"]), "objects": objects},
        remarks={
            "interval": "jackknife over validation images",
            "ap50_of_classes": of_classes,
            "metric": "PASCAL VOC 2007: 11 points, at overlaps of 0.5 to 0.95",
        },
    )


def _coco_detection(store: FeatureStore, learned: Learned, recipe: Recipe, report: Callable[[str], None]) -> Outcome:
    split, truths = store.split("val"), read_objects(store.split("val"))
    found = _detections(store, learned, recipe, report)
    test = coco_testing.judge_coco_images(found, truths=truths, class_names=split.class_names)
    report("coco-detection: intervals, from leaving out each image")
    measured = {
        kind: scoring.measure(judged, num_images=split.num_images, name=kind, recalls=RECALLS)
        for kind, judged in test.judged.items()
    }
    boxes = test.judged["coco_box"]
    curves = scoring.class_curves(boxes, num_images=split.num_images, recalls=RECALLS)
    metric = "COCO's average precision of boxes, at 101 recalls"
    _show(store, learned, recipe, detections=test.detections, truths=truths, curves=curves, metric=metric)
    objects = canonical_hash(coco_testing.objects_of(truths))
    return Outcome(
        measurements=tuple(each for measurements, _ in measured.values() for each in measurements),
        settings={"training": recipe.training_settings(), "training_data": store.data_hash(["train"]), "objects": objects},
        remarks={
            "interval": "jackknife over validation images",
            "ap50_of_classes": {kind: of_classes for kind, (_, of_classes) in measured.items()},
            "summary": test.summaries,
            "metric": f"COCO by pycocotools {version('pycocotools')}: 101 points, at overlaps of 0.5 to 0.95",
        },
    )


def _detections(store: FeatureStore, learned: Learned, recipe: Recipe, report: Callable[[str], None]) -> Iterator[Detections]:
    """Yield what the detector finds in every validation image."""
    assert learned.detector is not None, "refused before"
    assert isinstance(recipe.method, Detector)
    return detect_all(
        learned.detector,
        split=store.split("val"),
        config=recipe.method,
        pixels=Pixels(store.mean, store.std),
        device=store.device,
        workers=store.num_processes,
        report=report,
    )


def _show(
    store: FeatureStore,
    learned: Learned,
    recipe: Recipe,
    *,
    detections: Sequence[JudgedDetections],
    truths: Annotations,
    curves: Sequence[ClassCurves],
    metric: str,
) -> None:
    """Leave pictures and curves in the folder of the training, where there is one."""
    if learned.folder is not None:
        pictures.show_detections(
            store.split("val"),
            detections=detections,
            truths=truths,
            classes=curves,
            metric=metric,
            title=recipe.title,
            folder=learned.folder,
        )


def _without_later(config: BaseModel, *names: str) -> dict[str, Any]:
    """Return settings as JSON values without later ones that have their default, so that earlier results keep their hash."""
    defaults = type(config)().model_dump(mode="json")
    return {key: value for key, value in config.model_dump(mode="json").items() if key not in names or value != defaults[key]}


def _labelled(store: FeatureStore) -> tuple[int, dict[str, Any]]:
    """Return the number of classes that both splits share, and which training images are used."""
    train, val = store.split("train"), store.split("val")
    refuse_unmet(same_classes_need(train, val))
    facts = {"training_images": len(store.indices("train")), "images_per_class": store.images_per_class}
    return train.num_classes, facts


EVALUATORS: dict[str, Evaluator] = {
    "fewshot": Evaluator(version=1, needs=lambda _: {"val": ("centre",)}, run=_few_shot),
    "linear": Evaluator(version=1, needs=lambda _: {"train": ("centre", "mirrored"), "val": ("centre",)}, run=_linear),
    "knn": Evaluator(version=1, needs=lambda _: {"train": ("centre",), "val": ("centre",)}, run=_knn),
    "classes": Evaluator(version=1, needs=lambda _: {"val": ("centre",)}, run=_classes),
    "voc-detection": Evaluator(version=1, needs=lambda _: {"val": ()}, run=_voc_detection),
    "coco-detection": Evaluator(version=1, needs=lambda _: {"val": ()}, run=_coco_detection),
    "voc07-svm": Evaluator(
        version=1, needs=lambda settings: dict.fromkeys(("train", "val"), (settings.voc07_svm.view,)), run=_voc07_svm
    ),
}
