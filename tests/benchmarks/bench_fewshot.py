"""Time the few-shot protocol on ImageNet's shape: 200 episodes of 50 classes out of 300, on the 50 000 validation images.

Beside it, in the same process, one episode at a time with a loop over classes. Features are random: only time is measured.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import time

import torch
import torch.nn.functional as F

from obowlab.config import FewShot
from obowlab.evaluation.fewshot import Episodes, authors_episodes, counter_episodes, episode_answers

IMAGES_OF = {label: list(range(50 * label, 50 * label + 50)) for label in range(1000)}
CLASSES = list(range(0, 900, 3))
NUM_SHOTS = 5


def one_by_one(features: torch.Tensor, *, episodes: Episodes) -> float:
    """Return the mean accuracy in percent, one episode and one class at a time."""
    accuracies = []
    for train, test in zip(torch.from_numpy(episodes.train), torch.from_numpy(episodes.test), strict=True):
        prototypes = torch.stack([F.normalize(F.normalize(features[images], dim=1).mean(0), dim=0) for images in train])
        hits = [
            float((F.normalize(features[images], dim=1) @ prototypes.T).argmax(1).eq(way).float().mean())
            for way, images in enumerate(test)
        ]
        accuracies.append(100 * sum(hits) / len(hits))
    return sum(accuracies) / len(accuracies)


def main() -> None:
    """Print one line per feature width."""
    config = FewShot()
    generator = torch.Generator().manual_seed(0)
    start = time.perf_counter()
    episodes = authors_episodes(IMAGES_OF, classes=CLASSES, config=config, num_shots=NUM_SHOTS)
    drawn_s = time.perf_counter() - start
    start = time.perf_counter()
    counter_episodes(IMAGES_OF, classes=CLASSES, config=config, num_shots=NUM_SHOTS, seed=0)
    counted_s = time.perf_counter() - start
    print(
        f"few-shot: draw {config.num_episodes} episodes of {NUM_SHOTS} shots: authors' {drawn_s:.2f} s, counter {counted_s:.2f} s"
    )
    for num_features in (512, 2048):
        features = torch.randn(50_000, num_features, generator=generator)
        start = time.perf_counter()
        accuracy = 100 * float(episode_answers(features, episodes=episodes).double().mean()) / config.num_ways
        batched_s = time.perf_counter() - start
        start = time.perf_counter()
        reference = one_by_one(features, episodes=episodes)
        looped_s = time.perf_counter() - start
        assert abs(accuracy - reference) < 0.02, "the two ways must agree"
        print(
            f"few-shot: {num_features} features: {config.num_episodes} episodes in {batched_s:.2f} s, one by one {looped_s:.2f} s"
        )


if __name__ == "__main__":
    main()
