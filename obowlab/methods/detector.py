"""Fine-tuning of a detector from an encoder (paper, Table 6's VOC columns, Table 9, appendix C.4)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from obowlab.config import Backbone, Detector
from obowlab.methods.backbones import ResNet, build_backbone
from obowlab.methods.base import Batch, Comm, StepOutput
from obowlab.methods.detection.faster_rcnn import FasterRcnn
from obowlab.methods.detection.mask_rcnn import MaskRcnn
from obowlab.methods.detection.precise import set_precise_statistics
from obowlab.methods.detection.two_stage import TwoStageDetector
from obowlab.methods.fine_tuning import FineTuning
from obowlab.randomness import Stream, random_words


class DetectorTraining(FineTuning[Detector]):
    """A detector on the encoder, all of which learns.

    Attributes:
        network: the detector.
        seed_of_regions: decides which anchors and regions are learned from, 0-dim.
    """

    num_uniforms = 0
    seed_of_regions: Tensor

    def __init__(
        self, method: Detector, *, backbone: Backbone, total_steps: int, seed: int, num_classes: int | None, comm: Comm
    ) -> None:
        super().__init__(method, backbone=backbone, total_steps=total_steps, seed=seed, num_classes=num_classes, comm=comm)
        assert num_classes is not None, "data.protocol_needs refuses images without labels"
        encoder = build_backbone(backbone, seed=seed)
        self.network = build_detector(method, encoder=encoder, num_classes=num_classes, seed=seed + 1)
        self.keep_pixels()
        self.register_buffer("seed_of_regions", torch.tensor(seed, dtype=torch.int64))
        self.look_at_pixels()
        self.monitor = None

    @property
    def encoder(self) -> ResNet:
        """Return the fine-tuned trunk and last stage."""
        return self.network.encoder

    @property
    def own_detector(self) -> TwoStageDetector:
        """Return the detector."""
        return self.network

    def param_groups(self, *, weight_decay: float) -> list[dict[str, Any]]:
        """Return the optimiser's groups: batch norms have no weight decay, biases have."""
        norms = [module for module in self.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        without = {id(parameter) for norm in norms for parameter in norm.parameters()}
        learnt = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return [
            {"name": "method", "params": [p for p in learnt if id(p) not in without], "weight_decay": weight_decay},
            {"name": "norms", "params": [p for p in learnt if id(p) in without], "weight_decay": 0.0},
        ]

    def forward(self, batch: Batch) -> StepOutput:
        """Do one training step up to its loss; which anchors and regions it learns from is a function of seed, step and image."""
        places = np.arange(batch.first, batch.first + len(batch.objects), dtype=np.int64)
        words = random_words(seed=self._seed, epoch=batch.step, indices=places, stream=Stream.REGIONS, count=2)
        seeds = (words[:, 0].astype(np.uint64) << np.uint64(32) | words[:, 1]) >> np.uint64(1)
        generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        losses = self.network.losses(
            batch.original, objects=batch.objects, generators=generators, average=self.comm.all_reduce_mean
        )
        return self._output(losses, {})

    def look_at_pixels(self) -> None:
        """Show whole images as the encoder knows them; the seed of regions is read with it."""
        super().look_at_pixels()
        self.pixel_statistics = self.encoder.pixel_mean, self.encoder.pixel_std
        self._seed = int(self.seed_of_regions)

    def finish(self, batches: Callable[[int], Iterator[Batch]]) -> None:
        """Give batch norms the statistics of so many batches."""

        def total(sums: Tensor) -> Tensor:
            return self.comm.all_reduce_mean(sums) * self.comm.world_size

        if self.method.precise_batches:
            further = batches(self.method.precise_batches)
            set_precise_statistics(self, forward=self, batches=further, total=total)


def build_detector(config: Detector, *, encoder: ResNet, num_classes: int, seed: int) -> TwoStageDetector:
    """Return the detector that a recipe names, on an encoder.

    Args:
        config: of the recipe.
        encoder: becomes part of it.
        num_classes: of objects.
        seed: of the new layers.
    """
    if config.architecture == "fpn":
        return MaskRcnn(
            encoder,
            num_classes=num_classes,
            seed=seed,
            head=config.head,
            sizes=config.anchors,
            standard=config.standard_side,
            width=config.width,
            head_width=config.head_width,
            regions=config.regions,
        )
    return FasterRcnn(
        encoder, num_classes=num_classes, seed=seed, sizes=config.anchors, pooled=config.pooled, regions=config.regions
    )


def detector_from(state: Mapping[str, Tensor], *, encoder: ResNet, config: Detector) -> TwoStageDetector:
    """Return a detector from its state dict, on an encoder that takes its weights from it as well; in evaluation mode.

    Raises:
        KeyError, RuntimeError: tensors are missing, left over, or of another shape.
    """
    detector = build_detector(config, encoder=encoder, num_classes=len(state["classes.bias"]) - 1, seed=0)
    detector.load_state_dict(dict(state))
    return detector.eval()
