"""Networks from state dicts: an encoder in torchvision's names, and the authors' full model.

Everything is strict: a key that is missing, left over or of another shape is an error that names it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from obowlab.config import Backbone, Level, Obow
from obowlab.errors import UserError
from obowlab.methods import OBoW, OneProcess
from obowlab.methods.backbones import ARCHITECTURES, ResNet, build_backbone
from obowlab.weights.naming import NAMINGS
from obowlab.weights.reading import State


def infer_backbone(state: Mapping[str, Tensor], *, origin: Path) -> Backbone:
    """Tell architecture, stem and width from the blocks and the first convolution of a state dict in torchvision's names.

    Raises:
        UserError: it is not a ResNet-18, 34 or 50.
    """
    depths = tuple(len({name.split(".")[1] for name in state if name.startswith(f"layer{layer}.")}) for layer in (1, 2, 3, 4))
    expansion = 4 if "layer1.0.conv3.weight" in state else 1
    arch = next((name for name, (block, known) in ARCHITECTURES.items() if (block.expansion, known) == (expansion, depths)), None)
    if arch is None:
        raise UserError(
            f"{origin} holds a ResNet with {'-'.join(map(str, depths))} blocks; known are {', '.join(ARCHITECTURES)}."
        )
    stem = state.get("conv1.weight")
    if any(name.startswith("conv1.0.") for name in state):
        raise UserError(f"{origin} holds a ResNet that begins with several convolutions (conv1.0), which obowlab does not have.")
    if stem is None or stem.dim() != 4 or stem.shape[2] not in (3, 7):
        raise UserError(f"{origin} has no first convolution of 3x3 or 7x7 pixels (conv1.weight).")
    inner = state.get("layer1.0.conv1.weight")
    if inner is not None and inner.dim() == 4 and len(inner) == 2 * len(stem):
        raise UserError(
            f"{origin} holds a ResNet that is wide inside its blocks only, as wide_resnet50_2 and resnext50_32x4d; obowlab's "
            "width is that of every layer, as of SimCLR's and SwAV's."
        )
    return Backbone.model_validate({"arch": arch, "stem": "small" if stem.shape[2] == 3 else "imagenet", "width": stem.shape[0]})


def check_fit(
    state: Mapping[str, Tensor],
    *,
    expected: Mapping[str, Tensor],
    origin: Path,
    spell: Callable[[str], str] = str,
    left_over: Sequence[str] = (),
) -> None:
    """Refuse a state dict whose names or shapes are not exactly the expected ones.

    Args:
        state: in our names.
        expected: in our names.
        origin: the file.
        spell: returns the file's own name of a tensor.
        left_over: names of the file that have no place, besides those of the state dict.

    Raises:
        UserError: names the first few keys of each kind, as the file calls them.
    """
    faults = {
        "missing": [spell(name) for name in expected if name not in state],
        "unexpected": [*(spell(name) for name in state if name not in expected), *left_over],
        "of another shape": [spell(name) for name in expected if name in state and state[name].shape != expected[name].shape],
    }
    problems = [f"{fault}: {_some(names)}" for fault, names in faults.items() if names]
    if problems:
        raise UserError(f"The weights in {origin} do not fit the network ({'; '.join(problems)}).")


def with_counters(state: Mapping[str, Tensor], *, expected: Mapping[str, Tensor]) -> State:
    """Add the `num_batches_tracked` that files of older PyTorch lack; nothing that obowlab does reads it."""
    lacking = (name for name in expected if name.endswith("num_batches_tracked") and name not in state)
    return {**state, **{name: torch.zeros((), dtype=torch.int64) for name in lacking}}


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def build_encoder(
    state: Mapping[str, Tensor],
    *,
    backbone: Backbone,
    origin: Path,
    spell: Callable[[str], str] = str,
    left_over: Sequence[str] = (),
) -> ResNet:
    """Build a ResNet and fill it strictly; it is returned in evaluation mode."""
    model = build_backbone(backbone)
    state = with_counters(state, expected=model.state_dict())
    check_fit(state, expected=model.state_dict(), origin=origin, spell=spell, left_over=left_over)
    model.load_state_dict(state, strict=True)
    return model.eval()


# ---------------------------------------------------------------------------------------------- the authors' full model


def build_model(state: Mapping[str, Tensor], *, origin: Path, prefix: str = "") -> tuple[OBoW, Backbone, dict[str, str]]:
    """Build an OBoW method from the authors' full model: student, teacher, heads, vocabularies, mu_MSD and monitor.

    Levels, number of words, kappa and the monitor's classes follow from the file; everything else of the method's
    configuration (delta_base, momentum, kind of queue vector) is not in it and stays at its default.

    Returns:
        The method in evaluation mode, its backbone, and the keys that have no place in it with the reason.

    Raises:
        UserError: a key is missing, left over or of another shape.
    """
    rest = dict(state)
    unused = {name: reason for name, reason in _SCHEDULE.items() if rest.pop(name, None) is not None}
    student = _ours(_take(rest, "feature_extractor."))
    teacher = _ours(_take(rest, "feature_extractor_teacher."))
    backbone = infer_backbone(student, origin=origin)
    words = _numbered(rest, r"bow_extractor\.bow_extractor\.(\d+)\._embedding", origin=origin)
    levels = _levels_of(words, backbone=backbone, origin=origin)
    sizes = [len(level_words) for level_words in words]
    if len(set(sizes)) != 1:
        raise UserError(
            f"{origin} has levels with different numbers of words ({', '.join(map(str, sizes))}), which obowlab does not do."
        )
    scale = rest.pop("bow_predictor.scale", torch.zeros(0))
    if scale.shape != (len(levels),):
        raise UserError(f"{origin} does not hold one kappa (bow_predictor.scale) for each of its {len(levels)} levels.")

    mapped: State = {f"student.{name}": tensor for name, tensor in student.items()}
    mapped |= {f"teacher.{name}": tensor for name, tensor in teacher.items()}
    for index, level in enumerate(levels):
        vocabulary, head = f"vocabularies.{level}", f"heads.{level}"
        source = f"bow_extractor.bow_extractor.{index}"
        mapped[f"{vocabulary}.words"] = rest.pop(f"{source}._embedding")
        mapped |= _scalars(
            rest, {f"{source}._embedding_ptr": f"{vocabulary}.pointer", f"{source}._min_distance_mean": f"{vocabulary}.msd"}
        )
        # The file does not say when a word was inserted: its age counts from the import.
        steps = rest.pop(f"{source}._track_num_batches", torch.zeros(1))
        unused[f"{source}._track_num_batches"] = "the number of steps taken"
        mapped[f"{vocabulary}.inserted_at"] = torch.full((len(words[index]),), int(steps.item()), dtype=torch.int64)
        mapped[f"{vocabulary}.msd_started"] = torch.tensor(True)
        mapped[f"{head}.kappa"] = scale[index].clone()
        for theirs, ours in (("fc", "fc1"), ("bn", "norm"), ("last_layer", "fc2")):
            layer = _take(rest, f"bow_predictor.layers_w.{index}.b{index}_{theirs}.")
            mapped |= {f"{head}.{ours}.{name}": tensor for name, tensor in layer.items()}
    for theirs, ours in (("batch_norm", "norm"), ("prediction_layer", "fc")):
        mapped |= {
            f"monitor.{ours}.{name}": tensor for name, tensor in _take(rest, f"linear_classifier.layers.{theirs}.").items()
        }

    classifier = mapped.get("monitor.fc.bias")
    method = OBoW(
        Obow(levels=levels, num_words=len(words[0]), kappa=scale[0].item(), learn_kappa=len(set(scale.tolist())) > 1),
        backbone=backbone,
        total_steps=1,
        seed=0,
        num_classes=None if classifier is None else len(classifier),
        comm=OneProcess(),
    )
    mapped = with_counters(mapped, expected=method.state_dict())

    def spell(name: str) -> str:
        return prefix + authors_name(name, levels=levels)

    check_fit({**mapped, **rest}, expected=method.state_dict(), origin=origin, spell=spell)
    method.load_state_dict(mapped, strict=True)
    return method.eval(), backbone, unused


def authors_name(name: str, *, levels: Sequence[Level]) -> str:
    """Return the authors' name of a tensor of an OBoW method; a name of theirs stays."""
    for ours, theirs in (("student.", "feature_extractor."), ("teacher.", "feature_extractor_teacher.")):
        if name.startswith(ours):
            return theirs + NAMINGS["obow"].theirs(name.removeprefix(ours))
    for index, level in enumerate(levels):
        for ours, theirs in _OF_A_LEVEL.items():
            start = ours.replace("LEVEL", level)
            if name.startswith(start):
                return theirs.replace("INDEX", str(index)) + name.removeprefix(start)
    name = re.sub(r"^monitor\.norm\.", "linear_classifier.layers.batch_norm.", name)
    return re.sub(r"^monitor\.fc\.", "linear_classifier.layers.prediction_layer.", name)


_OF_A_LEVEL = {
    "vocabularies.LEVEL.words": "bow_extractor.bow_extractor.INDEX._embedding",
    "vocabularies.LEVEL.pointer": "bow_extractor.bow_extractor.INDEX._embedding_ptr",
    "vocabularies.LEVEL.msd": "bow_extractor.bow_extractor.INDEX._min_distance_mean",
    "heads.LEVEL.kappa": "bow_predictor.scale",
    "heads.LEVEL.fc1.": "bow_predictor.layers_w.INDEX.bINDEX_fc.",
    "heads.LEVEL.norm.": "bow_predictor.layers_w.INDEX.bINDEX_bn.",
    "heads.LEVEL.fc2.": "bow_predictor.layers_w.INDEX.bINDEX_last_layer.",
}
"""Our names of what a level has, and the authors'."""

_SCHEDULE = {
    "_alpha": "the teacher momentum of the last step, a function of the step here",
    "_iteration": "the number of steps taken",
}


def _ours(state: State) -> State:
    return {NAMINGS["obow"].ours(name): tensor for name, tensor in state.items()}


def _take(state: State, prefix: str) -> State:
    """Remove and return every entry under a prefix, without the prefix."""
    return {name.removeprefix(prefix): state.pop(name) for name in list(state) if name.startswith(prefix)}


def _numbered(state: Mapping[str, Tensor], pattern: str, *, origin: Path) -> list[Tensor]:
    """Return the matrices whose names differ by a number, in the order of the numbers, which must be 0, 1, ..."""
    found = {int(match[1]): tensor for name, tensor in state.items() if (match := re.fullmatch(pattern, name))}
    if not found or sorted(found) != list(range(len(found))) or any(tensor.dim() != 2 for tensor in found.values()):
        raise UserError(f"{origin} does not hold one vocabulary (bow_extractor.bow_extractor.N._embedding) per level from 0 on.")
    return [found[index] for index in range(len(found))]


def _levels_of(words: list[Tensor], *, backbone: Backbone, origin: Path) -> tuple[Level, ...]:
    """Tell the level of every vocabulary from its channels."""
    with torch.device("meta"):
        by_channels = {channels: level for level, channels in build_backbone(backbone).level_channels.items()}
    try:
        levels = tuple(by_channels[level_words.shape[1]] for level_words in words)
    except KeyError as error:
        raise UserError(f"{origin} has a vocabulary of {error} channels, which no level of a {backbone.arch} has.") from None
    if len(set(levels)) != len(levels):
        raise UserError(f"{origin} has two vocabularies for {levels[0]}.")
    return levels


def _scalars(state: State, names: Mapping[str, str]) -> State:
    """Take tensors of one element under their new names, as 0-dim tensors; what is absent stays absent."""
    return {
        ours: state.pop(theirs).reshape(()) for theirs, ours in names.items() if theirs in state and state[theirs].numel() == 1
    }
