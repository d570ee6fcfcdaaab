"""torchvision's ResNets (v1.5) with named levels, a stem for small images, a width, and TensorFlow's padding."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.resnet import BasicBlock, Bottleneck

from obowlab.config import Backbone, Level

ARCHITECTURES: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    "resnet10": (BasicBlock, (1, 1, 1, 1)),  # the few-shot literature's small one; torchvision has no function of that name
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
}

LEVELS: dict[Level, str] = {"conv4": "layer3", "conv5": "layer4"}
"""The paper's names of the levels and torchvision's names of the layers that end there."""


class ResNet(nn.Module):
    """A ResNet without classifier, whose parameters bear torchvision's names (`conv1`, `bn1`, `layer1` to `layer4`).

    Attributes:
        num_features: channels of the pooled feature, c in the paper.
        stage_channels: channels of the four stages' maps.
        level_channels: channels of every level's map.
        pixel_mean: what is subtracted from pixels in [0, 1], per channel; set where it is not ImageNet's mean.
        pixel_std: what the difference is divided by; set where it is not ImageNet's deviation.
        padding: `torchvision` or `same`, which changes what equal weights compute.
    """

    pixel_mean: tuple[float, float, float]
    pixel_std: tuple[float, float, float]

    def __init__(self, arch: str, *, stem: str = "imagenet", width: int = 64, padding: str = "torchvision"):
        super().__init__()
        self.padding = padding
        block, depths = ARCHITECTURES[arch]
        if stem == "small":
            self.conv1 = nn.Conv2d(3, width, kernel_size=3, stride=1, padding=1, bias=False)
            self.maxpool: nn.Module = nn.Identity()
        else:
            self.conv1 = nn.Conv2d(3, width, kernel_size=7, stride=2, padding=3, bias=False)
            self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        stages = [width * factor for factor in (1, 2, 4, 8)]
        outputs = [planes * block.expansion for planes in stages]
        self.layer1 = _stage(block, width, stages[0], depth=depths[0], stride=1)
        self.layer2 = _stage(block, outputs[0], stages[1], depth=depths[1], stride=2)
        self.layer3 = _stage(block, outputs[1], stages[2], depth=depths[2], stride=2)
        self.layer4 = _stage(block, outputs[2], stages[3], depth=depths[3], stride=2)
        self.num_features = outputs[3]
        self.stage_channels: tuple[int, ...] = tuple(outputs)
        self.level_channels: dict[Level, int] = {"conv4": outputs[2], "conv5": outputs[3]}
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if padding == "same":
            pad_as_tensorflow(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return the globally averaged last map, [B, num_features]."""
        return self.levels(images, ())[1]

    def levels(self, images: Tensor, names: Collection[Level]) -> tuple[dict[Level, Tensor], Tensor]:
        """Return the maps of the named levels, [B, C, H, W] each, and the pooled feature, [B, num_features]."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        x = self.layer2(self.layer1(x))
        conv4 = self.layer3(x)
        conv5 = self.layer4(conv4)
        maps: dict[Level, Tensor] = {"conv4": conv4, "conv5": conv5}
        return {name: maps[name] for name in names}, conv5.mean(dim=(2, 3))


def _stage(block: type[BasicBlock] | type[Bottleneck], inputs: int, planes: int, *, depth: int, stride: int) -> nn.Sequential:
    """Return torchvision's residual blocks of one resolution; the first one may halve it."""
    outputs = planes * block.expansion
    shortcut = None
    if stride != 1 or inputs != outputs:
        shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, kernel_size=1, stride=stride, bias=False), nn.BatchNorm2d(outputs))
    return nn.Sequential(block(inputs, planes, stride, shortcut), *(block(outputs, planes) for _ in range(depth - 1)))


def pad_same(images: Tensor, *, kernel: int, stride: int, value: float = 0.0) -> Tensor:
    """Return maps [B, C, H, W] padded as TensorFlow's `SAME`: so that ceil(H / stride) rows come out, an odd pixel at the end."""
    sides = [max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in (images.shape[3], images.shape[2])]
    return functional.pad(images, [half for side in sides for half in (side // 2, side - side // 2)], value=value)


class SameConv2d(nn.Conv2d):
    """A convolution with TensorFlow's padding."""

    def forward(self, input: Tensor) -> Tensor:
        """Return [B, C', ceil(H / stride), ceil(W / stride)]."""
        return super().forward(pad_same(input, kernel=self.kernel_size[0], stride=self.stride[0]))


class SameMaxPool2d(nn.MaxPool2d):
    """A max-pooling of squares with TensorFlow's padding."""

    def forward(self, input: Tensor) -> Tensor:
        """Return [B, C, ceil(H / stride), ceil(W / stride)]."""
        assert isinstance(self.kernel_size, int)
        assert isinstance(self.stride, int)
        padded = pad_same(input, kernel=self.kernel_size, stride=self.stride, value=-torch.inf)
        return functional.max_pool2d(padded, self.kernel_size, self.stride)


def pad_as_tensorflow(network: nn.Module) -> None:
    """Replace the layers of a network with a stride, in place and with their weights; all others pad alike in both libraries."""
    for part in list(network.modules()):
        for name, layer in list(part.named_children()):
            if isinstance(layer, nn.MaxPool2d):
                setattr(part, name, SameMaxPool2d(layer.kernel_size, layer.stride))
            elif isinstance(layer, nn.Conv2d) and layer.stride[0] > 1 and layer.kernel_size[0] > 1:
                kernel, stride = layer.kernel_size[0], layer.stride[0]
                same = SameConv2d(layer.in_channels, layer.out_channels, kernel, stride, bias=False, device="meta")
                same.weight = layer.weight
                setattr(part, name, same)


def build_backbone(cfg: Backbone, *, seed: int | None = None) -> ResNet:
    """Build the encoder; with a seed its weights are a function of it alone and torch's generator is left untouched."""
    if seed is None:
        return ResNet(cfg.arch, stem=cfg.stem, width=cfg.width, padding=cfg.padding)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ResNet(cfg.arch, stem=cfg.stem, width=cfg.width, padding=cfg.padding)


def zero_last_scales(encoder: ResNet) -> None:
    """Let every residual block begin as its shortcut: the scale of its last batch norm is 0, as torchvision offers it."""
    for module in encoder.modules():
        if isinstance(module, BasicBlock | Bottleneck):
            last = module.bn3 if isinstance(module, Bottleneck) else module.bn2
            nn.init.zeros_(last.weight)


def compile_encoders(method: nn.Module) -> None:
    """Let torch compile every network in a method where both student and teacher run: `levels`, once for each size of images."""
    for network in method.modules():
        if isinstance(network, ResNet):
            network.levels = torch.compile(network.levels, dynamic=False)  # type: ignore[method-assign]
