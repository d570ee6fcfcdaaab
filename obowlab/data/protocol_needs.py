"""What the protocols of an evaluation need of the prepared images; told before anything is trained. No torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from obowlab.config import Detector, FewShot, Knn, Recipe, Voc07Svm
from obowlab.config.methods import learns_from_labels
from obowlab.data.class_lists import ClassList, class_list
from obowlab.data.datasets import Split, open_split, trained_on
from obowlab.data.manifest import read_manifest
from obowlab.data.objects import Annotations, read_objects
from obowlab.data.sources import UNLABELLED
from obowlab.errors import AbsentError, UserError

DETECTION = ("voc-detection", "coco-detection")
"""Protocols that test a detector."""


def unmet_needs(recipe: Recipe, *, data_root: Path, runs_root: Path) -> dict[str, str]:
    """Return the protocols of a recipe that its images cannot carry, each with the reason and the setting that would do.

    Args:
        recipe: its evaluation names the protocols; few-shot is one of them when it is run during training.
        data_root: folder of the prepared data sets.
        runs_root: the run store; see `open_split`.

    Raises:
        UserError: a split is not prepared or damaged, or a class list is absent.
    """
    evaluation, dataset = recipe.evaluation, recipe.data.dataset
    wanted = tuple(dict.fromkeys((*evaluation.protocols, *(("fewshot",) if evaluation.every_epochs else ()))))
    if not wanted:
        return {}
    train = open_split(dataset, "train", data_root=data_root, runs_root=runs_root)
    unmet: dict[str, str | None] = {}
    for protocol in [each for each in wanted if each in DETECTION]:
        unmet[protocol] = detector_need(recipe, protocol=protocol, data_root=data_root, runs_root=runs_root)
    wanted = tuple(protocol for protocol in wanted if protocol not in DETECTION)
    if "voc07-svm" in wanted:
        val = open_split(dataset, "val", data_root=data_root, runs_root=runs_root) if train.targets is not None else train
        unmet["voc07-svm"] = several_classes_need(train, val, config=evaluation.voc07_svm)
        wanted = tuple(protocol for protocol in wanted if protocol != "voc07-svm")
    if wanted:
        unmet |= _one_class_needs(wanted, train=train, recipe=recipe, data_root=data_root, runs_root=runs_root)
    return {protocol: reason for protocol, reason in unmet.items() if reason is not None}


def _one_class_needs(
    wanted: Sequence[str], *, train: Split, recipe: Recipe, data_root: Path, runs_root: Path
) -> dict[str, str | None]:
    """Return the needs of the protocols that take one class an image; None for one that is met."""
    evaluation, dataset = recipe.evaluation, train.dataset
    if (reason := labels_need(train)) is not None:
        return dict.fromkeys(wanted, reason)
    if read_manifest(data_root, dataset, "val") is None:
        remedy = f"`obowlab data prepare {dataset} --source DIR --val-fraction 0.1 --force` sets some apart"
        remedy = remedy if np.bincount(train.labels).max() > 1 else "no class has two images, of which one could be val"
        return dict.fromkeys(wanted, f"'{dataset}' has no val images; {remedy}")
    val = open_split(dataset, "val", data_root=data_root, runs_root=runs_root)
    unmet: dict[str, str | None] = {}
    for protocol in wanted:
        if protocol == "fewshot":
            classes = class_list(evaluation.fewshot.classes, class_names=val.class_names, folder=data_root / dataset)
            unmet[protocol] = few_shot_need(val.labels, classes=classes, class_names=val.class_names, config=evaluation.fewshot)
            continue
        unmet[protocol] = same_classes_need(train, val)
        if protocol == "classes" and not learns_from_labels(recipe.method):
            unmet[protocol] = (
                f"evaluation.protocols has 'classes', but method.name {recipe.method.name} learns no classifier; 'linear' "
                "trains one"
            )
        if protocol == "knn":
            num_images = len(trained_on(train, recipe.data))
            unmet[protocol] = unmet[protocol] or knn_need(num_images, config=evaluation.knn)
    return unmet


def detector_need(recipe: Recipe, *, protocol: str, data_root: Path, runs_root: Path) -> str | None:
    """Return why no detector can be tested, and what would do; None when one can."""
    learned = recipe.method.architecture if isinstance(recipe.method, Detector) else None
    if learned is None or (protocol == "coco-detection" and learned != "fpn"):
        what = "detector" if protocol == "voc-detection" else "masks"
        method = f"method.name {recipe.method.name}" if learned is None else f"method.architecture {learned}"
        return (
            f"evaluation.protocols has '{protocol}', but {method} learns no {what}; recipe {protocol} does, beginning with an "
            "encoder (--weights)"
        )
    try:
        objects = read_objects(open_split(recipe.data.dataset, "val", data_root=data_root, runs_root=runs_root))
        if protocol == "coco-detection":
            refuse_without_outlines(objects, dataset=recipe.data.dataset)
    except AbsentError:
        raise
    except UserError as error:
        return str(error).rstrip(".")
    return None


def refuse_without_outlines(objects: Annotations, *, dataset: str) -> None:
    """Refuse images whose objects have boxes alone, or a machine that cannot raster outlines, where masks are learned.

    Raises:
        UserError: names what to do.
    """
    if not objects.has_outlines:
        raise UserError(
            f"'{dataset}' has boxes but no outlines, which masks are learned from: prepare a folder of COCO, such as "
            '`obowlab data draw coco DIR` makes, or train with method.architecture = "c4".'
        )
    if importlib.util.find_spec("pycocotools") is None:
        raise UserError("Masks need pycocotools: pip install 'obowlab[coco]'.")


def left_out_lines(unmet: dict[str, str]) -> Iterator[str]:
    """Yield a sentence for every reason of `unmet_needs`, with the protocols that are left out for it."""
    for reason in dict.fromkeys(unmet.values()):
        names = [protocol for protocol, each in unmet.items() if each == reason]
        yield f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} left out: {reason}."


def few_shot_need(labels: NDArray[np.int64], *, classes: ClassList, class_names: Sequence[str], config: FewShot) -> str | None:
    """Return why episodes cannot be drawn, and what would do; None when they can.

    Args:
        labels: int64 [N], of the validation images.
        classes: what episodes draw from.
        class_names: for the message.
        config: ways, shots and queries.
    """
    count = len(classes.indices)
    if count < 2:
        return f"evaluation.fewshot.classes = '{classes.name}' has {count} class, and episodes need two"
    problems, fixes = [], []
    if count < config.num_ways:
        problems.append(f"evaluation.fewshot.num_ways = {config.num_ways} exceeds the {count} classes of '{classes.name}'")
        fixes.append(f"--set evaluation.fewshot.num_ways={count}")
    images = np.bincount(labels, minlength=len(class_names))[list(classes.indices)]
    poorest = int(images.argmin())
    needed, there = max(config.shots) + config.num_queries, int(images[poorest])
    if there < needed:
        name = class_names[classes.indices[poorest]]
        problems.append(
            f"evaluation.fewshot.shots and num_queries need {needed} validation images per class, but '{name}' has {there}"
        )
        if there < 2:
            return f"{' and '.join(problems)}; name classes that have them in a file for evaluation.fewshot.classes"
        queries = min(config.num_queries, there - 1)
        shots = [each for each in config.shots if each + queries <= there] or [there - queries]
        fixes += [f"--set 'evaluation.fewshot.shots={shots}'"]
        fixes += [f"--set evaluation.fewshot.num_queries={queries}"] if queries < config.num_queries else []
    return f"{' and '.join(problems)}; {' '.join(fixes)} measures it" if problems else None


def knn_need(num_images: int, *, config: Knn) -> str | None:
    """Return why so many training images are too few neighbours, and what would do; None when they are not."""
    if config.num_neighbours <= num_images:
        return None
    return (
        f"evaluation.knn.num_neighbours = {config.num_neighbours} exceeds the {num_images} training images; "
        f"--set evaluation.knn.num_neighbours={num_images} measures it"
    )


def refuse_unlabelled(recipe: Recipe, *, train: Split) -> None:
    """Refuse a method that learns from labels where there is nothing to tell apart.

    Raises:
        UserError: names the settings to change.
    """
    if isinstance(recipe.method, Detector):
        objects = read_objects(train)
        if recipe.method.architecture == "fpn":
            refuse_without_outlines(objects, dataset=train.dataset)
    if learns_from_labels(recipe.method) and train.targets is not None:
        raise UserError(
            f"method.name is {recipe.method.name}, which learns from one label an image, but those of '{train.dataset}' show "
            "several classes: choose other images (data.dataset), or a method that learns without labels."
        )
    if learns_from_labels(recipe.method) and train.num_classes < 2:
        raise UserError(
            f"method.name is {recipe.method.name}, which learns from labels, but {_one_class(train)}: choose images with labels "
            "(data.dataset), or a method that learns without."
        )


def _one_class(train: Split) -> str:
    return f"'{train.dataset}' has {'images without labels' if train.class_names == (UNLABELLED,) else 'one class only'}"


def labels_need(train: Split) -> str | None:
    """Return that there is nothing to tell apart, and what would do; None when there is."""
    if train.targets is not None:
        return (
            f"the images of '{train.dataset}' show several classes each; `obowlab eval RUN --protocol voc07-svm --dataset "
            f"{train.dataset}` measures on them"
        )
    if train.num_classes > 1:
        return None
    return f"{_one_class(train)}; `obowlab eval RUN --dataset OTHER` measures the encoder on a data set with labels"


def several_classes_need(train: Split, val: Split, *, config: Voc07Svm) -> str | None:
    """Return why a classifier for each of several classes an image cannot be trained or tested; None when it can."""
    if train.targets is None or val.targets is None:
        return (
            f"voc07-svm needs images that show several classes, and those of '{train.dataset}' have one each; `obowlab data "
            "prepare voc07 --source VOCdevkit/VOC2007`, then --dataset voc07"
        )
    if train.class_names != val.class_names:
        return f"'{train.dataset}' does not have the same classes in train and val; prepare the data set again"
    for split, least in ((train, config.num_folds), (val, 1)):
        assert split.targets is not None
        shown, hidden = ((split.targets == value).sum(axis=0) for value in (1, 0))
        for name, *counts in zip(split.class_names, shown, hidden, strict=True):
            if min(counts) < least:
                what = "show" if counts[0] < least else "do not show"
                return f"{min(counts)} images of {train.dataset}/{split.name} {what} '{name}', and voc07-svm needs {least}"
    return None


def same_classes_need(train: Split, val: Split) -> str | None:
    """Return why a classifier of training images cannot be tested on validation images: no or other classes; None when it can."""
    if (reason := labels_need(train)) is not None:
        return reason
    if train.class_names == val.class_names:
        return None
    return f"'{train.dataset}' does not have the same classes in train and val; prepare the data set again"


def refuse_unmet(reason: str | None) -> None:
    """Raise a need that is not met.

    Raises:
        UserError: there is a reason.
    """
    if reason is not None:
        raise UserError(f"{reason}.")
