"""The region proposal network of Faster R-CNN (Ren et al. 2015), with Detectron2's choices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms, box_iou

from obowlab.methods.bow import at_least_float32
from obowlab.methods.detection.anchors import anchors_of, shapes
from obowlab.methods.detection.boxes import RPN_WEIGHTS, clip, decode, encode, has_area
from obowlab.methods.detection.matching import match, sample

BATCH = 256
"""Anchors of an image that a step learns from."""


@dataclass(frozen=True)
class Proposing:
    """How many proposals an image gets.

    Attributes:
        before: of the best scores of every level, before those that overlap within a level are thinned out.
        after: afterwards, of all levels.
        overlap: of two proposals, from which the one with the lower score is left out.
    """

    before: int
    after: int
    overlap: float = 0.7


@dataclass(frozen=True)
class Level:
    """A map that proposals are made from.

    Attributes:
        stride: pixels between two places.
        sizes: of the anchors at every place, pixels.
    """

    stride: int
    sizes: tuple[float, ...]


@dataclass(frozen=True)
class Predicted:
    """What is said of the anchors of all levels, one level after the other.

    Attributes:
        anchors: [A, 4].
        scores: [B, A].
        deltas: how to move them, [B, A, 4].
        of_levels: how many anchors each level has.
    """

    anchors: Tensor
    scores: Tensor
    deltas: Tensor
    of_levels: tuple[int, ...]

    def in_float32(self) -> Predicted:
        """Return the same for losses, of at least float32."""
        return replace(self, scores=at_least_float32(self.scores), deltas=at_least_float32(self.deltas))


class RegionProposals(nn.Module):
    """Says of every anchor whether it is an object, and how to move it; the layers are those of all levels.

    Args:
        channels: of the maps.
        levels: of which each has as many anchors a place.
    """

    def __init__(self, channels: int, *, levels: Sequence[Level]) -> None:
        super().__init__()
        self.levels = tuple(levels)
        for place, level in enumerate(self.levels):
            self.register_buffer(f"origin{place}", shapes(level.sizes), persistent=False)
        num_anchors = len(self.get_buffer("origin0"))
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.objectness = nn.Conv2d(channels, num_anchors, kernel_size=1)
        self.deltas = nn.Conv2d(channels, num_anchors * 4, kernel_size=1)
        for layer in (self.conv, self.objectness, self.deltas):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(_bias(layer))

    def forward(self, maps: Sequence[Tensor]) -> Predicted:
        """Return what is said of the anchors of maps [B, C, H, W], one of every level."""
        anchors, scores, deltas = [], [], []
        for place, (level, of_level) in enumerate(zip(self.levels, maps, strict=True)):
            batch, _, rows, columns = of_level.shape
            x = F.relu(self.conv(of_level))
            scores.append(self.objectness(x).permute(0, 2, 3, 1).reshape(batch, -1))
            moved = self.deltas(x).reshape(batch, -1, 4, rows, columns)
            deltas.append(moved.permute(0, 3, 4, 1, 2).reshape(batch, -1, 4))
            origin = self.get_buffer(f"origin{place}").to(of_level.dtype)
            anchors.append(anchors_of(rows, columns, stride=level.stride, at_origin=origin))
        return Predicted(torch.cat(anchors), torch.cat(scores, dim=1), torch.cat(deltas, dim=1), tuple(map(len, anchors)))

    @torch.no_grad()
    def propose(self, predicted: Predicted, *, sizes: Sequence[tuple[int, int]], how: Proposing) -> list[Tensor]:
        """Return the proposals of every image, the best first, [P, 4] each.

        Args:
            predicted: of the anchors.
            sizes: height and width of every image without its padding.
            how: how many.
        """
        proposals = []
        counts = list(predicted.of_levels)
        anchors = torch.split(predicted.anchors, counts)
        for score, delta, size in zip(predicted.scores, predicted.deltas, sizes, strict=True):
            boxes, values, levels = [], [], []
            parts = zip(anchors, torch.split(score, counts), torch.split(delta, counts), strict=True)
            for level, (of_level, scores, deltas) in enumerate(parts):
                best = torch.sort(scores, descending=True, stable=True)
                places = best.indices[: how.before]
                boxes.append(clip(decode(deltas[places], boxes=of_level[places], weights=RPN_WEIGHTS), size=size))
                values.append(best.values[: how.before])
                levels.append(torch.full_like(places, level))
            found, scored, level_of = torch.cat(boxes), torch.cat(values), torch.cat(levels)
            kept = torch.isfinite(found).all(dim=1) & has_area(found)
            found = found[kept]
            chosen = batched_nms(found, scored[kept], level_of[kept], how.overlap)
            proposals.append(found[chosen[: how.after]])
        return proposals

    def losses(self, predicted: Predicted, *, objects: Sequence[Tensor], keys: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the losses of scores and of boxes, each divided by 256 anchors an image.

        Args:
            predicted: of the anchors.
            objects: boxes of the objects of every image, [G, 4] each.
            keys: random numbers of every image, [A] each, which choose the anchors.
        """
        anchors, scores, deltas = predicted.anchors, predicted.scores, predicted.deltas
        of_scores, of_boxes = scores.new_zeros(()), scores.new_zeros(())
        for score, delta, truth, key in zip(scores, deltas, objects, keys, strict=True):
            found = match(box_iou(truth, anchors), below=0.3, above=0.7, best_too=True)
            positive, negative = sample(found.labels, count=BATCH, positives=0.5, keys=key)
            chosen = torch.cat((positive, negative))
            is_object = torch.zeros(len(chosen), dtype=score.dtype, device=score.device)
            is_object[: len(positive)] = 1.0
            of_scores = of_scores + F.binary_cross_entropy_with_logits(score[chosen], is_object, reduction="sum")
            if len(positive):
                wanted = encode(anchors[positive], towards=truth[found.objects[positive]], weights=RPN_WEIGHTS)
                of_boxes = of_boxes + (delta[positive] - wanted).abs().sum()
            else:
                of_boxes = of_boxes + delta.sum() * 0.0
        number = BATCH * len(scores)
        return {"rpn_objectness": of_scores / number, "rpn_boxes": of_boxes / number}


def _bias(layer: nn.Conv2d | nn.Linear) -> Tensor:
    assert layer.bias is not None
    return layer.bias
