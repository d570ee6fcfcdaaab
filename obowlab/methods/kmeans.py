"""Offline k-means: the only importer of faiss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def kmeans(points_NC: Tensor, *, num_words: int, iterations: int, seed: int, report: Callable[[str], None]) -> Tensor:
    """Return the centres of Lloyd's algorithm, float32 [num_words, C], a function of its arguments.

    It starts from points that the seed chooses; a centre that loses all its points is moved next to one that has many.

    Args:
        points_NC: at least `num_words` points.
        num_words: number of centres.
        iterations: passes over the points.
        seed: of the first centres.
        report: takes a line of progress after every tenth pass and the last one.
    """
    import faiss  # slow, and most methods do not need it

    points = points_NC.detach().float().cpu().contiguous().numpy()
    assert len(points) >= num_words
    faiss.omp_set_num_threads(torch.get_num_threads())
    centres = None
    for number in range(1, iterations + 1):
        # One pass at a time, to report progress and to handle signals in between.
        one_pass = faiss.Kmeans(
            points.shape[1], num_words, niter=1, seed=seed, min_points_per_centroid=1, max_points_per_centroid=len(points)
        )
        one_pass.train(points, init_centroids=centres)
        centres = one_pass.centroids
        if number % 10 == 0 or number == iterations:
            assert one_pass.obj is not None
            mean_distance = float(one_pass.obj[-1]) / len(points)
            report(f"k-means: pass {number} of {iterations}, mean squared distance {mean_distance:.4g}.")
    assert centres is not None
    return torch.from_numpy(centres.copy())
