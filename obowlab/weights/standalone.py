"""An encoder in torch and torchvision alone. `obowlab weights export --format module` writes this file beside the weights.

Its first lines and its upper-case values are then those of the encoder (`obowlab.weights.export`).
"""

import json
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import pad
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.transforms.functional import pil_to_tensor

ARCH, STEM, WIDTH, PADDING = "resnet18", "imagenet", 64, "torchvision"
RESIZE, SIZE = 256, 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WEIGHTS = Path(__file__).with_name("encoder.safetensors")

BLOCKS = {
    "resnet10": (BasicBlock, (1, 1, 1, 1)),
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
}
DTYPES = {"F32": torch.float32, "I64": torch.int64}


class SameConv2d(nn.Conv2d):
    """A convolution padded as TensorFlow's `SAME`: an odd pixel at the end."""

    def forward(self, input: Tensor) -> Tensor:
        """Return [B, C', ceil(H / stride), ceil(W / stride)]."""
        return super().forward(pad_same(input, self.kernel_size[0]))


class SameMaxPool2d(nn.MaxPool2d):
    """A max-pooling of 3x3 pixels padded in this way."""

    def forward(self, input: Tensor) -> Tensor:
        """Return [B, C, ceil(H / 2), ceil(W / 2)]."""
        pooled: Tensor = super().forward(pad_same(input, 3, value=-torch.inf))
        return pooled


def pad_same(images: Tensor, kernel: int, value: float = 0.0) -> Tensor:
    """Return maps padded for a stride of 2."""
    sides = [max((-(-side // 2) - 1) * 2 + kernel - side, 0) for side in (images.shape[3], images.shape[2])]
    padded: Tensor = pad(images, [half for side in sides for half in (side // 2, side - side // 2)], value=value)
    return padded


def build(arch: str = ARCH, stem: str = STEM, width: int = WIDTH, padding: str = PADDING) -> ResNet:
    """Return torchvision's ResNet of this width and stem, without classifier: float32 [B, 3, H, W] to features [B, D]."""
    (block, depths), net = BLOCKS[arch], ResNet(BasicBlock, [1, 1, 1, 1])
    kernel, stride = (3, 1) if stem == "small" else (7, 2)
    net.conv1 = nn.Conv2d(3, width, kernel, stride, padding=kernel // 2, bias=False)
    net.bn1, net.fc, net.inplanes = nn.BatchNorm2d(width), nn.Identity(), width
    net.maxpool = nn.Identity() if stem == "small" else net.maxpool
    for index, depth in enumerate(depths):
        setattr(net, f"layer{index + 1}", net._make_layer(block, width * 2**index, depth, stride=1 if index == 0 else 2))
    for part in list(net.modules()) if padding == "same" else []:
        for name, layer in list(part.named_children()):
            if isinstance(layer, nn.Conv2d) and layer.stride[0] == 2 and layer.kernel_size[0] > 1:
                setattr(part, name, SameConv2d(layer.in_channels, layer.out_channels, layer.kernel_size[0], 2, bias=False))
            elif isinstance(layer, nn.MaxPool2d):
                setattr(part, name, SameMaxPool2d(3, 2))
    return net


def load(path: str | Path = WEIGHTS) -> ResNet:
    """Return the encoder with its weights, on the CPU and in evaluation mode; it can be trained further."""
    content = bytearray(Path(path).read_bytes())
    begin = 8 + int.from_bytes(content[:8], "little")
    state = {}
    for name, entry in json.loads(content[8:begin]).items():
        if name != "__metadata__":
            start, end = (begin + offset for offset in entry["data_offsets"])
            state[name] = torch.frombuffer(content[start:end], dtype=DTYPES[entry["dtype"]]).reshape(entry["shape"])
    net = build()
    net.load_state_dict(state)
    return net.eval()


def transform(image: Image.Image) -> Tensor:
    """Return an image of 8 bits a channel as the encoder takes it: resized, cut and normalised, float32 [3, SIZE, SIZE]."""
    image = image.convert("RGB")
    width, height = (int(RESIZE * side / min(image.size)) for side in image.size)
    for size in ((width, image.height), (width, height)):  # one side after the other: Pillow's own order depends on its version
        image = image.resize(size, Image.Resampling.BILINEAR)
    left, top = round((width - SIZE) / 2), round((height - SIZE) / 2)
    pixels: Tensor = pil_to_tensor(image.crop((left, top, left + SIZE, top + SIZE))).float()
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return pixels * (1.0 / (255.0 * std)) - mean / std
