"""Time a detector's training step beside torchvision's on the same images: Faster R-CNN on a C4 trunk, Mask R-CNN on a pyramid.

torchvision's has the same trunk, trained batch norms, anchors, numbers of proposals and regions; it pools with two points a bin
and rounds anchors. Both get normalised images of one size. They are timed in turns; the ratio is the median over the rounds.

    PYTHONPATH=. python tests/benchmarks/bench_detector.py --threads 1
    PYTHONPATH=. python tests/benchmarks/bench_detector.py --arch resnet50 --regions 512 --size 800 1067 --device cuda
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from obowlab.config import Backbone, Detector
from obowlab.methods import Objects, ResNet, build_backbone
from obowlab.methods.detection.anchors import RATIOS
from obowlab.methods.detection.two_stage import TwoStageDetector
from obowlab.methods.detector import build_detector

NUM_CLASSES = 20


class Trunk(nn.Module):
    """An encoder's stem and first three stages."""

    def __init__(self, encoder: ResNet) -> None:
        super().__init__()
        self.encoder, self.out_channels = encoder, encoder.stage_channels[2]

    def forward(self, images: Tensor) -> Tensor:
        encoder = self.encoder
        x = encoder.maxpool(encoder.relu(encoder.bn1(encoder.conv1(images))))
        return encoder.layer3(encoder.layer2(encoder.layer1(x)))


class Head(nn.Module):
    """An encoder's last stage, a batch norm and the mean."""

    def __init__(self, encoder: ResNet) -> None:
        super().__init__()
        self.layer4, self.norm = encoder.layer4, nn.BatchNorm2d(encoder.num_features)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.norm(self.layer4(pooled)).mean(dim=(2, 3))


class Pyramid(nn.Module):
    """An encoder and torchvision's feature pyramid with batch norms."""

    def __init__(self, encoder: ResNet) -> None:
        super().__init__()
        self.encoder, self.out_channels = encoder, 256
        channels = list(encoder.stage_channels)
        self.fpn = FeaturePyramidNetwork(channels, 256, extra_blocks=LastLevelMaxPool(), norm_layer=nn.BatchNorm2d)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        encoder = self.encoder
        x = encoder.maxpool(encoder.relu(encoder.bn1(encoder.conv1(images))))
        stages = OrderedDict()
        for place, stage in enumerate((encoder.layer1, encoder.layer2, encoder.layer3, encoder.layer4)):
            x = stage(x)
            stages[str(place)] = x
        return self.fpn(stages)


def drawn(count: int, size: tuple[int, int], *, device: torch.device) -> tuple[Tensor, list[Objects]]:
    """Return random images and eight objects in each, rectangles."""
    generator = torch.Generator().manual_seed(0)
    height, width = size
    objects = []
    for _ in range(count):
        corners = torch.rand(8, 2, generator=generator) * torch.tensor([width * 0.6, height * 0.6])
        sides = torch.tensor([width, height]) * (0.1 + 0.3 * torch.rand(8, 2, generator=generator))
        boxes = torch.cat((corners, corners + sides), dim=1)
        outlines = tuple((np.array([x0, y0, x1, y0, x1, y1, x0, y1]),) for x0, y0, x1, y1 in boxes.tolist())
        labels = torch.randint(0, NUM_CLASSES, (8,), generator=generator)
        objects.append(Objects(boxes.to(device), labels.to(device), size, outlines))
    return torch.randn(count, 3, *size, generator=generator).to(device), objects


def targets(objects: Sequence[Objects], *, with_masks: bool) -> list[dict[str, Tensor]]:
    """Return objects as torchvision wants them."""
    found = []
    for each in objects:
        target = {"boxes": each.boxes, "labels": each.labels + 1}
        if with_masks:
            masks = torch.zeros(len(each.labels), *each.size, dtype=torch.uint8, device=each.boxes.device)
            for mask, (x0, y0, x1, y1) in zip(masks, each.boxes.round().int().tolist(), strict=True):
                mask[y0:y1, x0:x1] = 1
            target["masks"] = masks
        found.append(target)
    return found


def seconds(step: Callable[[], dict[str, Tensor]], network: nn.Module, *, device: torch.device) -> float:
    """Return how long losses and their gradients take."""
    network.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    torch.stack(list(step().values())).sum().backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def pairs(
    *, arch: str, count: int, size: tuple[int, int], regions: int, rounds: int, device: torch.device
) -> Iterator[tuple[str, list[tuple[float, float]]]]:
    """Yield both detectors' names, and the seconds of our step and of torchvision's, timed in turns; the first are not counted.

    Args:
        arch: of the encoders.
        count: images of a step.
        size: height and width of the images.
        regions: of an image that a step learns from.
        rounds: how often each is timed.
        device: where.
    """
    backbone = Backbone(arch=arch)
    images, objects = drawn(count, size, device=device)
    shared = {
        "min_size": min(size),
        "max_size": max(size),
        "image_mean": [0.0] * 3,
        "image_std": [1.0] * 3,
        "box_batch_size_per_image": regions,
    }
    for name in ("C4", "FPN"):
        encoder, own = build_backbone(backbone, seed=0), build_backbone(backbone, seed=0)
        config = Detector(architecture="c4" if name == "C4" else "fpn", regions=regions)
        ours = build_detector(config, encoder=own, num_classes=NUM_CLASSES, seed=0)
        theirs: nn.Module
        if name == "C4":
            theirs = FasterRCNN(
                Trunk(encoder),
                rpn_anchor_generator=AnchorGenerator((tuple(map(int, config.anchors)),), (RATIOS,)),
                rpn_pre_nms_top_n_train=12_000,
                box_roi_pool=MultiScaleRoIAlign(["0"], 14, 2),
                box_head=Head(encoder),
                box_predictor=FastRCNNPredictor(encoder.num_features, NUM_CLASSES + 1),
                **shared,
            )
        else:
            theirs = MaskRCNN(
                Pyramid(encoder),
                NUM_CLASSES + 1,
                rpn_anchor_generator=AnchorGenerator(tuple((int(side),) for side in config.anchors), (RATIOS,) * 5),
                rpn_post_nms_top_n_train=1000,
                **shared,
            )
        ours.to(device).train()
        theirs.to(device).train()
        wanted = targets(objects, with_masks=name == "FPN")

        def our_step(network: TwoStageDetector = ours) -> dict[str, Tensor]:
            generators = [torch.Generator().manual_seed(image) for image in range(count)]
            return network.losses(images, objects=objects, generators=generators)

        def their_step(network: nn.Module = theirs, wanted: list[dict[str, Tensor]] = wanted) -> dict[str, Tensor]:
            return network(list(images), wanted)

        timed = [(seconds(our_step, ours, device=device), seconds(their_step, theirs, device=device)) for _ in range(rounds + 1)]
        yield name, timed[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--size", type=int, nargs=2, default=(256, 320))
    parser.add_argument("--regions", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sides, device = (args.size[0], args.size[1]), torch.device(args.device)
    print(f"{args.arch}, {args.images} images of {sides[0]} x {sides[1]}, {args.regions} regions, {args.device}:")
    measured = pairs(arch=args.arch, count=args.images, size=sides, regions=args.regions, rounds=args.rounds, device=device)
    for name, rounds in measured:
        ratios = sorted(mine / other for mine, other in rounds)
        mine, other = (statistics.median(column) for column in zip(*rounds, strict=True))
        print(
            f"  {name:3s} step {mine:.3f} s, torchvision's {other:.3f} s, "
            f"ratio {statistics.median(ratios):.3f} (from {ratios[0]:.3f} to {ratios[-1]:.3f})"
        )


if __name__ == "__main__":
    main()
