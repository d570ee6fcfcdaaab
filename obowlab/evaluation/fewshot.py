"""Few-shot classification of frozen features with prototypes (docs/method.md, section 11.2; paper, section 4.1 and appendix C.2).

An episode draws `num_ways` classes and, from each, `num_shots` training and `num_queries` test images. A class's prototype
is the mean of its L2-normalised training features, normalised again; a test image goes to the prototype of highest cosine.
Two samplers choose the episodes: `authors_episodes` repeats the released code's, `counter_episodes` are pure in (seed, episode).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from obowlab.config import FewShot
from obowlab.data.class_lists import ClassList
from obowlab.data.protocol_needs import few_shot_need, refuse_unmet
from obowlab.evaluation.result import Measurement, mean_with_interval
from obowlab.randomness import Stream, uniforms

MAX_GATHERED = 1 << 21
"""Most float32 values that a chunk of episodes may gather (8 MiB): larger ones leave the cache and take longer."""

Indices = npt.NDArray[np.int64]


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
    refuse_unmet(few_shot_need(labels, classes=classes, class_names=class_names, config=config))
    images_of = {index: np.flatnonzero(labels == index).tolist() for index in classes.indices}
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
