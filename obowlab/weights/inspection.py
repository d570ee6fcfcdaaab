"""What a weights file holds, in lines for a reader; nothing is written and no code of the file is run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from obowlab import text
from obowlab.errors import UserError
from obowlab.weights.encoder_file import Choices, Imported, import_read
from obowlab.weights.info import EncoderInfo, encoder_info
from obowlab.weights.networks import Found, find
from obowlab.weights.reading import read_weights


def inspect(path: Path, *, choices: Choices) -> Iterator[str]:
    """Yield what is in a weights file and what an import would make of it.

    Args:
        path: the file.
        choices: as for an import.

    Raises:
        UserError: the file cannot be read, or no network is found in it.
    """
    file = read_weights(path, plain_objects=choices.plain_objects)
    yield f"file        {path}: {file.container}, {text.size(path.stat().st_size)}"
    own = encoder_info(file.metadata, origin=path)
    if own is not None:
        yield f"encoder     of obowlab, from {own.source}: {_network(own)}"
        yield from about(own)
        return
    if any(not isinstance(value, Tensor) for value in file.content.values()):
        yield f"top level   {_some([_value(key, value) for key, value in file.content.items()], shown=12)}"
    found = find(file, network=choices.network, release=choices.release, drop=choices.drop, origin=path)
    yield f"network     {found.network}{_others(found)}"
    yield f"format      {found.release.title if found.release is not None else 'not a known one'}; {found.network.scheme} names"
    for what in dict.fromkeys(found.parted.aside.values()):
        yield f"set aside   {what}: {_some([name for name, known in found.parted.aside.items() if known == what])}"
    yield f"left over   {_some(found.parted.left_over) or 'nothing'}"
    try:
        imported = import_read(file, choices=choices, origin=path)
    except UserError as error:
        yield f"import      refused: {error}"
        return
    yield f"encoder     {_network(imported.info)}"
    yield from about(imported.info)
    yield from notes(imported)


def about(info: EncoderInfo) -> Iterator[str]:
    """Yield what is kept with an encoder besides its weights."""
    yield f"pixels      RGB in [0, 1], mean {_three(info.mean)}, deviation {_three(info.std)}; padding {info.backbone.padding}"
    if info.origin is not None:
        yield f"sha256      {info.origin.sha256}"
        yield f"licence     {info.origin.licence or 'not said'}"
    if info.origin is not None and info.origin.degraded is not None:
        yield f"degraded    {info.origin.degraded}"


def notes(imported: Imported) -> Iterator[str]:
    """Yield what a user should know, or say, about an import."""
    release, origin = imported.found.release, imported.info.origin
    if imported.num_filled:
        yield f"note        {imported.num_filled} batch norms lacked num_batches_tracked, which is 0 now; nothing here reads it"
    if origin is not None and origin.release == "torchvision":
        yield "note        other files have these names too: --as says which; simclr and byol differ in pixels and padding"
    elif release is not None and (origin is None or origin.licence is None):
        yield f"note        the authors' own files are under {release.licence}; --licence keeps that with the weights"


def _network(info: EncoderInfo) -> str:
    backbone = info.backbone
    return f"{backbone.arch}, stem {backbone.stem}, width {backbone.width}, weights {info.weights_hash[:8]}"


def _three(values: tuple[float, float, float]) -> str:
    return " ".join(f"{value:g}" for value in values)


def _others(found: Found) -> str:
    others = [str(network) for network in found.networks if network != found.network]
    return f"; there are others too, for --network: {', '.join(others)}" if others else ""


def _value(key: object, value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{key} ({len(value)} entries)"
    if isinstance(value, Tensor):
        return f"{key} (tensor)"
    return f"{key} ({value!r:.20})" if isinstance(value, str | int | float) else f"{key} ({type(value).__name__})"


def _some(names: Sequence[object], *, shown: int = 3) -> str:
    return ", ".join(map(str, names[:shown])) + (f" and {len(names) - shown} more" if len(names) > shown else "")
