"""How the tensors of a ResNet are called, and laid out, in other people's code: each scheme to torchvision's names and back."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from torch import Tensor

from obowlab.weights.releases import Scheme

Rules = Sequence[tuple[str, str | Callable[[re.Match[str]], str]]]
"""Pairs of a regular expression and what replaces it, in the order in which they are applied."""

TRUNK = re.compile(r"(conv1|bn1|layer[1-4])\.")
"""How the names of an encoder begin in torchvision."""


@dataclass(frozen=True)
class Naming:
    """One scheme.

    Attributes:
        first: names of the first layers, of which one at least must be there for a network to be recognised.
        block: names of the first block's layers, likewise.
        ours: returns torchvision's name.
        theirs: returns the scheme's name of what has torchvision's.
        tensor: returns a tensor as torch lays it out.
    """

    first: tuple[str, ...]
    block: tuple[str, ...]
    ours: Callable[[str], str]
    theirs: Callable[[str], str]
    tensor: Callable[[Tensor], Tensor] = Tensor.contiguous


def replaced(name: str, rules: Rules) -> str:
    """Apply rules to a name, one after the other."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _from_tensorflow(tensor: Tensor) -> Tensor:
    """Return a kernel [H, W, I, O] as [O, I, H, W], and a batch norm's [1, 1, 1, C] as [C]."""
    if tensor.dim() == 4 and tensor.shape[:3] == (1, 1, 1) and tensor.shape[3] > 0:
        return tensor.reshape(-1)
    return (tensor.permute(3, 2, 0, 1) if tensor.dim() == 4 else tensor).contiguous()


# -------------------------------------------------------------------------------------------------------------- the tables

OBOW: tuple[Rules, Rules] = (
    (
        (r"^_feature_blocks\.0\.Conv\.", "conv1."),
        (r"^_feature_blocks\.0\.bn\.", "bn1."),
        (r"^_feature_blocks\.([1-4])\.", r"layer\1."),
    ),
    (
        (r"^conv1\.", "_feature_blocks.0.Conv."),
        (r"^bn1\.", "_feature_blocks.0.bn."),
        (r"^layer([1-4])\.", r"_feature_blocks.\1."),
    ),
)
"""The authors' names to torchvision's, and back."""

DETECTRON2: tuple[Rules, Rules] = (
    (
        (r"^stem\.", ""),
        (r"^res([2-5])\.", lambda found: f"layer{int(found[1]) - 1}."),
        (r"conv(\d)\.norm\.", r"bn\1."),
        (r"shortcut\.norm\.", "downsample.1."),
        (r"shortcut\.", "downsample.0."),
    ),
    (
        (r"^(?!layer)", "stem."),
        (r"^layer([1-4])\.", lambda found: f"res{int(found[1]) + 1}."),
        (r"\bbn(\d)\.", r"conv\1.norm."),
        (r"downsample\.0\.", "shortcut."),
        (r"downsample\.1\.", "shortcut.norm."),
    ),
)
"""Detectron2's names to torchvision's, and back."""

_HAIKU_NORM = {"scale": "weight", "offset": "bias", "~/mean_ema/average": "running_mean", "~/var_ema/average": "running_var"}
_TF_NORM = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}


def _haiku_ours(name: str) -> str:
    name = replaced(
        name,
        (
            (r"^initial_conv/w$", "conv1.weight"),
            (r"^initial_batchnorm/", "bn1."),
            (r"^block_group_(\d+)/~/block_(\d+)/~/", lambda found: f"layer{int(found[1]) + 1}.{found[2]}."),
            (r"\bconv_(\d)/w$", lambda found: f"conv{int(found[1]) + 1}.weight"),
            (r"\bbatchnorm_(\d)/", lambda found: f"bn{int(found[1]) + 1}."),
            (r"\bshortcut_conv/w$", "downsample.0.weight"),
            (r"\bshortcut_batchnorm/", "downsample.1."),
        ),
    )
    head, _, last = name.rpartition(".")
    return f"{head}.{_HAIKU_NORM[last]}" if last in _HAIKU_NORM else name


def _haiku_theirs(name: str) -> str:
    place, _, last = name.rpartition(".")
    norm = {ours: theirs for theirs, ours in _HAIKU_NORM.items()}
    is_norm = bool(re.search(r"bn\d$|downsample\.1$", place))
    place = replaced(
        place,
        (
            (r"^conv1$", "initial_conv"),
            (r"^bn1$", "initial_batchnorm"),
            (r"^layer(\d)\.(\d+)\.", lambda found: f"block_group_{int(found[1]) - 1}/~/block_{found[2]}/~/"),
            (r"conv(\d)$", lambda found: f"conv_{int(found[1]) - 1}"),
            (r"bn(\d)$", lambda found: f"batchnorm_{int(found[1]) - 1}"),
            (r"downsample\.0$", "shortcut_conv"),
            (r"downsample\.1$", "shortcut_batchnorm"),
        ),
    )
    return f"{place}/{norm.get(last, last) if is_norm else 'w'}"


@cache
def _simclr_layers() -> tuple[list[str], list[str]]:
    """Return the convolutions and batch norms of a ResNet-50 in the order in which SimCLR's code creates them."""
    convolutions, norms = ["conv1"], ["bn1"]
    for layer, depth in enumerate((3, 4, 6, 3), start=1):
        for block in range(depth):
            place = f"layer{layer}.{block}"
            if block == 0:  # the projection of the shortcut comes first
                convolutions.append(f"{place}.downsample.0")
                norms.append(f"{place}.downsample.1")
            convolutions += [f"{place}.conv{number}" for number in (1, 2, 3)]
            norms += [f"{place}.bn{number}" for number in (1, 2, 3)]
    return convolutions, norms


def _simclr_ours(name: str) -> str:
    found = re.fullmatch(r"base_model/(conv2d|batch_normalization)(?:_(\d+))?/(\w+)", name)
    if found is None:
        return name
    layers = _simclr_layers()[found[1] != "conv2d"]
    number = int(found[2] or 0)
    last = "weight" if found[3] == "kernel" else _TF_NORM.get(found[3])
    return name if number >= len(layers) or last is None else f"{layers[number]}.{last}"


def _simclr_theirs(name: str) -> str:
    place, _, last = name.rpartition(".")
    convolutions, norms = _simclr_layers()
    kind, layers = ("conv2d", convolutions) if place in convolutions else ("batch_normalization", norms)
    if place not in layers:
        return name
    number = layers.index(place)
    norm = {ours: theirs for theirs, ours in _TF_NORM.items()}
    word = "kernel" if layers is convolutions else norm.get(last, last)
    return f"base_model/{kind}{f'_{number}' if number else ''}/{word}"


NAMINGS: Mapping[Scheme, Naming] = {
    "torchvision": Naming(("conv1.weight", "bn1.weight"), ("layer1.0.conv1.weight", "layer1.0.bn1.weight"), ours=str, theirs=str),
    "obow": Naming(
        ("_feature_blocks.0.Conv.weight", "_feature_blocks.0.bn.weight"),
        ("_feature_blocks.1.0.conv1.weight", "_feature_blocks.1.0.bn1.weight"),
        ours=lambda name: replaced(name, OBOW[0]),
        theirs=lambda name: replaced(name, OBOW[1]),
    ),
    "detectron2": Naming(
        ("stem.conv1.weight", "stem.conv1.norm.weight"),
        ("res2.0.conv1.weight", "res2.0.conv1.norm.weight"),
        ours=lambda name: replaced(name, DETECTRON2[0]),
        theirs=lambda name: replaced(name, DETECTRON2[1]),
    ),
    "simclr-tf": Naming(
        ("base_model/conv2d/kernel", "base_model/batch_normalization/gamma"),
        ("base_model/conv2d_2/kernel", "base_model/batch_normalization_2/gamma"),
        ours=_simclr_ours,
        theirs=_simclr_theirs,
        tensor=_from_tensorflow,
    ),
    "haiku": Naming(
        ("initial_conv/w", "initial_batchnorm/scale"),
        ("block_group_0/~/block_0/~/conv_0/w", "block_group_0/~/block_0/~/batchnorm_0/scale"),
        ours=_haiku_ours,
        theirs=_haiku_theirs,
        tensor=_from_tensorflow,
    ),
}
