"""The vocabulary of visual words: a queue, or online k-means (docs/method.md, 3; paper section 3.1 and appendix D).

A vocabulary has two verbs. `assign` describes the teacher's map of one level in the words as they are and changes nothing;
`update` moves the words, which is the last thing a step does. Its state is in persistent buffers, equal on every process.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from obowlab.config import Level, Obow
from obowlab.methods import bow
from obowlab.methods.base import Comm
from obowlab.precision import full_precision

AUTHORS_MSD = 0.5
"""Where mu_MSD starts in the authors' code; far from its true value for hundreds of steps.

https://github.com/valeoai/obow/blob/45af1490d3c076a924ceaf02bbaf201bc74c7f99/obow/builder_obow.py#L348
"""


@dataclass(frozen=True)
class WordAssignment:
    """A batch of this process described in the words of one level.

    Attributes:
        targets: the BoW targets, [B, K], rows summing to 1.
        nearest: number of every location's nearest word, [B, U].
        mean_distance: mean squared distance to the nearest word over the locations of all processes, 0-dim.
    """

    targets: Tensor
    nearest: Tensor
    mean_distance: Tensor


@dataclass(frozen=True)
class VocabularyAssignment(WordAssignment):
    """What `Vocabulary.assign` found, and what `Vocabulary.update` needs of it.

    Attributes:
        inner_map: the teacher's map without its border, [B, C, H, W].
        msd: mu_MSD with this batch taken in, 0-dim.
        counts: for k-means, how many features of this process fall to each word, [K].
        sums: for k-means, their sum, [K, C].
    """

    inner_map: Tensor
    msd: Tensor
    counts: Tensor | None = None
    sums: Tensor | None = None


class Vocabulary(nn.Module, ABC):
    """The words of one level, mu_MSD and the age of the words; subclasses decide how the words move.

    Words start as rectified Gaussian noise, as the authors' queue does:
    https://github.com/valeoai/obow/blob/45af1490d3c076a924ceaf02bbaf201bc74c7f99/obow/builder_obow.py#L344
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
    def assign(self, map_BCHW: Tensor, *, comm: Comm) -> VocabularyAssignment:
        """Return the BoW targets of a batch, and change nothing: steps (5), (6), (8) and (9) of docs/method.md, 7.

        Distances are to the words as they are; the temperature is that of mu_MSD with this batch taken in.

        Args:
            map_BCHW: the teacher's map, border included.
            comm: the other processes; their images count as part of the batch.
        """
        map_BCHW = bow.at_least_float32(bow.crop_border(map_BCHW, border=self.method.border))
        local_BUC = map_BCHW.flatten(2).transpose(1, 2).contiguous()
        distances = bow.Distances(local_BUC, self.words, keep=bow.KEEP_ELEMENTS)
        distance_BU, nearest_BU = bow.nearest_words(distances)
        mean_distance = comm.all_reduce_mean(distance_BU.mean())
        moved = bow.next_msd(self.msd, mean_distance, momentum=self.method.msd_momentum)
        msd = torch.where(self.msd_started, moved, mean_distance)
        targets, counts, sums = self._describe(distances, nearest_BU, msd=msd, comm=comm)
        return VocabularyAssignment(
            targets=targets,
            nearest=nearest_BU,
            mean_distance=mean_distance,
            inner_map=map_BCHW,
            msd=msd,
            counts=counts,
            sums=sums,
        )

    @torch.no_grad()
    def update(self, assignment: VocabularyAssignment, *, uniforms_B: Tensor, step: int, comm: Comm) -> None:
        """Take a batch into mu_MSD and the words, step (7): the last thing a training step does.

        Args:
            assignment: of the batch, from `assign`.
            uniforms_B: random numbers in [0, 1), one per image: the location whose vector is offered to the vocabulary.
            step: number of this step, from 0.
            comm: the other processes; their images count as part of the batch.
        """
        self.msd.copy_(assignment.msd)
        self.msd_started.fill_(True)
        self._move(assignment, uniforms_B=uniforms_B, step=step, comm=comm)

    def mean_age(self, *, step: int) -> Tensor:
        """Return the mean number of steps since the words were inserted, 0-dim."""
        return step - self.inserted_at.to(self.words.dtype).mean()

    def _describe(
        self, distances: bow.Distances, nearest_BU: Tensor, *, msd: Tensor, comm: Comm
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the targets of eq. 4 or of its hard variant, [B, K]; for k-means also the `counts` and `sums`."""
        pooling = self.method.pooling
        if self.method.codes == "hard":
            return bow.hard_bow(nearest_BU, num_words=self.num_words, pooling=pooling, dtype=self.words.dtype), None, None
        return bow.soft_bow(distances, delta=self.method.delta_base * msd, pooling=pooling), None, None

    @abstractmethod
    def _move(self, assignment: VocabularyAssignment, *, uniforms_B: Tensor, step: int, comm: Comm) -> None:
        """Move the words."""


class Queue(Vocabulary):
    """K feature vectors, first in, first out: one per image of the global batch and step, in rank order."""

    pointer: Tensor

    def __init__(self, method: Obow, *, num_channels: int):
        super().__init__(method, num_channels=num_channels)
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    def _move(self, assignment: VocabularyAssignment, *, uniforms_B: Tensor, step: int, comm: Comm) -> None:
        vectors_BC = bow.queue_vectors(assignment.inner_map, kind=self.method.queue_vector, uniforms_B=uniforms_B)
        vectors_NC = comm.all_gather(vectors_BC)
        slots = bow.queue_slots(self.pointer, num_vectors=len(vectors_NC), num_words=self.num_words)
        self.words.index_copy_(0, slots, vectors_NC[-len(slots) :])
        self.inserted_at.index_fill_(0, slots, step)
        self.pointer.add_(len(vectors_NC)).remainder_(self.num_words)


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

    def _move(self, assignment: VocabularyAssignment, *, uniforms_B: Tensor, step: int, comm: Comm) -> None:
        assert assignment.counts is not None
        assert assignment.sums is not None
        both_KC = torch.cat((assignment.counts[:, None], assignment.sums), dim=1)
        counts_K, sums_KC = (comm.all_reduce_mean(both_KC) * comm.world_size).tensor_split((1,), dim=1)
        counts_K = counts_K[:, 0]
        moves_K = self._moves(counts_K)
        gamma = self.method.kmeans_momentum
        self.counts.mul_(gamma).add_(counts_K, alpha=1 - gamma)
        self.sums.mul_(gamma).add_(sums_KC, alpha=1 - gamma)
        self.words.copy_(torch.where(moves_K[:, None], self.sums / self.counts[:, None], self.words))
        self.last_used.masked_fill_(moves_K, step)
        self._replace_dead(assignment.inner_map, uniforms_B=uniforms_B, step=step, comm=comm)

    @abstractmethod
    def _moves(self, counts_K: Tensor) -> Tensor:
        """Return which words follow their averages in this step, [K], from the counts of the global batch."""

    def _replace_dead(self, map_BCHW: Tensor, *, uniforms_B: Tensor, step: int, comm: Comm) -> None:
        """Replace words unused for more than `kmeans_patience` steps, longest dead first, by one local vector per image."""
        vectors_NC = comm.all_gather(bow.queue_vectors(map_BCHW, kind="local", uniforms_B=uniforms_B))
        slots = self.last_used.argsort(stable=True)[: len(vectors_NC)]
        vectors_NC = vectors_NC[: len(slots)]
        dead = step - self.last_used[slots] > self.method.kmeans_patience
        # Masks of a fixed size, because counting the dead words would make the host wait for a GPU.
        self.words[slots] = torch.where(dead[:, None], vectors_NC, self.words[slots])
        self.sums[slots] = torch.where(dead[:, None], vectors_NC, self.sums[slots])
        self.counts[slots] = torch.where(dead, 1.0, self.counts[slots])
        self.inserted_at[slots] = torch.where(dead, step, self.inserted_at[slots])
        self.last_used[slots] = torch.where(dead, step, self.last_used[slots])


class ReplacingKMeans(KMeans):
    """Variant (a) of appendix D: words that are rarely nearest to any feature are replaced."""

    def _describe(
        self, distances: bow.Distances, nearest_BU: Tensor, *, msd: Tensor, comm: Comm
    ) -> tuple[Tensor, Tensor, Tensor]:
        targets, *_ = super()._describe(distances, nearest_BU, msd=msd, comm=comm)
        counts, sums = bow.word_sums(distances.local_BUC.flatten(0, 1), nearest_BU.flatten(), num_words=self.num_words)
        return targets, counts, sums

    def _moves(self, counts_K: Tensor) -> Tensor:
        return counts_K > 0


class SinkhornKMeans(KMeans):
    """Variant (b) of appendix D: balanced assignments drive both the k-means update and the targets.

    epsilon is `sinkhorn_epsilon` times the mean squared distance of the global batch to the words, so that it follows the
    scale of the features as delta does. Every word has its share of every batch; only the noise of the start is replaced.
    Hard codes are the largest entry of each balanced code; the words follow the soft ones all the same.
    """

    def _describe(
        self, distances: bow.Distances, nearest_BU: Tensor, *, msd: Tensor, comm: Comm
    ) -> tuple[Tensor, Tensor, Tensor]:
        epsilon = self.method.sinkhorn_epsilon * comm.all_reduce_mean(bow.mean_squared_distance(distances.local_BUC, self.words))
        potential_K = bow.sinkhorn(
            distances, epsilon=epsilon, iterations=self.method.sinkhorn_iterations, all_gather=comm.all_gather
        )
        counts_K, sums_KC = torch.zeros_like(self.counts), torch.zeros_like(self.sums)
        targets = []
        for part_BUC, dist_BUK in distances:
            codes_BUK = bow.balanced_codes(dist_BUK, potential_K, epsilon=epsilon)
            counts_K += codes_BUK.sum(dim=(0, 1))
            with full_precision(codes_BUK.device):
                sums_KC += codes_BUK.flatten(0, 1).T @ part_BUC.flatten(0, 1)
            targets.append(self._pooled(codes_BUK))
        return torch.cat(targets), counts_K, sums_KC

    def _pooled(self, codes_BUK: Tensor) -> Tensor:
        """Return the targets of balanced codes."""
        if self.method.codes == "hard":
            largest_BU = codes_BUK.argmax(dim=-1)
            return bow.hard_bow(largest_BU, num_words=self.num_words, pooling=self.method.pooling, dtype=codes_BUK.dtype)
        return bow.bow_target(bow.pool(codes_BUK, pooling=self.method.pooling))

    def _moves(self, counts_K: Tensor) -> Tensor:
        return self.last_used >= 0


@torch.no_grad()
def level_metrics(level: Level, assignment: WordAssignment, log_prediction_NK: Tensor, *, comm: Comm) -> dict[str, Tensor]:
    """Return what can be logged of one level: its words, its targets and the student's prediction of them."""
    target_BK = assignment.targets
    target_entropy_B = bow.entropy(target_BK)
    used_K = target_BK.new_zeros(target_BK.shape[1])
    used_K.index_fill_(0, assignment.nearest.flatten(), 1.0)  # to assign a number would wait for a GPU
    used_K, target_K = comm.all_reduce_mean(torch.stack((used_K, target_BK.mean(dim=0))))
    return {
        f"distance_{level}": assignment.mean_distance,
        f"words_used_{level}": 100.0 * (used_K > 0).to(used_K.dtype).mean(),
        f"target_entropy_{level}": target_entropy_B.mean(),
        f"perplexity_image_{level}": target_entropy_B.exp().mean(),
        f"perplexity_batch_{level}": bow.perplexity(target_K),
        f"prediction_entropy_{level}": bow.entropy_of_logs(log_prediction_NK).mean(),
    }


VOCABULARIES: dict[str, type[Vocabulary]] = {
    "queue": Queue,
    "kmeans_replace": ReplacingKMeans,
    "kmeans_sinkhorn": SinkhornKMeans,
}
