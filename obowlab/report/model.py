"""What a report shows, as plain values: `report.read` fills it from the run store, `report.pages` turns it into pages."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from obowlab.report.curves import Curve
from obowlab.report.vocabulary_health import Finding
from obowlab.runs.results import Measured
from obowlab.studies.schema import StudyReport
from obowlab.tables.model import Estimate, Status, Table
from obowlab.tables.render import Grid


@dataclass(frozen=True)
class Setting:
    """One value of a run's recipe.

    Attributes:
        key: dotted.
        value: as TOML writes it.
        source: the file or option that set it; `default` otherwise.
        shipped: the value of the recipe of that name, when this run's is another; None when they are the same.
    """

    key: str
    value: str
    source: str
    shipped: str | None


@dataclass(frozen=True)
class Figure:
    """One plotly chart of a page.

    Attributes:
        title: heading.
        description: what is seen, for readers who do not see it.
        data: traces as plotly takes them. A colour is a name of the style sheet, `--c0`, or `--c0/33` with an opacity in
            hexadecimal digits: the chart follows the page into the dark.
        layout: as plotly takes it, without what all charts share (`dashboards/report/charts.js`).
        csv: the same numbers as a table with a header.
        kind: of that table; charts of one kind share a file beside their page. Empty for curves.
        height: in pixels.
        wide: whether it takes the whole width of the page.
        caption: what one must know to read it.
    """

    title: str
    description: str
    data: Sequence[Mapping[str, Any]]
    layout: Mapping[str, Any]
    csv: str
    kind: str = ""
    height: int = 300
    wide: bool = False
    caption: str = ""


@dataclass(frozen=True)
class Gallery:
    """The visual words of one run.

    Attributes:
        folder: holds `words.json` and its pictures.
        preview: names of a few of its pictures, known once they are in the site.
    """

    folder: Path
    preview: tuple[str, ...] = ()


@dataclass(frozen=True)
class DetectionSet:
    """Pictures and curves of a detector's test.

    Attributes:
        folder: holds `detection.json` and its pictures, and is named after the training whose detector it is.
        preview: names of a few of its pictures, known once they are in the site.
    """

    folder: Path
    preview: tuple[str, ...] = ()


@dataclass(frozen=True)
class Run:
    """One run with everything its page shows.

    Attributes:
        run_id: its name.
        recipe: name of its recipe.
        title: of its recipe.
        seed: of weights and data.
        changes: what differs from the base recipe and makes another training, dotted key to value (four digits).
        short: what distinguishes it from the base recipe, for lists: its own title, or the changes in short; empty for nothing.
        base_recipe: the shipped recipe that it is closest to, under one name where several are the same training; else its own.
        family: the same for all seeds of one training, whatever its recipe is called.
        status: as of the report.
        message: why it stopped or failed.
        step: optimiser updates done.
        total_steps: of the whole training; None when unknown.
        epochs: of the whole training.
        created: day and time, UTC.
        elapsed_s: seconds of training over all its starts; None before the first step.
        fingerprint: hash of recipe and seed.
        commit: of the code; None when unknown.
        dirty: whether that checkout had changes.
        data_hash: of the training images.
        mlflow_run_id: in the tracking store; None when it was never sent.
        mlflow_page: address of its page there; None when it was never sent.
        mlflow_local: whether that page is there while `obowlab ui` runs only.
        tags: that a user gave it.
        starts: how often it was started.
        machine: what it ran on, name to value.
        versions: package to version.
        settings: its recipe.
        base: what `Setting.shipped` compares with, in words.
        measured: its results.
        curves: metric to curve; those of results during training end with the final result.
        findings: on its vocabulary.
        gallery: of its visual words; None when there is none.
        detections: of the detector that it is, or of those that began with its encoder.
    """

    run_id: str
    recipe: str
    title: str
    seed: int
    changes: Mapping[str, str]
    short: str
    base_recipe: str
    family: str
    status: Status
    message: str
    step: int
    total_steps: int | None
    epochs: int
    created: str
    elapsed_s: float | None
    fingerprint: str
    commit: str | None
    dirty: bool | None
    data_hash: str | None
    mlflow_run_id: str | None
    starts: int
    machine: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    settings: tuple[Setting, ...] = ()
    base: str = ""
    measured: tuple[Measured, ...] = ()
    curves: Mapping[str, Curve] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()
    gallery: Gallery | None = None
    detections: tuple[DetectionSet, ...] = ()
    tags: tuple[str, ...] = ()
    mlflow_page: str | None = None
    mlflow_local: bool = False

    @property
    def label(self) -> str:
        """The recipe and what distinguishes it."""
        return f"{self.recipe}: {self.short}" if self.short else self.recipe

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """What is not healthy."""
        return tuple(finding for finding in self.findings if not finding.healthy)

    def measurement(self, metric: str) -> Mapping[str, Any] | None:
        """Return the student's measurement on the run's own data set; None when there is none."""
        return next((m.student for m in self.measured if m.metric == metric and m.student is not None), None)


@dataclass(frozen=True)
class Training:
    """All runs of one training, whatever their recipes are called.

    Attributes:
        label: the name of the base recipe, or what distinguishes it from that.
        base_recipe: see `Run`.
        changes: what it changes of that, see `Run`.
        runs: by seed; of one recipe under two names, both.
        means: metric to the mean over its trained seeds; without those that were measured in different ways.
    """

    label: str
    base_recipe: str
    changes: Mapping[str, str]
    runs: tuple[Run, ...]
    means: Mapping[str, Estimate] = field(default_factory=dict)


@dataclass(frozen=True)
class Site:
    """Everything a report shows.

    Attributes:
        as_of: day and time of the newest thing in the store, UTC; empty for an empty store.
        version: of obowlab.
        tables: the paper's tables beside ours.
        grids: tables of what training costs and of transfer, ready to be shown.
        runs: newest first.
        trainings: of the runs, by base recipe.
        studies: by name.
        problems: sentences on what could not be read.
    """

    as_of: str
    version: str
    tables: tuple[Table, ...] = ()
    grids: tuple[Grid, ...] = ()
    runs: tuple[Run, ...] = ()
    trainings: tuple[Training, ...] = ()
    studies: tuple[StudyReport, ...] = ()
    problems: tuple[str, ...] = ()

    @cached_property
    def metrics(self) -> tuple[str, ...]:
        """The results that some run has, few-shot by its shots first."""
        return ordered({m.metric for run in self.runs for m in run.measured if m.student is not None})

    @cached_property
    def by_id(self) -> Mapping[str, Run]:
        """Every run by its name."""
        return {run.run_id: run for run in self.runs}


def ordered(metrics: Iterable[str]) -> tuple[str, ...]:
    """Return metrics of results for people: few-shot by the number of shots, then the others by name, linear first."""

    def place(metric: str) -> tuple[bool, int, bool, str]:
        shots = re.fullmatch(r"fewshot_(\d+)shot", metric)
        return shots is None, int(shots[1]) if shots else 0, metric != "linear_top1", metric

    return tuple(sorted(metrics, key=place))
