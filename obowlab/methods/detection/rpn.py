"""The region proposal network of Faster R-CNN (Ren et al. 2015), with Detectron2's choices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms, box_iou

from obowlab.methods.detection.anchors import anchors_of, shapes
from obowlab.methods.detection.boxes import RPN_WEIGHTS, clip, decode, encode, has_area
from obowlab.methods.detection.matching import match, sample

BATCH = 256
"""Anchors of an image that a step learns from."""


@dataclass(frozen=True)
class Proposing:
    """How many proposals an image gets.

    Attributes:
        before: of the best scores, before those that overlap are thinned out.
        after: afterwards.
        overlap: of two proposals, from which the one with the lower score is left out.
    """

    before: int
    after: int
    overlap: float = 0.7


TRAINING, TESTING = Proposing(before=12_000, after=2000), Proposing(before=6000, after=1000)


class RegionProposals(nn.Module):
    """Says of every anchor whether it is an object, and how to move it.

    Args:
        channels: of the map.
        stride: pixels between two places of the map.
        sizes: of the anchors, pixels.
    """

    origin: Tensor

    def __init__(self, channels: int, *, stride: int, sizes: tuple[float, ...]) -> None:
        super().__init__()
        self.stride = stride
        self.register_buffer("origin", shapes(sizes=sizes), persistent=False)
        num_anchors = len(self.origin)
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.objectness = nn.Conv2d(channels, num_anchors, kernel_size=1)
        self.deltas = nn.Conv2d(channels, num_anchors * 4, kernel_size=1)
        for layer in (self.conv, self.objectness, self.deltas):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(_bias(layer))

    def forward(self, maps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return anchors [A, 4], their scores [B, A] and how to move them [B, A, 4]."""
        batch, _, rows, columns = maps.shape
        x = F.relu(self.conv(maps))
        scores = self.objectness(x).permute(0, 2, 3, 1).reshape(batch, -1)
        deltas = self.deltas(x).reshape(batch, -1, 4, rows, columns).permute(0, 3, 4, 1, 2).reshape(batch, -1, 4)
        return anchors_of(rows, columns, stride=self.stride, at_origin=self.origin.to(maps.dtype)), scores, deltas

    @torch.no_grad()
    def propose(
        self, anchors: Tensor, *, scores: Tensor, deltas: Tensor, sizes: Sequence[tuple[int, int]], how: Proposing
    ) -> list[Tensor]:
        """Return the proposals of every image, the best first, [P, 4] each.

        Args:
            anchors: [A, 4].
            scores: [B, A].
            deltas: [B, A, 4].
            sizes: height and width of every image without its padding.
            how: how many.
        """
        proposals = []
        for score, delta, size in zip(scores, deltas, sizes, strict=True):
            best = torch.sort(score, descending=True, stable=True)
            places = best.indices[: how.before]
            boxes = clip(decode(delta[places], boxes=anchors[places], weights=RPN_WEIGHTS), size=size)
            kept = torch.isfinite(boxes).all(dim=1) & has_area(boxes)
            boxes, values = boxes[kept], best.values[: how.before][kept]
            chosen = batched_nms(boxes, values, torch.zeros_like(values, dtype=torch.int64), how.overlap)
            proposals.append(boxes[chosen[: how.after]])
        return proposals

    def losses(
        self, anchors: Tensor, *, scores: Tensor, deltas: Tensor, objects: Sequence[Tensor], keys: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """Return the losses of scores and of boxes, each divided by 256 anchors an image.

        Args:
            anchors: [A, 4].
            scores: [B, A].
            deltas: [B, A, 4].
            objects: boxes of the objects of every image, [G, 4] each.
            keys: random numbers of every image, [A] each, which choose the anchors.
        """
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
