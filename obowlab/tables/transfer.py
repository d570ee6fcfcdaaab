"""Tables of transfer (Tables 6 and 9): rows are encoders, columns what protocols of `obowlab eval` measure of them.

A file in `ablations/` with `kind = "transfer"` names, for every scale, the recipe whose run a row's encoder is, and the preset
and the images of every protocol. What was measured is kept in `RUNS_ROOT/.tables/NAME-SCALE.transfer` after every measurement,
and tables are shown from that file alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from obowlab.config import Loaded, Section, canonical_hash, load_recipe, nearest
from obowlab.config.protocols import TRAININGS, recipe_of
from obowlab.errors import UserError
from obowlab.tables.kept import identity
from obowlab.tables.measured import check_scales, load_row, read_table, recipe_place
from obowlab.tables.spec import NAME, is_result, override_texts

PROTOCOLS = (*TRAININGS, "voc07-svm")


class TransferColumn(Section):
    """A column of the file."""

    metric: str = Field(pattern=NAME, description="as `obowlab eval` names it; the paper's values have the same name")
    label: str
    protocol: str = Field("", description="of `obowlab eval`; empty: the paper's values alone")
    presets: dict[str, str] = Field({}, description="scale -> preset of the protocol")
    datasets: dict[str, str] = Field({}, description="scale -> data set, where it is not the protocol's own")
    set: dict[str, dict[str, Any]] = Field({}, description="scale -> recipe key -> value, of a protocol that is a training")
    images: int | None = Field(None, description="how many the paper's test has")


class TransferRow(Section):
    """A row of the file."""

    key: str = Field(pattern=NAME, description="short name for --rows and --weights, unique in the table")
    label: str
    group: str = ""
    epochs: int | None = Field(None, description="of pretraining, in the paper")
    recipes: dict[str, str] = Field({}, description="scale -> recipe whose run is measured")
    set: dict[str, dict[str, Any]] = Field({}, description="scale -> recipe key -> value")
    untrained: bool = Field(False, description="measure the recipe's network as it is before training")
    paper: dict[str, float] = Field({}, description="metric -> the paper's value, percent")
    footnotes: tuple[str, ...] = ()


class TransferFile(Section):
    """A table file of transfer."""

    kind: Literal["transfer"]
    title: str
    footnotes: tuple[str, ...] = ()
    column: tuple[TransferColumn, ...] = Field(min_length=1)
    row: tuple[TransferRow, ...] = Field(min_length=1)


@dataclass(frozen=True)
class TransferTable:
    """A table of transfer at one scale.

    Attributes:
        name: of its file, without the ending.
        scale: one of `SCALES`.
        file: what it says.
        pretraining: the recipe of every row that has one at this scale, by key.
        trainings: the recipe of every protocol that is a training, by protocol; without the encoder.
        datasets: what every protocol measures on, by protocol.
        changes: what is changed of every training's recipe, as texts, by protocol.
    """

    name: str
    scale: str
    file: TransferFile
    pretraining: dict[str, Loaded] = field(repr=False)
    trainings: dict[str, Loaded] = field(repr=False)
    datasets: dict[str, str]
    changes: dict[str, tuple[str, ...]] = field(repr=False)

    @property
    def protocols(self) -> tuple[str, ...]:
        """What is measured of every encoder, in the order of the columns."""
        return tuple(self.datasets)

    @property
    def file_name(self) -> str:
        """The name under which what was measured is kept."""
        return f"{identity(self.name, scale=self.scale, changes=())}.transfer"


class Given(BaseModel):
    """An encoder that a row was given with --weights.

    Attributes:
        name: as it was named.
        run_id: of a run of the store; None for other encoders.
        weights_hash: its identity (`EncoderInfo.identity`).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    run_id: str | None
    weights_hash: str


class Entry(BaseModel):
    """What a protocol measured of a row's encoder.

    Attributes:
        row: its key.
        protocol: of `obowlab eval`.
        seed: of a training; 0 for protocols that are none.
        question: hash of everything that was known before measuring: protocol, settings, images' name, weights, seed.
        encoder: what was measured, as its row shows it.
        weights_hash: its identity (`EncoderInfo.identity`).
        dataset: name of the images.
        basis: protocol and images as hashes: what must be equal for two values to be means of one another.
        run_id: of the training; None for protocols that are none.
        measurements: as results have them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    row: str
    protocol: str
    seed: int
    question: str
    encoder: str
    weights_hash: str
    dataset: str
    basis: str
    run_id: str | None
    measurements: tuple[dict[str, Any], ...]


class Transfers(BaseModel):
    """Everything that was measured for a table.

    Attributes:
        given: encoders of rows that were given one, by key.
        entries: in the order of time.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    given: dict[str, Given] = {}
    entries: tuple[Entry, ...] = ()

    def answer(self, question: str) -> Entry | None:
        """Return what was measured for a question; None where nothing was."""
        return next((entry for entry in reversed(self.entries) if entry.question == question), None)

    def of_row(self, row: str) -> list[Entry]:
        """Return the newest entry of every protocol and seed, of the encoder that was measured last for a row."""
        entries = [entry for entry in self.entries if entry.row == row]
        newest = {(each.protocol, each.seed): each for each in entries if each.weights_hash == entries[-1].weights_hash}
        return [newest[key] for key in sorted(newest)]

    def with_entry(self, entry: Entry) -> Transfers:
        """Return the same with an entry more, in place of an earlier one for the same row and question."""
        others = tuple(each for each in self.entries if (each.row, each.question) != (entry.row, entry.question))
        return self.model_copy(update={"entries": (*others, entry)})


def load_transfer(name: str, *, scale: str) -> TransferTable:
    """Read a table of transfer and resolve its recipes at a scale.

    Args:
        name: of a shipped table, or its file.
        scale: one of `SCALES`.

    Raises:
        UserError: no such scale, protocol, preset, recipe or key; two rows or columns of one name.
    """
    path, file = read_table(name, scale=scale, shape=TransferFile)
    try:
        _check(file)
        recipes = {row.key: recipe_place(row.recipes[scale], folder=path.parent) for row in file.row if scale in row.recipes}
        sets = {row.key: row.set.get(scale, {}) for row in file.row}
        pretraining = {key: load_row(recipe, key=key, changes=sets[key]) for key, recipe in recipes.items()}
        here = {each.protocol: each for each in file.column if each.protocol}
        changes = {protocol: _changes(column, scale=scale) for protocol, column in here.items()}
        trainings = {
            protocol: load_recipe(recipe_of(protocol, preset=column.presets.get(scale)), changes=changes[protocol])
            for protocol, column in here.items()
            if protocol in TRAININGS
        }
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    datasets = {
        protocol: trainings[protocol].recipe.data.dataset if protocol in trainings else column.datasets.get(scale, "voc07")
        for protocol, column in here.items()
    }
    texts = {protocol: override_texts(changed) for protocol, changed in changes.items()}
    return TransferTable(path.stem, scale, file, pretraining, trainings, datasets, texts)


def question(table: TransferTable, *, protocol: str, seed: int, weights_hash: str, settings: Mapping[str, Any]) -> str:
    """Return a hash of what is asked of an encoder, as far as it is known before measuring.

    Args:
        table: at its scale.
        protocol: one of the table's.
        seed: of a training.
        weights_hash: the encoder's identity.
        settings: of a protocol that is no training.
    """
    training = table.trainings.get(protocol)
    asked = training.recipe.fingerprint(seed=seed) if training is not None else [dict(settings), table.datasets[protocol]]
    return canonical_hash([protocol, asked, weights_hash])


# -------------------------------------------------------------------------------------------------------------- helpers


def _check(file: TransferFile) -> None:
    for what, names in (("rows", [row.key for row in file.row]), ("columns", [column.metric for column in file.column])):
        if len(set(names)) != len(names):
            raise UserError(f"two {what} have the name '{next(name for name in names if names.count(name) > 1)}'.")
    metrics = [column.metric for column in file.column]
    for column in file.column:
        if column.protocol and column.protocol not in PROTOCOLS:
            raise UserError(
                f"column '{column.metric}' names the protocol '{column.protocol}'.{nearest(column.protocol, PROTOCOLS)}"
            )
        if column.protocol and not is_result(column.metric):
            raise UserError(f"'{column.metric}' is not a metric of an evaluation.")
        check_scales(f"column '{column.metric}'", (*column.presets, *column.datasets, *column.set))
    for row in file.row:
        check_scales(f"row '{row.key}'", (*row.recipes, *row.set))
        for metric in row.paper:
            if metric not in metrics:
                raise UserError(f"row '{row.key}' has a value of '{metric}', which is no column.{nearest(metric, metrics)}")


def _changes(column: TransferColumn, *, scale: str) -> dict[str, Any]:
    named = {"data.dataset": column.datasets[scale]} if scale in column.datasets else {}
    return {**named, **column.set.get(scale, {})}
