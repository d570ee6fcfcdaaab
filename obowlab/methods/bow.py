"""The mathematics of online bags of visual words: pure functions of tensors (docs/method.md, 3 to 6).

Shape suffixes, one letter per dimension:

    B  images of the batch              K  visual words of the vocabulary
    V  views of one image and kind      C  channels of the teacher's level
    U  locations of a feature map       D  channels of the student's feature
    H, W  height, width                 N  any number of rows

Distances decide everything here and cancel to noise in reduced precision, so they are taken in float32 (or in the
wider type of the features) with autocast and TF32 off, whatever the encoder runs in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from obowlab.precision import full_precision

CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 28}
"""Distances made at a time: on a CPU as many as its cache has room for (16 MiB), on a GPU those of a usual batch (1 GiB)."""

KEEP_ELEMENTS = 1 << 27
"""Distances of one level that a training step keeps instead of making them twice (512 MiB)."""


def at_least_float32(x: Tensor) -> Tensor:
    """Widen half-precision values to float32; leave float32 and float64 alone."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# --------------------------------------------------------------------------------------------------------------- teacher


def crop_border(map_BCHW: Tensor, *, border: int) -> Tensor:
    """Drop `border` pixels on each side of a feature map."""
    height, width = map_BCHW.shape[-2:]
    return map_BCHW[..., border : height - border, border : width - border]


def squared_distances(features_NC: Tensor, words_KC: Tensor, *, words_norm_K: Tensor | None = None) -> Tensor:
    """Return the squared Euclidean distance of every feature to every word, [N, K], never negative.

    Args:
        features_NC: features.
        words_KC: words.
        words_norm_K: the words' squared lengths, if they are known.
    """
    features_NC, words_KC = at_least_float32(features_NC), at_least_float32(words_KC)
    words_norm_K = words_KC.square().sum(1) if words_norm_K is None else words_norm_K
    with full_precision(words_KC.device):
        dist_NK = torch.addmm(words_norm_K, features_NC, words_KC.T, alpha=-2)
        return dist_NK.add_(features_NC.square().sum(1, keepdim=True)).clamp_(min=0)


class Distances:
    """The squared distances of a batch's locations to the words, a few images at a time, as often as they are read.

    A training step reads them twice: mu_MSD, on which the codes depend, needs the nearest word of *every* location first. What
    fits is kept for the second time, the rest is computed again: bounded memory whatever the batch (docs/method.md, 4.6).

    Attributes:
        local_BUC: features of the batch's locations.
        words_KC: words.
    """

    def __init__(self, local_BUC: Tensor, words_KC: Tensor, *, limit: int | None = None, keep: int = 0) -> None:
        """Compute nothing yet.

        Args:
            local_BUC: features of the batch's locations.
            words_KC: words, which must not change meanwhile.
            limit: most distances made at a time; one image's are the least. By default that of the device.
            keep: most distances kept between two readings.
        """
        self.local_BUC, self.words_KC = local_BUC, words_KC
        limit = CHUNK_ELEMENTS.get(local_BUC.device.type, CHUNK_ELEMENTS["cpu"]) if limit is None else limit
        per_image = local_BUC.shape[1] * len(words_KC)
        self._chunk = max(1, limit // per_image)
        self._room = keep
        self._kept: list[Tensor] = []

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (local_BUC, dist_BUK) of a few images, which a reader must not write to."""
        words_norm_K = at_least_float32(self.words_KC).square().sum(1)
        for number, part_BUC in enumerate(torch.split(self.local_BUC, self._chunk)):
            if number < len(self._kept):
                yield part_BUC, self._kept[number]
                continue
            dist_NK = squared_distances(part_BUC.flatten(0, 1), self.words_KC, words_norm_K=words_norm_K)
            dist_BUK = dist_NK.view(*part_BUC.shape[:2], -1)
            if number == len(self._kept) and dist_BUK.numel() <= self._room:
                self._kept.append(dist_BUK)
                self._room -= dist_BUK.numel()
            yield part_BUC, dist_BUK


def nearest_words(distances: Distances) -> tuple[Tensor, Tensor]:
    """Return the squared distance of every location to its nearest word, and that word's number, both [B, U]."""
    found = [dist_BUK.min(dim=-1) for _, dist_BUK in distances]
    return torch.cat([each.values for each in found]), torch.cat([each.indices for each in found])


def mean_squared_distance(local_BUC: Tensor, words_KC: Tensor) -> Tensor:
    """Return the mean over all pairs of a location and a word, without making them: E|x|² + E|v|² − 2 E[x]·E[v]."""
    local_NC = local_BUC.flatten(0, 1)
    cross = (local_NC.mean(0) * words_KC.mean(0)).sum()
    return local_NC.square().sum(1).mean() + words_KC.square().sum(1).mean() - 2 * cross


def soft_assign(dist_BUK: Tensor, *, delta: Tensor) -> Tensor:
    """Return the soft code of every location (eq. 4), [B, U, K], rows summing to 1."""
    return torch.softmax(dist_BUK * (-1 / delta), dim=-1)


def pool(codes_BUK: Tensor, *, pooling: str) -> Tensor:
    """Reduce the codes of an image's locations to one vector, [B, K]."""
    return codes_BUK.amax(dim=1) if pooling == "max" else codes_BUK.mean(dim=1)


def bow_target(pooled_BK: Tensor) -> Tensor:
    """Scale every row of pooled codes to sum 1: the BoW target."""
    return F.normalize(pooled_BK, p=1, dim=1)


def soft_bow(distances: Distances, *, delta: Tensor, pooling: str) -> Tensor:
    """Return the BoW targets of soft codes, [B, K], rows summing to 1."""
    return bow_target(torch.cat([pool(soft_assign(dist_BUK, delta=delta), pooling=pooling) for _, dist_BUK in distances]))


def hard_bow(nearest_BU: Tensor, *, num_words: int, pooling: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the BoW targets of one-hot codes, [B, K], rows summing to 1."""
    ones_BU = torch.ones_like(nearest_BU, dtype=dtype)
    target_BK = ones_BU.new_zeros(len(nearest_BU), num_words)
    if pooling == "max":
        target_BK.scatter_(1, nearest_BU, ones_BU)
    else:
        target_BK.scatter_add_(1, nearest_BU, ones_BU)
    return bow_target(target_BK)


def next_msd(msd: Tensor, mean_nearest: Tensor, *, momentum: float) -> Tensor:
    """Return mu_MSD after one step: the moving average of the mean squared distance to the nearest word."""
    return momentum * msd + (1 - momentum) * mean_nearest


# ------------------------------------------------------------------------------------------------------------ vocabulary


def pick_locations(uniforms_B: Tensor, vectors_BUC: Tensor) -> Tensor:
    """Return one location's vector per image, [B, C], at floor(u · U) for u in [0, 1)."""
    num_locations = vectors_BUC.shape[1]
    # The product with a number next to 1 can round up to U.
    index_B = (uniforms_B * num_locations).long().clamp(max=num_locations - 1)
    return vectors_BUC[torch.arange(len(index_B), device=index_B.device), index_B]


def queue_vectors(map_BCHW: Tensor, *, kind: str, uniforms_B: Tensor) -> Tensor:
    """Return the vector each image offers to the queue, [B, C] (paper section 3.1, choices a, b, c).

    Args:
        map_BCHW: border-cropped teacher map; at least 3x3 for `local_average`.
        kind: `local` (a random location), `global_average`, or `local_average` (3x3 means, then a random one).
        uniforms_B: random numbers in [0, 1), one per image.
    """
    if kind == "global_average":
        return map_BCHW.mean(dim=(2, 3))
    if kind == "local_average":
        map_BCHW = F.avg_pool2d(map_BCHW, kernel_size=3, stride=1)
    return pick_locations(uniforms_B, map_BCHW.flatten(2).transpose(1, 2))


def queue_slots(pointer: Tensor, *, num_vectors: int, num_words: int) -> Tensor:
    """Return where the newest min(num_vectors, num_words) of `num_vectors` vectors go in a ring of `num_words`.

    As if they were inserted one by one from `pointer` on: of more vectors than slots, the newest survive.
    """
    first = max(0, num_vectors - num_words)
    return (pointer + torch.arange(first, num_vectors, device=pointer.device)) % num_words


def word_sums(local_NC: Tensor, nearest_N: Tensor, *, num_words: int) -> tuple[Tensor, Tensor]:
    """Return how many features are nearest to each word, [K], and their sum, [K, C] (n and m of eqs. 6 and 7)."""
    counts_K = local_NC.new_zeros(num_words).index_add_(0, nearest_N, local_NC.new_ones(len(nearest_N)))
    sums_KC = local_NC.new_zeros(num_words, local_NC.shape[1]).index_add_(0, nearest_N, local_NC)
    return counts_K, sums_KC


def sinkhorn(distances: Distances, *, epsilon: Tensor, iterations: int, all_gather: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the words' potentials f, [K], of the balanced assignment (appendix D): code = softmax_k(f_k − D_uk / ε).

    Alternate the two marginals: every location has one unit of mass (the softmax), every word the same share of all. Starting
    and ending with the locations, each code sums to 1; the words are balanced as far as `iterations` got.

    The first mass of a far word can be too small for a float and is summed in the log domain. No later one is: balancing
    the words divides their codes by their masses, which makes each code at most 1 and a location's sum at most K, so that
    every word keeps a mass of at least 1/K. Plain sums will do.

    Args:
        distances: of this process's images.
        epsilon: temperature, in the unit of the distances.
        iterations: at least 1.
        all_gather: concatenates a tensor over the processes; makes the words' shares global.
    """
    potential_K = distances.words_KC.new_zeros(len(distances.words_KC))
    for iteration in range(iterations):
        if iteration == 0:
            masses = torch.stack([_first_log_mass(dist_BUK.flatten(0, 1), epsilon=epsilon) for _, dist_BUK in distances])
            log_mass_K = all_gather(masses.logsumexp(0, keepdim=True)).logsumexp(0)
        else:
            codes = (balanced_codes(dist_BUK, potential_K, epsilon=epsilon) for _, dist_BUK in distances)
            masses = torch.stack([codes_BUK.sum((0, 1)) for codes_BUK in codes])
            mass_K = all_gather(masses.sum(0, keepdim=True)).sum(0)
            # Only the rounding of huge D / epsilon, at an epsilon of no use, can make a mass 0; no infinity may come of it.
            log_mass_K = mass_K.clamp_(min=torch.finfo(mass_K.dtype).tiny).log_()
        potential_K = potential_K - log_mass_K
        potential_K -= potential_K.mean()  # a constant changes no code; kept near 0
    return potential_K


def _first_log_mass(dist_NK: Tensor, *, epsilon: Tensor) -> Tensor:
    """Return the logarithm of every word's mass at potential 0, [K], whatever its range."""
    log_codes_NK = dist_NK / -epsilon
    log_codes_NK -= log_codes_NK.logsumexp(1, keepdim=True)
    largest_K = log_codes_NK.amax(0)
    return log_codes_NK.sub_(largest_K).exp_().sum(0).log_().add_(largest_K)


def balanced_codes(dist_BUK: Tensor, potential_K: Tensor, *, epsilon: Tensor) -> Tensor:
    """Return every location's balanced code, rows summing to 1."""
    scores_BUK = (dist_BUK / -epsilon).add_(potential_K)
    return torch.softmax(scores_BUK, dim=-1, out=scores_BUK)


# ------------------------------------------------------------------------------------------------- prediction and loss


class _UnitRows(torch.autograd.Function):
    """F.normalize(x, dim=1) with a backward pass in closed form: it goes over a large matrix twice instead of eight times."""

    @staticmethod
    def forward(ctx: Any, x_NC: Tensor) -> Tensor:
        norm_N1 = torch.linalg.vector_norm(x_NC, dim=1, keepdim=True).clamp_(min=1e-12)
        unit_NC: Tensor = x_NC / norm_N1
        ctx.save_for_backward(unit_NC, norm_N1)
        return unit_NC

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad_NC = grads[0]
        unit_NC, norm_N1 = ctx.saved_tensors
        radial_N1 = torch.linalg.vecdot(grad_NC, unit_NC)[:, None]
        tangential_NC: Tensor = torch.addcmul(grad_NC, unit_NC, radial_N1, value=-1)
        return tangential_NC.div_(norm_N1)


def unit_rows(x_NC: Tensor) -> Tensor:
    """Scale every row to length 1."""
    return cast(Tensor, _UnitRows.apply(x_NC))


def bow_logits(features_NC: Tensor, weights_KC: Tensor, *, kappa: Tensor | float) -> Tensor:
    """Return the logits of the predicted BoW, kappa · s · G(V)ᵀ (eqs. 1 and 5), [N, K]."""
    features_NC, weights_KC = at_least_float32(features_NC), at_least_float32(weights_KC)
    with full_precision(features_NC.device):
        return (kappa * features_NC) @ weights_KC.T


def cross_entropy(log_prediction_BVK: Tensor, target_BK: Tensor) -> Tensor:
    """Return eq. 2 averaged over images and their views: each view must predict the whole BoW on its own."""
    return -(log_prediction_BVK.mean(dim=1) * target_BK).sum(dim=1).mean()


def mixed_cross_entropy(log_prediction_BVK: Tensor, target_BVK: Tensor) -> Tensor:
    """Return eq. 2 averaged over images and views that have targets of their own."""
    return -(log_prediction_BVK * target_BVK).sum(dim=-1).mean()


def prediction_losses(
    log_predictions: Mapping[str, Tensor], target_BK: Tensor, *, cutmix_lambda: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return for every kind of views its loss and the entropy of its targets, which no prediction's loss is below, 0-dim.

    Args:
        log_predictions: logarithms of the predicted BoW of every view, [B·V, K].
        target_BK: the BoW targets of the images.
        cutmix_lambda: for mixed kinds, the fraction of every view that shows its own image, [B·V].
    """
    losses, target_entropies = {}, {}
    for kind, log_prediction_NK in log_predictions.items():
        log_prediction_BVK = log_prediction_NK.view(len(target_BK), -1, target_BK.shape[1])
        if kind in cutmix_lambda:
            target_BVK = mixed_targets(target_BK, cutmix_lambda[kind].view(len(target_BK), -1))
            losses[kind] = mixed_cross_entropy(log_prediction_BVK, target_BVK)
            target_entropies[kind] = entropy(target_BVK).mean()
        else:
            losses[kind] = cross_entropy(log_prediction_BVK, target_BK)
            target_entropies[kind] = entropy(target_BK).mean()
    return losses, target_entropies


def neighbours(x: Tensor) -> Tensor:
    """Swap rows 0 and 1, 2 and 3, ...: the images whose crops cutmix mixes."""
    return x.view(-1, 2, *x.shape[1:]).flip(1).view_as(x)


def mixed_targets(target_BK: Tensor, lambda_BV: Tensor) -> Tensor:
    """Return the target of every view that shows its own image to the part lambda and else the neighbouring one, [B, V, K]."""
    own_BVK = lambda_BV[..., None].to(target_BK.dtype) * target_BK[:, None]
    return own_BVK + (1.0 - lambda_BV)[..., None].to(target_BK.dtype) * neighbours(target_BK)[:, None]


def entropy(probability: Tensor) -> Tensor:
    """Return the entropy of the last dimension in nats; 0 log 0 is 0."""
    terms: Tensor = torch.special.entr(probability)
    return terms.sum(-1)


def entropy_of_logs(log_probability: Tensor) -> Tensor:
    """Return the entropy of the last dimension in nats, from finite logarithms."""
    return -(log_probability.exp() * log_probability).sum(-1)


def perplexity(probability: Tensor) -> Tensor:
    """Return exp(entropy): how many equally likely words would be as uncertain."""
    return entropy(probability).exp()
