"""What an encoder can be exported as, and for which networks; decided without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from obowlab.config import Backbone
from obowlab.errors import UserError
from obowlab.weights import WEIGHTS_SUFFIXES

Format = Literal["torchvision", "timm", "safetensors", "module"]
FORMATS: tuple[Format, ...] = get_args(Format)

FILES: dict[Format, tuple[str, ...]] = {
    "torchvision": (),
    "timm": ("config.json", "model.safetensors"),
    "safetensors": (),
    "module": ("encoder.py", "encoder.safetensors"),
}
"""The files in the folder that a format is; those that are one file have none."""

TORCH_SUFFIXES = (".pth", ".pt", ".tar")


def choose_format(asked: Format | None, *, out: Path) -> Format:
    """Return the format that was asked for, or that the name of the target means, and check that the two agree.

    Args:
        asked: None leaves it to the name.
        out: the file or folder to write.

    Raises:
        UserError: the name has another ending than the format's.
    """
    if asked is None:
        if out.suffix in WEIGHTS_SUFFIXES:
            return "safetensors" if out.suffix == ".safetensors" else "torchvision"
        if out.suffix and not out.is_dir():
            raise UserError(
                f"--out {out} says no format: end it in .pth (torchvision) or .safetensors, or add --format, "
                f"one of {', '.join(FORMATS)}."
            )
        return "module"
    endings = {"torchvision": TORCH_SUFFIXES, "safetensors": (".safetensors",)}.get(asked)
    if endings is not None and out.suffix not in endings:
        raise UserError(f"--out {out} must end in {' or '.join(endings)} for --format {asked}.")
    if endings is None and (out.suffix in WEIGHTS_SUFFIXES or out.is_file()):
        raise UserError(f"--out {out} must be a folder for --format {asked}: it holds {' and '.join(FILES[asked])}.")
    return asked


def targets(format: Format, *, out: Path) -> tuple[Path, ...]:
    """Return the files that an export writes."""
    return tuple(out / name for name in FILES[format]) or (out,)


def refuse_format(format: Format, *, backbone: Backbone, name: str) -> None:
    """Refuse a format in which a network does not exist.

    Args:
        format: to write.
        backbone: the network.
        name: of the encoder.

    Raises:
        UserError: names the format that can hold it.
    """
    usual = backbone == Backbone(arch=backbone.arch) and backbone.arch != "resnet10"
    if format in ("torchvision", "timm") and not usual:
        shape = f"stem '{backbone.stem}' and width {backbone.width}"
        shape += f" and padding '{backbone.padding}'" if backbone.padding != "torchvision" else ""
        raise UserError(
            f"{format} has no {backbone.arch} with {shape}, which {name} has: --format module --out FOLDER writes any encoder, "
            "with a module that needs torch and torchvision only."
        )
