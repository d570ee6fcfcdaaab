"""Find the ResNets in what a weights file holds, choose one, and part its tensors from the rest.

What is chosen and what may stand beside it follows from the tables in `obowlab.weights.releases`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from obowlab.errors import UserError
from obowlab.weights.naming import NAMINGS, TRUNK, Naming
from obowlab.weights.reading import State, WeightsFile
from obowlab.weights.releases import (
    CONTAINERS,
    OTHER_NETWORKS,
    PREFIXES,
    RELEASES,
    TRAPS,
    WRAPPERS,
    Release,
    Scheme,
    set_aside_as,
)

DROPPED = "left out, as --drop says"

DEEPEST = 5
"""How many keys lead to a state dict at most; VISSL's has four."""


@dataclass(frozen=True)
class Network:
    """A ResNet in a file.

    Attributes:
        container: the keys that lead to its state dict.
        prefix: that all its names have there.
        scheme: how its tensors are called.
        names: of the whole state dict, with the tensors or arrays.
    """

    container: tuple[str, ...]
    prefix: str
    scheme: Scheme
    names: Mapping[str, Any] = field(repr=False)

    @property
    def naming(self) -> Naming:
        """How its tensors are called."""
        return NAMINGS[self.scheme]

    @property
    def parts(self) -> tuple[str, ...]:
        """The words by which it can be asked for: its keys and the parts of its prefix."""
        return (*self.container, *(part for part in re.split(r"[./]", self.prefix) if part))

    def is_its_own(self, name: str) -> bool:
        """Return whether a tensor of its state dict is the encoder's."""
        return name.startswith(self.prefix) and TRUNK.match(self.naming.ours(name.removeprefix(self.prefix))) is not None

    def __str__(self) -> str:
        """Return its keys and prefix as a user may read them."""
        return " > ".join((*self.container, self.prefix)) if self.prefix else " > ".join(self.container) or "top level"


@dataclass(frozen=True)
class Parted:
    """The tensors of a chosen network, and the rest of its state dict.

    Attributes:
        state: the encoder's tensors in torchvision's names, as they lie in the file.
        spelt: the file's name of each of them.
        aside: names of the file that have a known place beside an encoder, with what they are.
        left_over: names of the file that have none.
    """

    state: State
    spelt: Mapping[str, str]
    aside: Mapping[str, str]
    left_over: Sequence[str]


@dataclass(frozen=True)
class Found:
    """What a file holds, and what of it was chosen.

    Attributes:
        container: what kind of file it is.
        top: the keys at its top.
        networks: all that are in it.
        network: the chosen one.
        parted: its tensors and the rest.
        release: the format; None where none was recognised.
    """

    container: str
    top: Sequence[str]
    networks: Sequence[Network]
    network: Network
    parted: Parted
    release: Release | None

    @property
    def is_full_model(self) -> bool:
        """Whether it is a full OBoW model of the authors."""
        return self.network.scheme == "obow" and self.network.parts[-1:] == ("feature_extractor",)

    def spell(self, name: str) -> str:
        """Return the file's own name of what has torchvision's."""
        return self.parted.spelt.get(name, self.network.prefix + self.network.naming.theirs(name))


def find(
    file: WeightsFile, *, network: str | None = None, release: str | None = None, drop: Sequence[str] = (), origin: Path
) -> Found:
    """Find the encoder in a file.

    Args:
        file: as it was read.
        network: a key of the file, or a part of its names, that leads to the network to take.
        release: key of the format that the user says it has.
        drop: beginnings of names that are left out.
        origin: the file.

    Raises:
        UserError: there is no network, not the one that was asked for, several, or the file is not laid out as the format.
    """
    networks = find_networks(file.content)
    if not networks:
        raise _no_network(file.content, origin=origin)
    refuse_traps(networks, meta=file.content.get("meta"), origin=origin)
    chosen = choose_network(networks, asked=network, origin=origin)
    others = (name for name, value in chosen.names.items() if not isinstance(value, Tensor | np.ndarray))
    odd = next((name for name in others if chosen.container or chosen.is_its_own(name)), None)
    if odd is not None:
        raise UserError(f"{origin} has a state dict in which '{odd}' is no tensor but {type(chosen.names[odd]).__name__}.")
    parted = part(chosen, others=networks, drop=drop)
    top = [str(key) for key in file.content] if chosen.container else []
    if release is None:
        known = recognise(chosen, top=top, parted=parted)
    else:
        known = next(one for one in RELEASES if one.key == release)
        if not fits(known, chosen, top=top, parted=parted):
            raise UserError(
                f"{origin} is not laid out as {known.title}: its encoder is at '{chosen}'; correct --as or leave it out."
            )
    return Found(container=file.container, top=top, networks=networks, network=chosen, parted=parted, release=known)


def _no_network(content: Mapping[str, Any], *, origin: Path) -> UserError:
    names = [name for _, mapping in _state_dicts(content, ()) for name in mapping]
    if not names:
        inside = f"its keys are {_some(map(str, content))}" if content else "it is empty"
        return UserError(f"{origin} holds no state dict: {inside}.")
    trap = next((told for pattern, told in TRAPS.items() if any(re.search(pattern, name) for name in names)), None)
    if trap is not None:
        return UserError(f"{origin} cannot be imported: {trap}.")
    return UserError(f"{origin} holds no ResNet that obowlab knows: its first key is '{names[0]}'.")


def refuse_traps(networks: Sequence[Network], *, meta: object, origin: Path) -> None:
    """Refuse networks whose names and shapes fit and whose features would still be wrong.

    Args:
        networks: of a file.
        meta: the settings that mmpretrain keeps in a file.
        origin: the file.

    Raises:
        UserError: says what the network is.
    """
    names = [name for network in networks for name in network.names]
    for pattern, told in TRAPS.items():
        if any(re.search(pattern, name) for name in names):
            raise UserError(f"{origin} cannot be imported: {told}.")
    if isinstance(meta, Mapping) and re.search(r"style\W+caffe", str(meta)):
        raise UserError(
            f"{origin} cannot be imported: its settings say style 'caffe', with the stride in the first 1x1 convolution, "
            "whose names are the same and whose features obowlab would get wrong."
        )


def _some(names: Iterable[str]) -> str:
    shown = list(names)
    return ", ".join(shown[:4]) + (f" and {len(shown) - 4} more" if len(shown) > 4 else "")


def find_networks(content: Mapping[str, Any]) -> list[Network]:
    """Return every ResNet in a file, the mapping that `torch.load` returns, in the order of the file."""
    return [network for keys, mapping in _state_dicts(content, ()) for network in _networks_of(keys, mapping)]


def _state_dicts(content: Mapping[str, Any], keys: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    if any(isinstance(value, Tensor | np.ndarray) for value in content.values()):
        yield keys, {str(name): value for name, value in content.items()}
    if len(keys) < DEEPEST:
        for key, value in content.items():
            if isinstance(value, Mapping):
                yield from _state_dicts(value, (*keys, str(key)))


def _networks_of(container: tuple[str, ...], names: Mapping[str, Any]) -> Iterator[Network]:
    for scheme, naming in NAMINGS.items():
        prefixes = dict.fromkeys(
            name[: -len(block)]
            for name in names
            for block in naming.block
            if name.endswith(block) and name[: -len(block)][-1:] in ("", ".", "/")
        )
        for prefix in prefixes:
            if any(f"{prefix}{first}" in names for first in naming.first):
                yield Network(container, prefix, scheme, names)


def choose_network(networks: Sequence[Network], *, asked: str | None, origin: Path) -> Network:
    """Return the network to import.

    Args:
        networks: of one file, at least one.
        asked: a key of the file, or a part of the names' prefix, that leads to it.
        origin: the file.

    Raises:
        UserError: none has what was asked for, or several are equally good.
    """
    if asked is not None:
        found = [network for network in networks if asked.strip(".") in network.parts]
        if not found:
            raise UserError(f"{origin} has no network '{asked}'; it has {_list(networks)}.")
        networks = found
    best = min(map(_rank, networks))
    chosen = [network for network in networks if _rank(network) == best]
    if len(chosen) > 1:
        raise UserError(f"{origin} holds several networks ({_list(chosen)}): choose one with `weights import --network PART`.")
    return chosen[0]


def _rank(network: Network) -> tuple[bool, int, int]:
    """Return how late a network comes in the order of preference."""
    container = CONTAINERS.index(network.container) if network.container in CONTAINERS else len(CONTAINERS)
    prefix = min((PREFIXES.index(part) for part in network.parts if part in PREFIXES), default=len(PREFIXES))
    return any(part in OTHER_NETWORKS for part in network.parts), container, prefix if network.prefix else 0


def _list(networks: Sequence[Network]) -> str:
    return ", ".join(f"'{network}'" for network in networks)


def part(network: Network, *, others: Sequence[Network] = (), drop: Sequence[str] = ()) -> Parted:
    """Part the encoder's tensors from the rest of its state dict, and give them torchvision's names.

    Args:
        network: the chosen one.
        others: all networks of the file; tensors of others are set aside.
        drop: beginnings of names that are set aside too.
    """
    others_parts = {name for other in others if other != network for name in other.parts} - set(network.parts)
    others_parts.update(OTHER_NETWORKS)
    state: State = {}
    spelt: dict[str, str] = {}
    aside: dict[str, str] = {}
    left_over: list[str] = []
    for name, value in network.names.items():
        ours = network.naming.ours(name.removeprefix(network.prefix))
        shown = _beside_name(name, network=network)
        if network.is_its_own(name) and ours not in state:
            state[ours] = torch.from_numpy(np.ascontiguousarray(value)) if isinstance(value, np.ndarray) else value
            spelt[ours] = name
        elif name.startswith(tuple(drop)) or shown.startswith(tuple(drop)):
            aside[name] = DROPPED
        elif not name.startswith(network.prefix) and not others_parts.isdisjoint(re.split(r"[./]", name)):
            aside[name] = "another network"
        elif (what := set_aside_as(shown)) is not None:
            aside[name] = what
        else:
            left_over.append(name)
    return Parted(state=state, spelt=spelt, aside=aside, left_over=left_over)


def _beside_name(name: str, *, network: Network) -> str:
    """Return a name without the parts that it shares with the prefix of the network, and without wrappers."""
    own, shared = re.findall(r"[^./]*[./]?", name), re.findall(r"[^./]+[./]", network.prefix)
    count = 0
    while count < len(shared) and own[count] == shared[count]:
        count += 1
    rest = "".join(own[count:])
    while rest.startswith(WRAPPERS):
        rest = rest.partition(".")[2]
    return rest


def recognise(network: Network, *, top: Sequence[str], parted: Parted) -> Release | None:
    """Return the first release whose layout a file has; None if there is none."""
    return next((one for one in RELEASES if not one.is_asked_for and fits(one, network, top=top, parted=parted)), None)


def fits(release: Release, network: Network, *, top: Sequence[str], parted: Parted) -> bool:
    """Return whether a network is laid out as a release.

    Args:
        release: of the table.
        network: that was chosen.
        top: the keys at the top of the file.
        parted: its tensors.
    """
    prefix = network.prefix
    for wrapper in WRAPPERS:
        prefix = prefix.replace(wrapper, "")
    others = [
        f"{_beside_name(name, network=network)} {_shape(network.names[name])}" for name in (*parted.aside, *parted.left_over)
    ]
    return (
        network.scheme == release.scheme
        and re.fullmatch(release.container, ">".join(network.container)) is not None
        and re.fullmatch(release.prefix, prefix) is not None
        and set(release.top) <= set(top)
        and all(any(re.fullmatch(pattern, other) for other in others) for pattern in release.beside)
    )


def _shape(value: Any) -> str:
    return "x".join(map(str, getattr(value, "shape", ())))
