"""Faster R-CNN on the last but one stage of a ResNet ("R50-C4"), with MoCo's batch norm after the last stage."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import roi_align

from obowlab.methods.backbones import ResNet
from obowlab.methods.bow import at_least_float32
from obowlab.methods.detection.rpn import Level, Proposing
from obowlab.methods.detection.two_stage import TwoStageDetector


class FasterRcnn(TwoStageDetector):
    """A detector whose trunk is an encoder's stem and first three stages, and whose head is its last stage.

    Args:
        encoder: see `TwoStageDetector`.
        num_classes: see `TwoStageDetector`.
        seed: of the new layers.
        sizes: of the anchors, pixels.
        pooled: places on a side of a region before the last stage, which halves them.
        regions: see `TwoStageDetector`.
    """

    training_proposals = Proposing(before=12_000, after=2000)
    testing_proposals = Proposing(before=6000, after=1000)

    def __init__(
        self,
        encoder: ResNet,
        *,
        num_classes: int,
        seed: int,
        sizes: tuple[float, ...],
        pooled: int,
        regions: int,
    ) -> None:
        super().__init__(encoder, num_classes=num_classes, regions=regions)
        self.pooled, self.stride = pooled, 4 * self.first_stride
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._add_proposals(encoder.level_channels["conv4"], levels=(Level(self.stride, sizes),))
            self.norm = nn.BatchNorm2d(encoder.num_features)
            self._add_predictors(encoder.num_features)

    def maps(self, images: Tensor) -> list[Tensor]:
        """Return the trunk's map."""
        encoder = self.encoder
        x = encoder.maxpool(encoder.relu(encoder.bn1(encoder.conv1(images))))
        return [at_least_float32(encoder.layer3(encoder.layer2(encoder.layer1(x))))]

    def region_features(self, maps: Sequence[Tensor], *, regions: Sequence[Tensor]) -> Tensor:
        """Return the means of the last stage's maps of all regions."""
        (trunk,) = maps
        pooled = roi_align(
            trunk,
            [each.to(trunk.dtype) for each in regions],
            output_size=self.pooled,
            spatial_scale=1.0 / self.stride,
            sampling_ratio=0,
            aligned=True,
        )
        features: Tensor = self.norm(self.encoder.layer4(pooled)).mean(dim=(2, 3))
        return features
