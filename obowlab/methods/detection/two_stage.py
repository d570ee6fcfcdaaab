"""What two-stage detectors share: proposals become regions, and a head says what each is and where (Ren et al. 2015).

All layers learn, and all batch norms are in training mode (paper, appendix C.4).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms, box_iou

from obowlab.methods.backbones import ResNet
from obowlab.methods.bow import at_least_float32
from obowlab.methods.detection.boxes import HEAD_WEIGHTS, clip, decode, encode, has_area
from obowlab.methods.detection.matching import match, sample
from obowlab.methods.detection.objects import Objects
from obowlab.methods.detection.rpn import Level, Proposing, RegionProposals

REPEATED = -100
"""The class of a region that stands there once more."""

MIN_SCORE, MAX_OVERLAP, MAX_DETECTIONS = 0.05, 0.5, 100


@dataclass(frozen=True)
class Detections:
    """What was found in an image, the surest first.

    Attributes:
        boxes: float [D, 4].
        labels: int64 [D].
        scores: float [D].
        masks: of a network that learns some, how sure it is of every place of a box, [D, S, S]; else None.
    """

    boxes: Tensor
    labels: Tensor
    scores: Tensor
    masks: Tensor | None = None


@dataclass(frozen=True)
class Regions:
    """The regions that a step learns from, equally many of every image.

    Attributes:
        boxes: of every image, [R, 4] each.
        labels: of all of them, int64 [B * R]: classes, the background behind them, `REPEATED`.
        wanted: how those with an object are to move, [P, 4].
        objects: number of the object of each of those in its image, of every image.
    """

    boxes: list[Tensor]
    labels: Tensor
    wanted: Tensor
    objects: list[Tensor]


def alone(number: Tensor) -> Tensor:
    """Return what one process's count is on average over all: itself."""
    return number


class TwoStageDetector(nn.Module, ABC):
    """A detector on an encoder; subclasses have the trunk and the head.

    Args:
        encoder: all of whose layers are used.
        num_classes: of objects; the background is the class behind them.
        regions: of an image that a step learns from.
    """

    training_proposals: Proposing
    testing_proposals: Proposing
    rpn: RegionProposals
    classes: nn.Linear
    deltas: nn.Linear

    def __init__(self, encoder: ResNet, *, num_classes: int, regions: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.num_classes, self.regions = num_classes, regions
        self.first_stride = 1 if isinstance(encoder.maxpool, nn.Identity) else 4
        """Pixels between two places of the first stage's map."""

    def _add_proposals(self, channels: int, *, levels: Sequence[Level]) -> None:
        self.rpn = RegionProposals(channels, levels=levels)

    def _add_predictors(self, num_features: int) -> None:
        self.classes = nn.Linear(num_features, self.num_classes + 1)
        self.deltas = nn.Linear(num_features, self.num_classes * 4)
        nn.init.normal_(self.classes.weight, std=0.01)
        nn.init.normal_(self.deltas.weight, std=0.001)
        nn.init.zeros_(self.classes.bias)
        nn.init.zeros_(self.deltas.bias)

    @abstractmethod
    def maps(self, images: Tensor) -> list[Tensor]:
        """Return the maps that proposals are made from of normalised images [B, 3, H, W], [B, C, H', W'] each."""

    @abstractmethod
    def region_features(self, maps: Sequence[Tensor], *, regions: Sequence[Tensor]) -> Tensor:
        """Return what the head says of all regions, [R, C].

        Args:
            maps: of the images.
            regions: of every image, [r, 4] each.
        """

    def losses(
        self,
        images: Tensor,
        *,
        objects: Sequence[Objects],
        generators: Sequence[torch.Generator],
        average: Callable[[Tensor], Tensor] = alone,
    ) -> dict[str, Tensor]:
        """Return the losses of a step, whose sum is learned from.

        Args:
            images: normalised and padded at the right and below, [B, 3, H, W].
            objects: of every image.
            generators: of every image, on the CPU: they choose anchors and regions.
            average: returns the mean of a count over all processes, whose gradients are averaged.
        """
        maps = self.maps(images)
        predicted = self.rpn(maps).in_float32()
        keys = [torch.rand(len(predicted.anchors), generator=generator).to(images.device) for generator in generators]
        found = self.rpn.losses(predicted, objects=[each.boxes for each in objects], keys=keys)
        proposals = self.rpn.propose(predicted, sizes=[each.size for each in objects], how=self.training_proposals)
        regions = self._regions(proposals, objects=objects, generators=generators)
        logits, moves = self._predict(maps, regions=regions.boxes)
        number = average((regions.labels != REPEATED).sum().to(logits.dtype))
        rows = torch.nonzero((regions.labels != REPEATED) & (regions.labels < self.num_classes)).squeeze(1)
        moved = moves[rows, regions.labels[rows]]
        of_classes = F.cross_entropy(logits, regions.labels, ignore_index=REPEATED, reduction="sum") / number
        of_boxes = (moved - regions.wanted).abs().sum() / number + moves.sum() * 0.0
        further = self.further_losses(maps, regions=regions, rows=rows, objects=objects, average=average)
        return {**found, "classes": of_classes, "boxes": of_boxes, **further}

    def further_losses(
        self,
        maps: Sequence[Tensor],
        *,
        regions: Regions,
        rows: Tensor,
        objects: Sequence[Objects],
        average: Callable[[Tensor], Tensor],
    ) -> dict[str, Tensor]:
        """Return what a network learns beside classes and boxes.

        Args:
            maps: of the images.
            regions: that the step learns from.
            rows: those of all images' regions that are objects, int64 [P].
            objects: of every image.
            average: see `losses`.
        """
        return {}

    @torch.no_grad()
    def detect(self, images: Tensor, *, sizes: Sequence[tuple[int, int]]) -> list[Detections]:
        """Return what is found in normalised, padded images, in their own pixels; in evaluation mode.

        Args:
            images: [B, 3, H, W].
            sizes: height and width of every image without its padding.
        """
        return self._detected(self.maps(images), sizes=sizes)

    def _detected(self, maps: Sequence[Tensor], *, sizes: Sequence[tuple[int, int]]) -> list[Detections]:
        proposals = self.rpn.propose(self.rpn(maps), sizes=sizes, how=self.testing_proposals)
        logits, moves = self._predict(maps, regions=proposals)
        found, start = [], 0
        for regions, size in zip(proposals, sizes, strict=True):
            end = start + len(regions)
            boxes = clip(decode(moves[start:end], boxes=regions, weights=HEAD_WEIGHTS), size=size)
            found.append(_surest(boxes, probabilities=logits[start:end].softmax(dim=1)[:, :-1]))
            start = end
        return found

    def _regions(
        self, proposals: Sequence[Tensor], *, objects: Sequence[Objects], generators: Sequence[torch.Generator]
    ) -> Regions:
        """Return the regions of every image that a step learns from, their classes, and how the objects in them move."""
        regions, labels, wanted, numbers = [], [], [], []
        for proposed, truth, generator in zip(proposals, objects, generators, strict=True):
            boxes = torch.cat((proposed, truth.boxes))
            found = match(box_iou(truth.boxes, boxes), below=0.5, above=0.5, best_too=False)
            keys = torch.rand(len(boxes), generator=generator).to(boxes.device)
            positive, negative = sample(found.labels, count=self.regions, positives=0.25, keys=keys)
            chosen = torch.cat((positive, negative))
            background = torch.full((len(negative),), self.num_classes, dtype=torch.int64, device=boxes.device)
            classes = torch.cat((truth.labels[found.objects[positive]], background))
            # Few regions are repeated, and count once: batch norms of all processes see equally many.
            places = torch.arange(self.regions, device=boxes.device)
            regions.append(boxes[chosen[places % len(chosen)]])
            labels.append(torch.where(places < len(chosen), classes[places % len(chosen)], REPEATED))
            wanted.append(encode(boxes[positive], towards=truth.boxes[found.objects[positive]], weights=HEAD_WEIGHTS))
            numbers.append(found.objects[positive])
        return Regions(regions, torch.cat(labels), torch.cat(wanted), numbers)

    def _predict(self, maps: Sequence[Tensor], *, regions: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return scores [R, num_classes + 1] and moves [R, num_classes, 4] of all regions."""
        features = self.region_features(maps, regions=regions)
        scores, moves = map(at_least_float32, (self.classes(features), self.deltas(features)))
        return scores, moves.reshape(-1, self.num_classes, 4)


def _surest(boxes: Tensor, *, probabilities: Tensor) -> Detections:
    """Return the best of the regions' boxes [R, K, 4] and probabilities [R, K], thinned out within each class."""
    regions, labels = torch.nonzero(probabilities > MIN_SCORE, as_tuple=True)
    scores, chosen = probabilities[regions, labels], boxes[regions, labels]
    kept = batched_nms(chosen, scores, labels, MAX_OVERLAP)[:MAX_DETECTIONS]
    kept = kept[has_area(chosen[kept])]
    return Detections(chosen[kept], labels[kept], scores[kept])
