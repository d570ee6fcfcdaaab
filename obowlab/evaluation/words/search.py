"""The best locations of every visual word among any number of images, in one pass and in bounded memory.

Shapes: B images, U locations of a map without its border, K words, P patches per word, C channels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from obowlab import text
from obowlab.config import Level, Machine, Views
from obowlab.data.datasets import Split
from obowlab.errors import UserError
from obowlab.evaluation.features import BATCH_SIZE, REPORT_EVERY_S, frozen
from obowlab.methods import LevelWords, VisualWords, bow
from obowlab.randomness import Ints
from obowlab.views.loaders import centre_loader, num_workers
from obowlab.views.photometric import normalise


@dataclass(frozen=True)
class CentreViews:
    """The centre views of a split's images, ready for a network.

    Attributes:
        split: the images.
        views: sizes; only those of the original view are used.
        machine: loader backend, workers and memory layout.
        device: where to compute.
    """

    split: Split
    views: Views
    machine: Machine
    device: torch.device

    def batches(self, indices: Ints, *, batch_size: int) -> Iterator[tuple[Ints, Tensor, Tensor]]:
        """Yield positions [B], pixels uint8 [B, S, S, 3] and the network's input float32 [B, 3, S, S], in the order given."""
        layout = torch.channels_last if self.machine.channels_last else torch.contiguous_format
        loader = centre_loader(
            self.split,
            indices=indices,
            views=self.views,
            batch_size=batch_size,
            backend=self.machine.loader,
            workers=num_workers(self.machine),
            pin=self.device.type == "cuda",
        )
        for positions, pixels in loader:
            yield positions, pixels, normalise(pixels, device=self.device).contiguous(memory_format=layout)


class TopPatches:
    """The best P locations of every word among all images seen so far, at most one per image.

    A location is better when the word's soft code there (eq. 4) is higher; as codes saturate at 1 and at 0, then when it is
    nearer to the word; then when its image came earlier. At most one per image is a choice: the paper does not say, and
    neighbouring locations would fill a row with one thing. What is kept does not grow with the number of images.

    Attributes:
        scores_KP: codes in [0, 1], the best first; -1 where there were fewer than P images.
        distances_KP: squared distances to the word.
        images_KP: positions of the images in the split, int64; -1 where there were fewer than P images.
        locations_KP: row-major numbers of the locations in the map without its border, int64.
        nearest_K: how many locations were nearest to each word, int64.
        num_locations: how many locations were seen.
        distance_sum: of the squared distances to the nearest words, over all locations, float64.
    """

    def __init__(self, *, num_words: int, per_word: int, device: torch.device) -> None:
        self.per_word = per_word
        self.scores_KP = torch.full((num_words, per_word), -1.0, device=device)
        self.distances_KP = torch.full((num_words, per_word), torch.inf, device=device)
        self.images_KP = torch.full((num_words, per_word), -1, dtype=torch.int64, device=device)
        self.locations_KP = torch.full((num_words, per_word), -1, dtype=torch.int64, device=device)
        self.nearest_K = torch.zeros(num_words, dtype=torch.int64, device=device)
        self.num_locations = 0
        self.distance_sum = torch.zeros((), dtype=torch.float64, device=device)

    def update(self, local_BUC: Tensor, *, words: LevelWords, images: Ints) -> None:
        """Take in the features of a batch of images that were not seen before.

        Args:
            local_BUC: the teacher's features without the border.
            words: of the level.
            images: positions of the images in the split, [B].
        """
        best: list[tuple[Tensor, Tensor, Tensor]] = []
        for _, dist_BUK in bow.Distances(local_BUC, words.vectors):
            nearest = dist_BUK.min(dim=-1)
            self.nearest_K += torch.bincount(nearest.indices.flatten(), minlength=len(self.nearest_K))
            self.num_locations += nearest.indices.numel()
            self.distance_sum += nearest.values.sum(dtype=torch.float64)
            best.append(best_locations(dist_BUK, delta=words.delta))
        scores_BK, distances_BK, locations_BK = (torch.cat(parts) for parts in zip(*best, strict=True))
        images_KB = torch.from_numpy(images).to(scores_BK.device).expand(len(self.nearest_K), -1)
        # What is kept comes first: the stable sorts then leave the earlier of two equals in front.
        scores = torch.cat((self.scores_KP, scores_BK.T), dim=1)
        distances = torch.cat((self.distances_KP, distances_BK.T), dim=1)
        by_distance = distances.argsort(dim=1, stable=True)
        by_score = scores.gather(1, by_distance).argsort(dim=1, descending=True, stable=True)
        kept = by_distance.gather(1, by_score)[:, : self.per_word]
        self.scores_KP, self.distances_KP = scores.gather(1, kept), distances.gather(1, kept)
        self.images_KP = torch.cat((self.images_KP, images_KB), dim=1).gather(1, kept)
        self.locations_KP = torch.cat((self.locations_KP, locations_BK.T), dim=1).gather(1, kept)


def best_locations(dist_BUK: Tensor, *, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return for every image and word the best location: its code, squared distance and number, [B, K] each.

    The nearest distance is taken off first, which changes no code and keeps every code finite, also where delta is 0 and a
    code is one-hot.
    """
    shifted_BUK = dist_BUK.amin(dim=-1, keepdim=True) - dist_BUK
    codes_BUK = torch.softmax(shifted_BUK.div_(delta.clamp(min=torch.finfo(dist_BUK.dtype).tiny)), dim=-1)
    scores_BK = codes_BUK.amax(dim=1)
    nearest = torch.where(codes_BUK == scores_BK[:, None], dist_BUK, torch.inf).min(dim=1)
    return scores_BK, nearest.values, nearest.indices


def find_patches(
    words: VisualWords,
    *,
    levels: Sequence[Level],
    views: CentreViews,
    indices: Ints,
    per_word: int,
    report: Callable[[str], None],
) -> tuple[dict[Level, TopPatches], dict[Level, tuple[int, int]]]:
    """Read every image once and return the best patches of every level, and height and width of the levels' maps.

    Args:
        words: teacher and vocabularies, on the device of `views`.
        levels: which to look at.
        views: the images.
        indices: positions of the images in the split, each once.
        per_word: P.
        report: called with a line now and then.
    """
    tops = {
        level: TopPatches(num_words=len(words.levels[level].vectors), per_word=per_word, device=views.device) for level in levels
    }
    sizes: dict[Level, tuple[int, int]] = {}
    done, started = 0, time.monotonic()
    last = started
    with frozen(words.teacher):
        for positions, _, images in views.batches(indices, batch_size=BATCH_SIZE):
            maps, _ = words.teacher.levels(images, levels)
            for level, top in tops.items():
                sizes[level] = (maps[level].shape[2], maps[level].shape[3])
                local_BUC = bow.crop_border(maps[level], border=words.levels[level].border).flatten(2).transpose(1, 2)
                if not torch.isfinite(local_BUC).all():
                    raise UserError("The teacher gives features that are not finite: its weights are broken.")
                top.update(local_BUC, words=words.levels[level], images=positions)
            done += len(positions)
            if time.monotonic() - last > REPORT_EVERY_S:
                last = time.monotonic()
                rate = done / (last - started)
                left_s = (len(indices) - done) / rate
                report(f"{text.duration(left_s)} left · {done}/{len(indices)} images · {rate:.0f} img/s")
    return tops, sizes
