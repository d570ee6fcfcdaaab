"""The vocabulary of visual words and what it remembers between steps: a queue, or online k-means (paper sections 3.1, D).

A vocabulary reads the teacher's map of one level once per step: it makes the BoW targets from the words as they are, then
moves the words on. Everything it knows is a persistent buffer, the same on every process.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from obowlab.config import Level, Obow
from obowlab.methods import bow
from obowlab.methods.base import Comm

AUTHORS_MSD = 0.5
"""Where mu_MSD starts in the authors' code; far from its true value for hundreds of steps."""


@dataclass
class Reading:
    """What one step's maps say in the words of one level.

    Attributes:
        targets: the BoW targets, [B, K], rows summing to 1.
        mean_nearest: mean squared distance to the nearest word over the locations of all processes, 0-dim.
        words_used: percent of the words nearest to some location of the global batch, 0-dim.
    """

    targets: Tensor
    mean_nearest: Tensor
    words_used: Tensor


class Vocabulary(nn.Module, ABC):
    """The words of one level, mu_MSD and the age of the words; subclasses decide how the words move.

    Words start as rectified Gaussian noise, as the authors' queue does.
    """

    words: Tensor
    msd: Tensor
    msd_started: Tensor
    inserted_at: Tensor

    def __init__(self, method: Obow, *, num_channels: int):
        super().__init__()
        self.method = method
        self.num_words = method.num_words
        self.register_buffer("words", torch.randn(method.num_words, num_channels).clamp_(min=0))
        self.register_buffer("msd", torch.tensor(AUTHORS_MSD))
        self.register_buffer("msd_started", torch.tensor(method.msd_start == "authors"))
        self.register_buffer("inserted_at", torch.zeros(method.num_words, dtype=torch.int64))

    @torch.no_grad()
    def read(self, map_BCHW: Tensor, *, draws_B: Tensor, step: int, comm: Comm) -> Reading:
        """Make the BoW targets of a batch and take the words one step further: (5) to (9) of SPEC's order.

        The codes use the distances to the *old* words and the *updated* mu_MSD. As neither depends on the new words,
        the words move last, and no copy of the old ones is needed.

        Args:
            map_BCHW: the teacher's map, border included.
            draws_B: uniforms in [0, 1), one per image: the location offered to the vocabulary.
            step: number of this step, from 0.
            comm: the other processes; their images count as part of the batch.
        """
        map_BCHW = bow.at_least_float32(bow.crop_border(map_BCHW, border=self.method.border))
        local_BUC = map_BCHW.flatten(2).transpose(1, 2).contiguous()
        distances = bow.Distances(local_BUC, self.words)
        nearest_dist_BU, nearest_BU = distances.nearest()
        mean_nearest = comm.mean(nearest_dist_BU.mean())
        self._update_msd(mean_nearest)
        used_K = torch.zeros_like(self.inserted_at, dtype=mean_nearest.dtype)
        used_K[nearest_BU.flatten()] = 1.0
        words_used = 100.0 * (comm.mean(used_K) > 0).to(used_K.dtype).mean()
        target_BK = self._read(map_BCHW, distances, nearest_BU, draws_B=draws_B, step=step, comm=comm)
        return Reading(targets=target_BK, mean_nearest=mean_nearest, words_used=words_used)

    def mean_age(self, *, step: int) -> Tensor:
        """Return the mean number of steps since the words were inserted, 0-dim."""
        return step - self.inserted_at.to(self.words.dtype).mean()

    def _update_msd(self, mean_nearest: Tensor) -> None:
        moved = bow.next_msd(self.msd, mean_nearest, momentum=self.method.msd_momentum)
        self.msd.copy_(torch.where(self.msd_started, moved, mean_nearest))
        self.msd_started.fill_(True)

    def _nearest_word_targets(self, distances: bow.Distances, nearest_BU: Tensor) -> Tensor:
        """Return the targets of eq. 4, or of its hard variant."""
        if self.method.codes == "hard":
            return bow.hard_bow(nearest_BU, num_words=self.num_words, pooling=self.method.pooling, dtype=self.words.dtype)
        return bow.soft_bow(distances, delta=self.method.delta_base * self.msd, pooling=self.method.pooling)

    @abstractmethod
    def _read(
        self, map_BCHW: Tensor, distances: bow.Distances, nearest_BU: Tensor, *, draws_B: Tensor, step: int, comm: Comm
    ) -> Tensor:
        """Return the targets, [B, K], and move the words."""


class Queue(Vocabulary):
    """K feature vectors, first in, first out: one per image of the global batch and step, in rank order."""

    pointer: Tensor

    def __init__(self, method: Obow, *, num_channels: int):
        super().__init__(method, num_channels=num_channels)
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    def _read(
        self, map_BCHW: Tensor, distances: bow.Distances, nearest_BU: Tensor, *, draws_B: Tensor, step: int, comm: Comm
    ) -> Tensor:
        target_BK = self._nearest_word_targets(distances, nearest_BU)
        vectors_NC = comm.gather(bow.queue_vectors(map_BCHW, kind=self.method.queue_vector, draws_B=draws_B))
        slots = bow.queue_slots(self.pointer, num_vectors=len(vectors_NC), num_words=self.num_words)
        self.words.index_copy_(0, slots, vectors_NC[-len(slots) :])
        self.inserted_at.index_fill_(0, slots, step)
        self.pointer.add_(len(vectors_NC)).remainder_(self.num_words)
        return target_BK


class KMeans(Vocabulary):
    """Online k-means (eqs. 6 and 7): moving averages of how many features fall to a word, N, and of their sum, M.

    A word starts with N = 1 and M = the word. The paper does not say where the words start; noise is nearest to
    nothing, so a word of the start that was never nearest counts as dead from the first step and is filled from the
    batch at once.
    """

    counts: Tensor
    sums: Tensor
    last_used: Tensor

    def __init__(self, method: Obow, *, num_channels: int):
        super().__init__(method, num_channels=num_channels)
        self.register_buffer("counts", torch.ones(method.num_words))
        self.register_buffer("sums", self.words.clone())
        self.register_buffer("last_used", torch.full((method.num_words,), -1 - method.kmeans_patience, dtype=torch.int64))

    def _follow(self, counts_K: Tensor, sums_KC: Tensor, *, moves_K: Tensor, step: int) -> None:
        """Take n and m of the global batch into the averages; of the words, move those marked."""
        gamma = self.method.kmeans_momentum
        self.counts.mul_(gamma).add_(counts_K, alpha=1 - gamma)
        self.sums.mul_(gamma).add_(sums_KC, alpha=1 - gamma)
        self.words.copy_(torch.where(moves_K[:, None], self.sums / self.counts[:, None], self.words))
        self.last_used.masked_fill_(moves_K, step)

    def _replace_dead(self, map_BCHW: Tensor, *, draws_B: Tensor, step: int, comm: Comm) -> None:
        """Replace words unused for more than `kmeans_patience` steps, longest dead first, by one local vector per image."""
        vectors_NC = comm.gather(bow.queue_vectors(map_BCHW, kind="local", draws_B=draws_B))
        slots = self.last_used.argsort(stable=True)[: len(vectors_NC)]
        vectors_NC = vectors_NC[: len(slots)]
        dead = step - self.last_used[slots] > self.method.kmeans_patience
        # Masks of a fixed size: how many are dead is never asked, so a GPU is not waited for.
        self.words[slots] = torch.where(dead[:, None], vectors_NC, self.words[slots])
        self.sums[slots] = torch.where(dead[:, None], vectors_NC, self.sums[slots])
        self.counts[slots] = torch.where(dead, 1.0, self.counts[slots])
        self.inserted_at[slots] = torch.where(dead, step, self.inserted_at[slots])
        self.last_used[slots] = torch.where(dead, step, self.last_used[slots])


class ReplacingKMeans(KMeans):
    """Variant (a) of appendix D: words that are rarely nearest to any feature are replaced."""

    def _read(
        self, map_BCHW: Tensor, distances: bow.Distances, nearest_BU: Tensor, *, draws_B: Tensor, step: int, comm: Comm
    ) -> Tensor:
        target_BK = self._nearest_word_targets(distances, nearest_BU)
        counts_K, sums_KC = bow.word_sums(distances.local_BUC.flatten(0, 1), nearest_BU.flatten(), num_words=self.num_words)
        counts_K, sums_KC = comm.mean(counts_K) * comm.world_size, comm.mean(sums_KC) * comm.world_size
        self._follow(counts_K, sums_KC, moves_K=counts_K > 0, step=step)
        self._replace_dead(map_BCHW, draws_B=draws_B, step=step, comm=comm)
        return target_BK


class SinkhornKMeans(KMeans):
    """Variant (b) of appendix D: balanced assignments drive both the k-means update and the targets.

    epsilon is `sinkhorn_epsilon` times the mean squared distance of the global batch to the words, so that it follows the
    scale of the features as delta does. Every word has its share of every batch; only the noise of the start is replaced.
    Hard codes are the largest entry of each balanced code; the words follow the soft ones all the same.
    """

    def _read(
        self, map_BCHW: Tensor, distances: bow.Distances, nearest_BU: Tensor, *, draws_B: Tensor, step: int, comm: Comm
    ) -> Tensor:
        epsilon = self.method.sinkhorn_epsilon * comm.mean(distances.mean())
        potential_K = bow.sinkhorn(distances, epsilon=epsilon, iterations=self.method.sinkhorn_iterations, gather=comm.gather)
        counts_K, sums_KC = torch.zeros_like(self.counts), torch.zeros_like(self.sums)
        targets = []
        for images, dist_BUK in distances.chunks():
            codes_BUK = bow.balanced_log_codes(dist_BUK, potential_K, epsilon=epsilon).exp_()
            counts_K += codes_BUK.sum(dim=(0, 1))
            with bow.full_precision(codes_BUK.device):
                sums_KC += codes_BUK.flatten(0, 1).T @ distances.local_BUC[images].flatten(0, 1)
            if self.method.codes == "hard":
                largest_BU = codes_BUK.argmax(dim=-1)
                targets.append(
                    bow.hard_bow(largest_BU, num_words=self.num_words, pooling=self.method.pooling, dtype=codes_BUK.dtype)
                )
            else:
                targets.append(F.normalize(bow.pool(codes_BUK, pooling=self.method.pooling), p=1, dim=1))
        counts_K, sums_KC = comm.mean(counts_K) * comm.world_size, comm.mean(sums_KC) * comm.world_size
        self._follow(counts_K, sums_KC, moves_K=self.last_used >= 0, step=step)
        self._replace_dead(map_BCHW, draws_B=draws_B, step=step, comm=comm)
        return torch.cat(targets)


def level_metrics(level: Level, reading: Reading, log_prediction_NK: Tensor, *, comm: Comm) -> dict[str, Tensor]:
    """Return what a step says about one level: its words, its targets and the student's prediction of them."""
    target_entropy_B = bow.entropy(reading.targets)
    return {
        f"distance_{level}": reading.mean_nearest,
        f"words_used_{level}": reading.words_used,
        f"target_entropy_{level}": target_entropy_B.mean(),
        f"perplexity_image_{level}": target_entropy_B.exp().mean(),
        f"perplexity_batch_{level}": bow.perplexity(comm.mean(reading.targets.mean(dim=0))),
        f"prediction_entropy_{level}": bow.entropy_of_logs(log_prediction_NK).mean(),
    }


VOCABULARIES: dict[str, type[Vocabulary]] = {
    "queue": Queue,
    "kmeans_replace": ReplacingKMeans,
    "kmeans_sinkhorn": SinkhornKMeans,
}
