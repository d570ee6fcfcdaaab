"""What must be set where an exported encoder is used, one sentence per format. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path

from obowlab.weights.formats import Format
from obowlab.weights.info import EncoderInfo


def usage(format: Format, *, info: EncoderInfo, path: Path) -> str:
    """Return one sentence on how to load an exported encoder and what to show it.

    Args:
        format: of the export.
        info: of the encoder.
        path: the file or folder that was written.
    """
    pixels = f"RGB in [0, 1] with mean {_numbers(info.mean)} and deviation {_numbers(info.std)}"
    side, depth = info.original_size, info.backbone.arch.removeprefix("resnet")
    sentences: dict[Format, str] = {
        "torchvision": "Set model.fc = torch.nn.Identity() before load_state_dict, as the file has no classifier; "
        f"images are {pixels}.",
        "timm": f'timm.create_model("local-dir:{path}", pretrained=True) reads it; images are {pixels}, as config.json says.',
        "mmpretrain": f'Set backbone=dict(type="ResNet", depth={depth}, style="pytorch", init_cfg=dict(type="Pretrained", '
        f'checkpoint="{path}")) without a prefix, and data_preprocessor=dict(mean={_bytes(info.mean)}, std={_bytes(info.std)}, '
        "to_rgb=True), or bgr_to_rgb=True in MMDetection and MMSegmentation.",
        "detectron2": f"Set what {path.with_suffix('.yaml')} says: RGB, mean {_bytes(info.mean)}, deviation {_bytes(info.std)} "
        "and no stride in the 1x1 convolutions; its log must not say that weights were not found.",
        "onnx": f"The input `images` is float32 [batch, 3, {side}, {side}], {pixels}; the output is `features`.",
        "safetensors": f"obowlab.load reads it; images are {pixels}, which its transform does.",
        "module": f"load() in {path / 'encoder.py'} returns the network; images are {pixels}, which its transform does.",
    }
    return sentences[format]


def detectron2_settings(info: EncoderInfo, *, weights: str) -> str:
    """Return the settings of Detectron2 that an encoder needs, YAML.

    Args:
        info: of the encoder.
        weights: name of the file.
    """
    small = "" if info.backbone.arch == "resnet50" else "    RES2_OUT_CHANNELS: 64\n"
    return (
        "# Written by obowlab. Self-supervised weights need SyncBN, as their statistics are not those of detection.\n"
        f"MODEL:\n  WEIGHTS: {json.dumps(weights)}\n"
        f"  PIXEL_MEAN: {_bytes(info.mean)}\n  PIXEL_STD: {_bytes(info.std)}\n"
        "  BACKBONE:\n    FREEZE_AT: 0\n"
        f"  RESNETS:\n    DEPTH: {info.backbone.arch.removeprefix('resnet')}\n    STRIDE_IN_1X1: false\n    NORM: SyncBN\n{small}"
        "INPUT:\n  FORMAT: RGB\n"
        "TEST:\n  PRECISE_BN:\n    ENABLED: true\n"
    )


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _bytes(values: tuple[float, ...]) -> str:
    """Return values of pixels from 0 to 255."""
    return f"[{_numbers(tuple(255 * value for value in values))}]"
