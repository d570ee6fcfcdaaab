"""Every metric's unit, direction and meaning; the one list that the loop, the mirror and the reports share.

A logged point of training covers the steps since the last one. Losses and accuracies are means over these steps, times too; what
costs something to compute (whatever ends in a level's name, `grad_norm`, `queue_age`) is that of the logged step alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Direction = Literal["max", "min", "none"]
METRIC_FILES = {"metrics": "train", "online": "online", "system": "system"}
"""Metric file of a run folder, without `.jsonl` -> group of its metrics in MLflow."""


@dataclass(frozen=True)
class Metric:
    """What a number means.

    Attributes:
        name: as in `metrics.jsonl`; a level's metric without its `_conv4` or `_conv5`.
        unit: empty for a plain number.
        direction: whether more or less is better, or neither.
        help: one sentence.
        group: of meaning; `mlflow_name` returns where MLflow shows it.
    """

    name: str
    unit: str
    direction: Direction
    help: str
    group: Literal["train", "eval", "system"] = "train"


_TRAINING = (
    Metric(
        "loss",
        "nats",
        "min",
        "What the method minimises, over all kinds of views, without the online classifier's; SimSiam's is minus a cosine, "
        "BYOL's a squared distance.",
    ),
    Metric(
        "loss_kl",
        "nats",
        "min",
        "The loss minus the targets' entropy, which no prediction's loss is below.",
    ),
    Metric("loss_crops", "nats", "min", "The crops' part of the loss."),
    Metric("loss_patches", "nats", "min", "The patches' part of the loss."),
    Metric("loss_rpn_objectness", "nats", "min", "A detector's part of the loss from what is an object."),
    Metric("loss_rpn_boxes", "", "min", "A detector's part of the loss from where proposals are."),
    Metric("loss_classes", "nats", "min", "A detector's part of the loss from the classes of regions."),
    Metric("loss_boxes", "", "min", "A detector's part of the loss from where objects are in their regions."),
    Metric("loss_masks", "nats", "min", "A detector's part of the loss from the masks of objects."),
    Metric("loss_small_crops", "nats", "min", "The part of the loss from the crops of the second size."),
    Metric("rotation_accuracy", "%", "max", "RotNet: rotated views whose rotation is recognised."),
    Metric(
        "contrast_accuracy",
        "%",
        "max",
        "MoCo, SimCLR: views nearer to their image's other view than to any other's.",
    ),
    Metric("class_accuracy", "%", "max", "Supervised training: views whose class is recognised."),
    Metric(
        "projection_std",
        "",
        "none",
        "SimSiam, BYOL: standard deviation of a channel of normalised projections; 1/sqrt(their length) is healthy, 0 collapse.",
    ),
    Metric("code_entropy", "nats", "none", "SwAV: entropy of a crop's code, mean over the batch; ln(num_prototypes) is even."),
    Metric("prototypes_used", "%", "max", "SwAV: prototypes that are the first choice of some crop in this batch."),
    Metric("queue_age", "steps", "none", "MoCo: mean steps since a key was put into the queue."),
    Metric("learning_rate", "", "none", "Learning rate of this step."),
    Metric("teacher_momentum", "", "none", "Momentum of the teacher's moving average at this step."),
    Metric("grad_norm", "", "none", "Euclidean norm of the gradient of student and heads; the online classifier's is not in it."),
    Metric("images_per_s", "images/s", "max", "Images of the whole run (all processes) per second of wall time."),
    Metric("step_time_s", "s", "min", "Wall time of one step, data included; mean since the last point."),
    Metric("data_wait_s", "s", "min", "Part of a step spent waiting for the loader; mean since the last point."),
    Metric("epoch", "epochs", "none", "Epochs seen so far, with fraction."),
    Metric("monitor_loss", "nats", "min", "Cross-entropy of the online linear classifier."),
    Metric("monitor_accuracy", "%", "max", "Top-1 of the online linear classifier on the training batches."),
)

_PER_LEVEL = (
    Metric("perplexity_image", "words", "none", "Perplexity of one image's BoW target, mean over the batch."),
    Metric("perplexity_batch", "words", "max", "Perplexity of the batch's mean BoW target."),
    Metric("words_used", "%", "max", "Words nearest to some location in this batch."),
    Metric("word_age", "steps", "none", "Mean steps since a word was put into the vocabulary."),
    Metric("distance", "", "none", "Mean squared distance of a location to its nearest word."),
    Metric("msd", "", "none", "Running mean of the squared distance, which scales delta."),
    Metric("target_entropy", "nats", "none", "Entropy of an image's BoW target, mean over the batch."),
    Metric("prediction_entropy", "nats", "none", "Entropy of the student's prediction, mean over the batch."),
    Metric("kappa", "", "none", "Inverse temperature of the student's prediction."),
)

_EVALUATION = (
    Metric("fewshot", "%", "max", "Accuracy of prototype classification, mean over episodes.", "eval"),
    Metric("linear_top1", "%", "max", "Top-1 of a linear classifier on frozen features.", "eval"),
    Metric("knn_top1", "%", "max", "Top-1 of the cosine-weighted vote of the nearest training images.", "eval"),
    Metric("classes", "%", "max", "Images whose class is among a supervised training's first guesses.", "eval"),
    Metric("imagenet", "%", "max", "The same of a linear classifier on frozen features of ImageNet's images.", "eval"),
    Metric("places205", "%", "max", "The same of a linear classifier on frozen features of Places205's images.", "eval"),
    Metric("semi1", "%", "max", "The same of an encoder that is fine-tuned on 1 % of the labels.", "eval"),
    Metric("semi10", "%", "max", "The same of an encoder that is fine-tuned on 10 % of the labels.", "eval"),
    Metric("voc_ap50", "%", "max", "Average precision of a fine-tuned detector at an overlap of 0.5, over classes.", "eval"),
    Metric("voc_ap75", "%", "max", "The same at an overlap of 0.75.", "eval"),
    Metric("voc_ap", "%", "max", "The same, mean over overlaps of 0.5 to 0.95.", "eval"),
    Metric("coco_box_ap50", "%", "max", "COCO's average precision of boxes at an overlap of 0.5, over classes.", "eval"),
    Metric("coco_box_ap75", "%", "max", "The same at an overlap of 0.75.", "eval"),
    Metric("coco_box_ap", "%", "max", "The same, mean over overlaps of 0.5 to 0.95.", "eval"),
    Metric("coco_mask_ap50", "%", "max", "COCO's average precision of masks at an overlap of 0.5, over classes.", "eval"),
    Metric("coco_mask_ap75", "%", "max", "The same at an overlap of 0.75.", "eval"),
    Metric("coco_mask_ap", "%", "max", "The same, mean over overlaps of 0.5 to 0.95.", "eval"),
    Metric("svm_map", "%", "max", "Mean average precision of linear SVMs on frozen features, over classes.", "eval"),
)

_SYSTEM = (
    Metric("cpu", "%", "none", "Use of all cores of the machine.", "system"),
    Metric("memory_used", "MiB", "none", "Memory in use on the machine.", "system"),
    Metric("memory_percent", "%", "none", "Memory in use on the machine.", "system"),
    Metric("run_memory", "MiB", "none", "Resident memory of the run's processes.", "system"),
    Metric("run_processes", "", "none", "Processes of the run.", "system"),
    Metric("disk_free", "MiB", "none", "Space left where the run folder is.", "system"),
    Metric("gpu_utilisation", "%", "max", "Use of one GPU; the name ends in its number.", "system"),
    Metric("gpu_memory", "MiB", "none", "Memory in use on one GPU; the name ends in its number.", "system"),
    Metric("gpu_power", "W", "none", "Power drawn by one GPU; the name ends in its number.", "system"),
)

METRICS: dict[str, Metric] = {metric.name: metric for metric in (*_TRAINING, *_PER_LEVEL, *_EVALUATION, *_SYSTEM)}

_LEVEL_NAMES = frozenset(metric.name for metric in _PER_LEVEL)
_RANKED = frozenset({"classes", "imagenet", "places205", "semi1", "semi10"})
_GPU_NAMES = frozenset(metric.name for metric in _SYSTEM if metric.name.startswith("gpu_"))


def lookup(name: str) -> Metric:
    """Return the entry of a metric as it is logged: `perplexity_image_conv5`, `fewshot_5shot`, `gpu_memory_0`, ...

    Raises:
        KeyError: this metric has no entry; add it to the lists above.
    """
    if found := re.fullmatch(r"(\w+)_(conv[45])", name):
        if found[1] in _LEVEL_NAMES:
            return METRICS[found[1]]
    elif re.fullmatch(r"fewshot_\d+shot", name):
        return METRICS["fewshot"]
    elif (found := re.fullmatch(r"(gpu_\w+)_\d+|(\w+)_top\d+", name)) and (found[1] in _GPU_NAMES or found[2] in _RANKED):
        return METRICS[found[1] or found[2]]
    elif name in METRICS and name not in _LEVEL_NAMES | _GPU_NAMES | _RANKED | {"fewshot"}:
        return METRICS[name]
    raise KeyError(f"metric '{name}' is not described in obowlab/runs/metrics.py")


def unit_of(name: str) -> str:
    """Return a metric's unit; empty for one that this version does not know."""
    try:
        return lookup(name).unit
    except KeyError:
        return ""


def mlflow_name(name: str, *, source: str) -> str:
    """Return a metric's name in MLflow: its group (`train`, `online`, `system`, `eval/SUBJECT`) and its own.

    Args:
        name: as logged or measured.
        source: the metric file it is from (a key of `METRIC_FILES`), or the subject of a final result: `student` or `random`,
            with `/DATASET` behind it when it was measured on other data than the run's own.
    """
    return f"{METRIC_FILES.get(source, f'eval/{source}')}/{name}"
