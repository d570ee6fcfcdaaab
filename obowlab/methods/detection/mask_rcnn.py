"""Mask R-CNN on a feature pyramid ("R50-FPN"): boxes and masks (He et al. 2017), as Detectron2 and MoCo's authors have it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from obowlab.methods.backbones import ResNet
from obowlab.methods.bow import at_least_float32
from obowlab.methods.detection.masks import MaskHead, convolution_relu, targets
from obowlab.methods.detection.objects import Objects
from obowlab.methods.detection.pyramid import FeaturePyramid, pool
from obowlab.methods.detection.rpn import Level, Proposing
from obowlab.methods.detection.two_stage import Detections, Regions, TwoStageDetector, alone

BOX_SIDE, MASK_POOLED = 7, 14


class MaskRcnn(TwoStageDetector):
    """A detector whose trunk is a whole encoder and a feature pyramid.

    Args:
        encoder: see `TwoStageDetector`.
        num_classes: see `TwoStageDetector`.
        seed: of the new layers.
        head: `moco` has two linear layers and no norms in the heads; `infomin` four convolutions, one linear layer, and norms.
        sizes: of the anchors of each of the five maps, pixels.
        standard: side of a region that is pooled from the third map, pixels.
        width: channels of the pyramid's maps and of the heads' convolutions.
        head_width: of the head's linear layers.
        regions: see `TwoStageDetector`.

    Raises:
        ValueError: there is not one anchor size a map.
    """

    training_proposals = Proposing(before=2000, after=1000)
    testing_proposals = Proposing(before=1000, after=1000)

    def __init__(
        self,
        encoder: ResNet,
        *,
        num_classes: int,
        seed: int,
        head: Literal["moco", "infomin"],
        sizes: tuple[float, ...],
        standard: float,
        width: int,
        head_width: int,
        regions: int,
    ) -> None:
        super().__init__(encoder, num_classes=num_classes, regions=regions)
        self.standard = standard
        self.strides = tuple(self.first_stride * 2**level for level in range(4))
        levels = [Level(stride, (size,)) for stride, size in zip((*self.strides, 2 * self.strides[-1]), sizes, strict=True)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.pyramid = FeaturePyramid(encoder.stage_channels, width=width)
            self._add_proposals(width, levels=levels)
            self.head = _head(head, width=width, head_width=head_width)
            self._add_predictors(head_width)
            self.mask_head = MaskHead(width, num_classes=num_classes, width=width, has_norms=head == "infomin")

    def maps(self, images: Tensor) -> list[Tensor]:
        """Return the pyramid's five maps; images are padded until the sides of all stages are halves of each other."""
        encoder, step = self.encoder, self.strides[-1]
        below, right = (-side % step for side in images.shape[2:])
        x = encoder.relu(encoder.bn1(encoder.conv1(F.pad(images, (0, right, 0, below)))))
        x = encoder.maxpool(x)
        stages = []
        for stage in (encoder.layer1, encoder.layer2, encoder.layer3, encoder.layer4):
            x = stage(x)
            stages.append(x)
        return [at_least_float32(each) for each in self.pyramid(stages)]

    def region_features(self, maps: Sequence[Tensor], *, regions: Sequence[Tensor]) -> Tensor:
        """Return what the head's linear layers say of all regions."""
        features: Tensor = self.head(self._pooled(maps, regions=regions, side=BOX_SIDE))
        return features

    def further_losses(
        self,
        maps: Sequence[Tensor],
        *,
        regions: Regions,
        rows: Tensor,
        objects: Sequence[Objects],
        average: Callable[[Tensor], Tensor] = alone,
    ) -> dict[str, Tensor]:
        """Return the loss of masks: binary cross-entropy of each object's own class, mean over all their places.

        Where nothing is an object, one region passes the head without a loss: all processes do the same.
        """
        boxes = torch.cat(regions.boxes)
        chosen = rows if len(rows) else rows.new_zeros(1)
        images = chosen.div(self.regions, rounding_mode="floor")
        pooled = self._pooled(maps, regions=[boxes[chosen[images == each]] for each in range(len(objects))], side=MASK_POOLED)
        logits = at_least_float32(self.mask_head(pooled))
        number = average(torch.tensor(float(len(rows)), dtype=logits.dtype, device=logits.device)).clamp(min=1.0)
        if not len(rows):
            return {"masks": logits.sum() * 0.0 / number}
        shown = torch.cat(regions.objects).tolist()
        outlines = [objects[image].outlines[thing] for image, thing in zip(images.tolist(), shown, strict=True)]
        wanted = targets(outlines, boxes=boxes[rows], side=logits.shape[-1]).to(logits.dtype)
        own = logits[torch.arange(len(rows), device=rows.device), regions.labels[rows]]
        of_places = F.binary_cross_entropy_with_logits(own, wanted, reduction="none").mean(dim=(1, 2))
        return {"masks": of_places.sum() / number}

    @torch.no_grad()
    def detect(self, images: Tensor, *, sizes: Sequence[tuple[int, int]]) -> list[Detections]:
        """Return what is found, with masks; see `TwoStageDetector.detect`."""
        maps = self.maps(images)
        found = self._detected(maps, sizes=sizes)
        pooled = self._pooled(maps, regions=[each.boxes for each in found], side=MASK_POOLED)
        if not len(pooled):
            side = 2 * MASK_POOLED
            return [replace(each, masks=each.boxes.new_zeros(0, side, side)) for each in found]
        labels = torch.cat([each.labels for each in found])
        sure = at_least_float32(self.mask_head(pooled))[torch.arange(len(labels), device=labels.device), labels].sigmoid()
        of_images = torch.split(sure, [len(each.boxes) for each in found])
        return [replace(each, masks=masks) for each, masks in zip(found, of_images, strict=True)]

    def _pooled(self, maps: Sequence[Tensor], *, regions: Sequence[Tensor], side: int) -> Tensor:
        return pool(maps[:4], strides=self.strides, regions=regions, side=side, standard=self.standard)


def _head(kind: Literal["moco", "infomin"], *, width: int, head_width: int) -> nn.Sequential:
    """Return the layers between pooled regions [R, width, 7, 7] and the predictors."""
    layers: list[nn.Module] = []
    if kind == "infomin":
        for _ in range(4):
            layers += convolution_relu(width, width, norm=nn.BatchNorm2d)
    layers.append(nn.Flatten())
    number = width * BOX_SIDE**2
    for _ in range(2 if kind == "moco" else 1):
        linear = nn.Linear(number, head_width)
        nn.init.kaiming_uniform_(linear.weight, a=1.0)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU()]
        number = head_width
    return nn.Sequential(*layers)
