"""What the parts of an evaluation take on this machine: features of images, and the protocols on random features."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from obowlab.config import Linear, Recipe
from obowlab.data.datasets import DATASETS, Split, trained_on
from obowlab.data.manifest import read_manifest
from obowlab.evaluation import views_needed
from obowlab.evaluation.evaluators import PROBE_SEED
from obowlab.evaluation.features import BATCH_SIZE, frozen
from obowlab.evaluation.fewshot import authors_episodes, episode_answers
from obowlab.evaluation.knn import neighbour_votes
from obowlab.evaluation.linear import train_probe
from obowlab.launch.bounds import FEATURES, FEW_SHOT, KNN, LINEAR, Part
from obowlab.methods import build_backbone
from obowlab.precision import full_precision
from obowlab.training.context import RunContext
from obowlab.training.timing import rate, timed
from obowlab.views.loaders import centre_loader, num_workers
from obowlab.views.photometric import normalise

FEWEST = 16
"""Fewest images of a batch of features on a CPU."""

MOST_ROWS = 8192
"""Images of which the heads of the evaluation are timed."""

FEW_SHOT_EPISODES = 20


class Sizes:
    """How many images and classes the evaluation of a recipe has.

    Attributes:
        num_train: training images of the recipe.
        num_val: validation images.
        num_classes: classes.
    """

    def __init__(self, recipe: Recipe, *, split: Split, data_root: Path) -> None:
        """Take them from the prepared data set, or from the published sizes of one that is not prepared."""
        info = DATASETS.get(recipe.data.dataset)
        if split.dataset == recipe.data.dataset or info is None:
            val = read_manifest(data_root, split.dataset, "val")
            self.num_train = len(trained_on(split, recipe.data))
            self.num_val = val.num_images if val is not None else 0
            self.num_classes = split.num_classes
        else:
            self.num_train, self.num_val, self.num_classes = info.num_images["train"], info.num_images["val"], info.num_classes
            if recipe.data.images_per_class is not None:
                self.num_train = min(self.num_train, recipe.data.images_per_class * info.num_classes)


def evaluation(run: RunContext, *, split: Split, sizes: Sizes, seconds: float) -> Iterator[tuple[Part, float]]:
    """Yield the parts of an evaluation, with the seconds that each takes once; 0 for those that the recipe does not want."""
    settings, device = run.recipe.evaluation, run.world.device
    wanted = set(settings.protocols)
    images = {"train": sizes.num_train, "val": sizes.num_val}
    seen = sum(images[name] * len(views) for name, views in views_needed(settings.protocols, settings).items())
    with full_precision(device):
        speed, width = features(run, split=split, seconds=seconds / 2)
        heads = {FEW_SHOT: ("fewshot", _few_shot), LINEAR: ("linear", _linear), KNN: ("knn", _knn)}
        untimed = sorted(wanted - {protocol for protocol, _ in heads.values()})
        without = f"; not timed: the rest of {', '.join(untimed)}" if untimed else ""
        yield Part(FEATURES, speed, None, f"loader and encoder in float32; {seen} views for this recipe{without}"), seen / speed
        for name, (protocol, head) in heads.items():
            part, taken_s = head(run, width, sizes, seconds / 6)
            yield Part(name, *part), taken_s if protocol in wanted else 0.0


def features(run: RunContext, *, split: Split, seconds: float) -> tuple[float, int]:
    """Return with how many images a second features are computed, and their length."""
    machine, device = run.machine, run.world.device
    encoder = build_backbone(run.recipe.backbone, seed=0).to(device)
    layout = torch.channels_last if machine.channels_last else torch.contiguous_format
    size = BATCH_SIZE if device.type == "cuda" else min(BATCH_SIZE, max(FEWEST, run.recipe.training.batch_size))
    size = min(size, split.num_images)
    loader = centre_loader(
        split,
        indices=np.resize(np.arange(split.num_images // size * size), max(split.num_images, 2048)),
        views=run.recipe.views,
        batch_size=size,
        backend=machine.loader,
        workers=num_workers(machine),
        pin=device.type == "cuda",
    )

    def stream() -> Iterator[Tensor]:
        while True:
            for _, pixels in loader:
                yield encoder(normalise(pixels, device=device).contiguous(memory_format=layout)).float().cpu()

    with frozen(encoder):
        return rate(stream(), batch_size=size, seconds=seconds, wait=lambda: None), encoder.num_features


Head = tuple[tuple[float | None, float | None, str], float]
"""Images a second, no time of a step, a note; and the seconds of the recipe's whole evaluation."""


def _random_features(count: int, width: int, *, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn((count, width), device=device, generator=generator).relu_().mul_(0.1)


def _wait(device: torch.device) -> Callable[[], None]:
    return (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)


def _few_shot(run: RunContext, width: int, sizes: Sizes, seconds: float) -> Head:
    settings, device = run.recipe.evaluation.fewshot, run.world.device
    config = settings.model_copy(update={"num_episodes": min(FEW_SHOT_EPISODES, settings.num_episodes)})
    classes = max(config.num_ways, sizes.num_classes)
    each = config.num_queries + max(config.shots)
    table = _random_features(classes * each, width, device=device)
    images_of = {label: range(each * label, each * (label + 1)) for label in range(classes)}

    def episodes() -> None:
        for num_shots in config.shots:
            drawn = authors_episodes(images_of, classes=range(classes), config=config, num_shots=num_shots)
            episode_answers(table, episodes=drawn)

    one_s = timed(episodes, seconds=seconds, wait=_wait(device)) / (len(config.shots) * config.num_episodes)
    note = f"episodes/s: {config.num_ways} ways, {', '.join(map(str, config.shots))} shots, features of {width}"
    return (1 / one_s, None, note), one_s * settings.num_episodes * len(config.shots)


def _linear(run: RunContext, width: int, sizes: Sizes, seconds: float) -> Head:
    settings, device = run.recipe.evaluation.linear, run.world.device
    rows = max(min(sizes.num_train, MOST_ROWS), min(settings.batch_size, sizes.num_train))
    table = _random_features(rows, width, device=device)
    labels = torch.arange(rows, device=device) % sizes.num_classes
    # Noise is learnt slowly, so that the weights stay finite.
    config = Linear(epochs=1, batch_size=settings.batch_size, learning_rate=1e-3)

    def epoch() -> None:
        train_probe((table, table), labels=labels, num_classes=sizes.num_classes, config=config, seed=PROBE_SEED)

    speed = rows / timed(epoch, seconds=seconds, wait=_wait(device))
    note = f"{sizes.num_train / speed:.2g} s an epoch of {sizes.num_train} features of {width}, {sizes.num_classes} classes"
    return (speed, None, note), settings.epochs * sizes.num_train / speed


def _knn(run: RunContext, width: int, sizes: Sizes, seconds: float) -> Head:
    settings, device = run.recipe.evaluation.knn, run.world.device
    rows = max(min(sizes.num_train, MOST_ROWS), settings.num_neighbours)
    bank = _random_features(rows, width, device=device)
    queries = bank[: max(1, min(512, rows))]
    labels = torch.arange(rows, device=device) % sizes.num_classes

    def votes() -> None:
        neighbour_votes(queries, bank=bank, bank_labels=labels, num_classes=sizes.num_classes, config=settings)

    one_s = timed(votes, seconds=seconds, wait=_wait(device)) / len(queries) * max(1.0, sizes.num_train / rows)
    return (1 / one_s, None, f"queries of {width} features in a bank of {sizes.num_train}"), one_s * sizes.num_val
