"""Few-shot classification of frozen features with prototypes (SPEC section 4; the paper's section 4.1 and appendix C.2).

An episode draws `num_ways` classes and, from each, `num_shots` training and `num_queries` test images. A class's prototype
is the mean of its L2-normalised training features, normalised again; a test image goes to the prototype of highest cosine.
Two samplers choose the episodes: `authors_episodes` repeats the released code's, `counter_episodes` are pure in (seed, episode).
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from obowlab.config import FewShot, canonical_hash, nearest
from obowlab.data.views import Stream, uniforms
from obowlab.errors import UserError
from obowlab.evaluation.result import Measurement, mean_with_interval

LOWSHOT_FILE = "lowshot_classes.json"
"""Named lists of class indices, beside a prepared data set: `DATA_ROOT/DATASET/lowshot_classes.json`."""

MAX_GATHERED = 1 << 21
"""Most float32 values that a chunk of episodes may gather (8 MiB): larger ones leave the cache and take longer."""

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ClassList:
    """The classes that episodes draw from.

    Attributes:
        name: as the recipe names it.
        indices: positions among the sorted class names, in the order of the list (the authors' sampler depends on it).
        names_hash: SHA-256 of the class names in that order.
    """

    name: str
    indices: tuple[int, ...]
    names_hash: str


@dataclass(frozen=True)
class Episodes:
    """Image positions of E episodes of W classes.

    Attributes:
        train: int64 [E, W, num_shots].
        test: int64 [E, W, num_queries].
    """

    train: Indices
    test: Indices


# -------------------------------------------------------------------------------------------------------------- classes


def class_list(spec: str, *, class_names: Sequence[str], folder: Path) -> ClassList:
    """Find the classes that a recipe's `evaluation.fewshot.classes` stands for.

    Args:
        spec: `all`; or the path of a .txt (one name per line) or .json (list of names) file; or a key of
            `lowshot_classes.json`, whose numbers are used as indices of the sorted class names, as the authors' code does
            (their file numbers another order, so most are not the benchmark's intended classes).
        class_names: all classes of the data set, sorted.
        folder: the prepared data set, `DATA_ROOT/DATASET`.

    Raises:
        UserError: the list is absent, unreadable or names classes that the data set does not have, or one twice.
    """
    if spec == "all":
        indices = list(range(len(class_names)))
    elif Path(spec).suffix in (".txt", ".json"):
        indices = _indices_of_names(_read_names(Path(spec)), class_names=class_names, origin=spec)
    else:
        indices = _indices_of_key(spec, num_classes=len(class_names), file=folder / LOWSHOT_FILE)
    if len(set(indices)) != len(indices):
        raise UserError(f"evaluation.fewshot.classes = '{spec}' lists a class twice.")
    return ClassList(name=spec, indices=tuple(indices), names_hash=canonical_hash([class_names[index] for index in indices]))


def _read_names(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
        names = json.loads(text) if path.suffix == ".json" else [line.strip() for line in text.splitlines() if line.strip()]
    except OSError as error:
        raise UserError(f"Cannot read the class list {path} (evaluation.fewshot.classes): {error.strerror}.") from None
    except ValueError as error:
        raise UserError(f"The class list {path} (evaluation.fewshot.classes) cannot be read: {error}.") from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"The class list {path} (evaluation.fewshot.classes) must be one JSON list of class names.")
    return names


def _indices_of_names(names: Sequence[str], *, class_names: Sequence[str], origin: str) -> list[int]:
    positions = {name: index for index, name in enumerate(class_names)}
    for name in names:
        if name not in positions:
            raise UserError(
                f"The class list {origin} (evaluation.fewshot.classes) names '{name}', which the data set does not have."
            )
    return [positions[name] for name in names]


def _indices_of_key(key: str, *, num_classes: int, file: Path) -> list[int]:
    if not file.is_file():
        raise UserError(f"evaluation.fewshot.classes = '{key}' needs {file}; put it there, use 'all' or name a .txt file.")
    try:
        lists: Any = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON: {error}.") from None
    known = [name for name in lists if _is_indices(lists[name])] if isinstance(lists, dict) else []
    if key not in known:
        raise UserError(f"{file} has no list of class indices '{key}' (evaluation.fewshot.classes).{nearest(key, known)}")
    indices: list[int] = lists[key]
    if min(indices) < 0 or max(indices) >= num_classes:
        raise UserError(f"'{key}' of {file} names class {max(indices)}, but the data set has {num_classes} classes.")
    return indices


def _is_indices(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(type(item) is int for item in value)


# ------------------------------------------------------------------------------------------------------------- samplers


def authors_episodes(
    images_of: Mapping[int, Sequence[int]], *, classes: Sequence[int], config: FewShot, num_shots: int
) -> Episodes:
    """Draw the episodes of the authors' released code, which are fixed by Python's generator seeded with 0.

    The draws, in order, for every episode: (1) `sample` the classes from the list as it stands, then sort them; (2) for every
    class, `sample` test + training images from its images in file order, the first `num_queries` being the test images;
    (3) `shuffle` all training images, then all test images. The shuffles change no result, yet they advance the generator.

    Args:
        images_of: positions of the images of every class, ascending.
        classes: the list to draw from.
        config: ways, queries and episodes.
        num_shots: training images per class; every number of shots starts again from seed 0.
    """
    generator = random.Random(0)
    train, test = [], []
    for _ in range(config.num_episodes):
        chosen = sorted(generator.sample(list(classes), config.num_ways))
        images = [generator.sample(images_of[c], config.num_queries + num_shots) for c in chosen]
        test.append([drawn[: config.num_queries] for drawn in images])
        train.append([drawn[config.num_queries :] for drawn in images])
        for per_class in (num_shots, config.num_queries):
            generator.shuffle(list(range(config.num_ways * per_class)))
    return Episodes(train=np.asarray(train, dtype=np.int64), test=np.asarray(test, dtype=np.int64))


def counter_episodes(
    images_of: Mapping[int, Sequence[int]], *, classes: Sequence[int], config: FewShot, num_shots: int, seed: int
) -> Episodes:
    """Draw episodes that are pure in (seed, episode): more episodes never change the first ones, and any order will do.

    Args:
        images_of: positions of the images of every class.
        classes: the list to draw from.
        config: ways, queries and episodes.
        num_shots: training images per class. Test images are drawn first, so that they are the same for every number of shots.
        seed: of the counter-based generator.
    """
    per_class = config.num_queries + num_shots
    # Columns: one draw per way, then a fixed block per way; the block's width depends on the shots, its beginning does not.
    draws = uniforms(
        seed=seed,
        epoch=0,
        indices=np.arange(config.num_episodes, dtype=np.int64),
        stream=Stream.EPISODES,
        count=config.num_ways * (1 + per_class),
    )
    train, test = [], []
    for row in draws:
        chosen = [classes[i] for i in _distinct(row[: config.num_ways], len(classes))]
        blocks = row[config.num_ways :].reshape(per_class, config.num_ways).T
        images = [[images_of[c][i] for i in _distinct(block, len(images_of[c]))] for c, block in zip(chosen, blocks, strict=True)]
        test.append([drawn[: config.num_queries] for drawn in images])
        train.append([drawn[config.num_queries :] for drawn in images])
    return Episodes(train=np.asarray(train, dtype=np.int64), test=np.asarray(test, dtype=np.int64))


def _distinct(draws: npt.NDArray[np.float64], population: int) -> Iterator[int]:
    """Yield one distinct number below `population` per uniform draw: the head of a Fisher-Yates shuffle."""
    moved: dict[int, int] = {}
    for position, draw in enumerate(draws):
        other = position + int(draw * (population - position))
        yield moved.get(other, other)
        moved[other] = moved.get(position, position)


# ------------------------------------------------------------------------------------------------------- classification


def episode_answers(features: torch.Tensor, *, episodes: Episodes) -> torch.Tensor:
    """Classify the test images of every episode and return how many answers are right.

    Args:
        features: float32 [N, c].
        episodes: E episodes of positions below N.

    Returns:
        int64 [E], each of num_ways · num_queries answers.
    """
    num_episodes, num_ways, num_shots = episodes.train.shape
    gathered = num_ways * (num_shots + episodes.test.shape[2]) * features.shape[1]
    chunk = max(1, MAX_GATHERED // gathered)
    train = torch.from_numpy(episodes.train).to(features.device)
    test = torch.from_numpy(episodes.test).to(features.device)
    truth = torch.arange(num_ways, device=features.device).repeat_interleave(episodes.test.shape[2])
    answers = []
    for start in range(0, num_episodes, chunk):
        shots = F.normalize(features[train[start : start + chunk]], dim=3)  # [e, W, n, c]
        prototypes = F.normalize(shots.mean(dim=2), dim=2)  # [e, W, c]
        queries = F.normalize(features[test[start : start + chunk]], dim=3)  # [e, W, q, c]
        cosines = queries.flatten(1, 2) @ prototypes.transpose(1, 2)  # [e, W * q, W]
        answers.append((cosines.argmax(dim=2) == truth).sum(dim=1))
    return torch.cat(answers).cpu()


def few_shot(
    features: torch.Tensor, *, labels: Indices, classes: ClassList, class_names: Sequence[str], config: FewShot, seed: int
) -> tuple[Measurement, ...]:
    """Measure the mean accuracy over episodes for every number of shots, with its normal 95 % interval.

    Args:
        features: float32 [N, c], of the validation images.
        labels: int64 [N].
        classes: what episodes draw from.
        class_names: for messages.
        config: ways, shots, queries, episodes and sampler.
        seed: of the counter sampler; the authors' is always 0.

    Raises:
        UserError: fewer classes than ways, or a class with too few images for shots and queries.
    """
    if len(classes.indices) < config.num_ways:
        raise UserError(
            f"evaluation.fewshot.num_ways = {config.num_ways} exceeds the {len(classes.indices)} classes of '{classes.name}'."
        )
    images_of = {index: np.flatnonzero(labels == index).tolist() for index in classes.indices}
    needed = max(config.shots) + config.num_queries
    poorest = min(classes.indices, key=lambda index: len(images_of[index]))
    if len(images_of[poorest]) < needed:
        raise UserError(
            f"evaluation.fewshot.shots and num_queries need {needed} validation images per class, "
            f"but '{class_names[poorest]}' has {len(images_of[poorest])}."
        )
    measurements = []
    for num_shots in config.shots:
        if config.sampler == "authors":
            episodes = authors_episodes(images_of, classes=classes.indices, config=config, num_shots=num_shots)
        else:
            episodes = counter_episodes(images_of, classes=classes.indices, config=config, num_shots=num_shots, seed=seed)
        answers = episode_answers(features, episodes=episodes)
        questions = config.num_ways * config.num_queries
        measurements.append(mean_with_interval(f"fewshot_{num_shots}shot", answers.tolist(), of=questions))
    return tuple(measurements)
