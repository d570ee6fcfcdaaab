"""Faster R-CNN on the last but one stage of a ResNet ("R50-C4"), with MoCo's batch norm after the last stage.

All layers learn, and all batch norms are in training mode (paper, appendix C.4). Losses are those of one process, and
processes average their gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms, box_iou, roi_align

from obowlab.methods.backbones import ResNet
from obowlab.methods.bow import at_least_float32
from obowlab.methods.detection.anchors import SIZES
from obowlab.methods.detection.boxes import HEAD_WEIGHTS, clip, decode, encode, has_area
from obowlab.methods.detection.matching import match, sample
from obowlab.methods.detection.objects import Objects
from obowlab.methods.detection.rpn import TESTING, TRAINING, RegionProposals

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
    """

    boxes: Tensor
    labels: Tensor
    scores: Tensor


class FasterRcnn(nn.Module):
    """A detector on an encoder.

    Args:
        encoder: whose stem and first three stages become the trunk, and whose last stage the head.
        num_classes: of objects; the background is the class behind them.
        seed: of the new layers.
        sizes: of the anchors, pixels.
        pooled: places on a side of a region before the last stage, which halves them.
        regions: of an image that a step learns from.
    """

    def __init__(
        self,
        encoder: ResNet,
        *,
        num_classes: int,
        seed: int,
        sizes: tuple[float, ...] = SIZES,
        pooled: int = 14,
        regions: int = 512,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.num_classes, self.pooled, self.regions = num_classes, pooled, regions
        self.stride = 4 if isinstance(encoder.maxpool, nn.Identity) else 16
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.rpn = RegionProposals(encoder.level_channels["conv4"], stride=self.stride, sizes=sizes)
            self.norm = nn.BatchNorm2d(encoder.num_features)
            self.classes = nn.Linear(encoder.num_features, num_classes + 1)
            self.deltas = nn.Linear(encoder.num_features, num_classes * 4)
            nn.init.normal_(self.classes.weight, std=0.01)
            nn.init.normal_(self.deltas.weight, std=0.001)
            nn.init.zeros_(self.classes.bias)
            nn.init.zeros_(self.deltas.bias)

    def maps(self, images: Tensor) -> Tensor:
        """Return the trunk's maps of normalised images [B, 3, H, W], [B, C, H', W']."""
        encoder = self.encoder
        x = encoder.maxpool(encoder.relu(encoder.bn1(encoder.conv1(images))))
        return at_least_float32(encoder.layer3(encoder.layer2(encoder.layer1(x))))

    def losses(
        self,
        images: Tensor,
        *,
        objects: Sequence[Objects],
        generators: Sequence[torch.Generator],
    ) -> dict[str, Tensor]:
        """Return the four losses of a step, whose sum is learned from.

        Args:
            images: normalised and padded at the right and below, [B, 3, H, W].
            objects: of every image.
            generators: of every image, on the CPU: they choose anchors and regions.
        """
        maps = self.maps(images)
        anchors, *predicted = self.rpn(maps)
        scores, deltas = map(at_least_float32, predicted)
        keys = [torch.rand(len(anchors), generator=generator).to(maps.device) for generator in generators]
        boxes = [each.boxes for each in objects]
        found = self.rpn.losses(anchors, scores=scores, deltas=deltas, objects=boxes, keys=keys)
        sizes = [each.size for each in objects]
        proposals = self.rpn.propose(anchors, scores=scores.detach(), deltas=deltas.detach(), sizes=sizes, how=TRAINING)
        regions, labels, wanted = self._regions(proposals, objects=objects, generators=generators)
        logits, moves = self._head(maps, regions=regions)
        truth = torch.cat(labels)
        rows = torch.nonzero((truth != REPEATED) & (truth < self.num_classes)).squeeze(1)
        moved = moves[rows, truth[rows]]
        of_boxes = (moved - torch.cat(wanted)).abs().sum() / (truth != REPEATED).sum()
        of_classes = F.cross_entropy(logits, truth, ignore_index=REPEATED)
        return {**found, "classes": of_classes, "boxes": of_boxes + moves.sum() * 0.0}

    @torch.no_grad()
    def detect(self, images: Tensor, *, sizes: Sequence[tuple[int, int]]) -> list[Detections]:
        """Return what is found in normalised, padded images, in their own pixels; in evaluation mode.

        Args:
            images: [B, 3, H, W].
            sizes: height and width of every image without its padding.
        """
        maps = self.maps(images)
        anchors, scores, deltas = self.rpn(maps)
        proposals = self.rpn.propose(anchors, scores=scores, deltas=deltas, sizes=sizes, how=TESTING)
        logits, moves = self._head(maps, regions=proposals)
        found, start = [], 0
        for regions, size in zip(proposals, sizes, strict=True):
            end = start + len(regions)
            boxes = clip(decode(moves[start:end], boxes=regions, weights=HEAD_WEIGHTS), size=size)
            found.append(_surest(boxes, probabilities=logits[start:end].softmax(dim=1)[:, :-1]))
            start = end
        return found

    def _regions(
        self, proposals: Sequence[Tensor], *, objects: Sequence[Objects], generators: Sequence[torch.Generator]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Return the regions of every image that a step learns from, their classes, and how the objects in them move."""
        regions, labels, wanted = [], [], []
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
        return regions, labels, wanted

    def _head(self, maps: Tensor, *, regions: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return scores [R, num_classes + 1] and moves [R, num_classes, 4] of all regions."""
        pooled = roi_align(
            maps,
            [each.to(maps.dtype) for each in regions],
            output_size=self.pooled,
            spatial_scale=1.0 / self.stride,
            sampling_ratio=0,
            aligned=True,
        )
        features = self.norm(self.encoder.layer4(pooled)).mean(dim=(2, 3))
        scores, moves = map(at_least_float32, (self.classes(features), self.deltas(features)))
        return scores, moves.reshape(-1, self.num_classes, 4)


def _surest(boxes: Tensor, *, probabilities: Tensor) -> Detections:
    """Return the best of the regions' boxes [R, K, 4] and probabilities [R, K], thinned out within each class."""
    regions, labels = torch.nonzero(probabilities > MIN_SCORE, as_tuple=True)
    scores, chosen = probabilities[regions, labels], boxes[regions, labels]
    kept = batched_nms(chosen, scores, labels, MAX_OVERLAP)[:MAX_DETECTIONS]
    kept = kept[has_area(chosen[kept])]
    return Detections(chosen[kept], labels[kept], scores[kept])
