"""What an encoder can be exported as, and for which networks; decided without torch."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Literal, get_args

from obowlab.config import Backbone
from obowlab.errors import UserError
from obowlab.weights import WEIGHTS_SUFFIXES

Format = Literal["torchvision", "timm", "mmpretrain", "detectron2", "onnx", "safetensors", "module"]
FORMATS: tuple[Format, ...] = get_args(Format)

FILES: dict[Format, tuple[str, ...]] = {
    "torchvision": (),
    "timm": ("config.json", "model.safetensors"),
    "mmpretrain": (),
    "detectron2": (),
    "onnx": (),
    "safetensors": (),
    "module": ("encoder.py", "encoder.safetensors"),
}
"""The files in the folder that a format is; those that are one file have none."""

TORCH_SUFFIXES = (".pth", ".pt", ".tar")

SUFFIXES: dict[Format, tuple[str, ...]] = {
    "torchvision": TORCH_SUFFIXES,
    "mmpretrain": TORCH_SUFFIXES,
    "detectron2": (".pkl",),
    "onnx": (".onnx",),
    "safetensors": (".safetensors",),
}
"""How the names of formats end that are one file; the first format of an ending is what the ending alone means."""

USUAL: tuple[Format, ...] = ("torchvision", "timm", "mmpretrain", "detectron2")
"""Formats that have torchvision's networks and no others."""

NEEDS: dict[Format, tuple[str, ...]] = {"onnx": ("onnx", "onnxscript", "onnxruntime")}
"""Packages that obowlab does not bring along."""


def choose_format(asked: Format | None, *, out: Path) -> Format:
    """Return the format that was asked for, or that the name of the target means, and check that the two agree.

    Args:
        asked: None leaves it to the name.
        out: the file or folder to write.

    Raises:
        UserError: the name has another ending than the format's.
    """
    if asked is None:
        by_name = next((format for format, endings in SUFFIXES.items() if out.suffix in endings), None)
        if by_name is None and out.suffix and not out.is_dir():
            raise UserError(
                f"--out {out} says no format: end it in .pth (torchvision), .safetensors, .pkl (detectron2) or .onnx, or add "
                f"--format, one of {', '.join(FORMATS)}."
            )
        return by_name or "module"
    endings = SUFFIXES.get(asked)
    if endings is not None and out.suffix not in endings:
        raise UserError(f"--out {out} must end in {' or '.join(endings)} for --format {asked}.")
    if endings is None and (out.suffix in (*WEIGHTS_SUFFIXES, ".pkl", ".onnx") or out.is_file()):
        raise UserError(f"--out {out} must be a folder for --format {asked}: it holds {' and '.join(FILES[asked])}.")
    return asked


def targets(format: Format, *, out: Path) -> tuple[Path, ...]:
    """Return the files that an export writes."""
    if format == "detectron2":
        return out, out.with_suffix(".yaml")
    return tuple(out / name for name in FILES[format]) or (out,)


def refuse_format(format: Format, *, backbone: Backbone, name: str) -> None:
    """Refuse a format in which a network does not exist, or that this Python cannot write.

    Args:
        format: to write.
        backbone: the network.
        name: of the encoder.

    Raises:
        UserError: names the format that can hold it, or the packages that are lacking.
    """
    usual = backbone == Backbone(arch=backbone.arch) and backbone.arch != "resnet10"
    lacking = [name for name in NEEDS.get(format, ()) if importlib.util.find_spec(name) is None]
    if lacking:
        raise UserError(f"--format {format} needs {' and '.join(lacking)}: pip install {' '.join(lacking)}.")
    if format in USUAL and not usual:
        shape = f"stem '{backbone.stem}' and width {backbone.width}"
        shape += f" and padding '{backbone.padding}'" if backbone.padding != "torchvision" else ""
        raise UserError(
            f"{format} has no {backbone.arch} with {shape}, which {name} has: --format module --out FOLDER writes any encoder, "
            "with a module that needs torch and torchvision only."
        )
