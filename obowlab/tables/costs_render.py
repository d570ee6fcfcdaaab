"""A table of costs as text: what was measured, relative to the base row, beside the paper's ratios."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

from obowlab import text
from obowlab.launch.bounds import Speed
from obowlab.tables.costs import ROUNDS, Costs, CostTable
from obowlab.tables.render import Grid

NOTES = (
    "Time per epoch and memory relative to the base row: the median over rounds, in brackets the least and the most; each round "
    "times all rows in turns. Time of the whole training: time per epoch times the recipe's epochs.",
    "Loop: training as `obowlab run` does it, loader and views included. Step: updates on a fixed batch in memory. Operations: "
    "of that step, as torch counts them, which no machine changes.",
)
SMALL_SCALE = "At this scale images, network and epochs are not the paper's; its ratios stand beside ours for orientation."
CPU_MEMORY = "Memory on a CPU: peak of the process in the loop, less what it had before the network was built; noisy."


@dataclass(frozen=True)
class Ratio:
    """A quantity relative to the base row's, over the rounds in which both were timed.

    Attributes:
        value: the median.
        low: the least.
        high: the most.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """Return `2.31 (2.25-2.40)`; without brackets where all rounds agree to two digits."""
        ends = f"{self.low:.2f}", f"{self.high:.2f}"
        return f"{self.value:.2f}" if ends[0] == ends[1] else f"{self.value:.2f} ({ends[0]}-{ends[1]})"


@dataclass(frozen=True)
class CostLine:
    """A row as it was measured.

    Attributes:
        key: of the row.
        label: as in the paper.
        epochs: of the recipe.
        rounds: in which it was timed.
        loop: time per image of the training, relative.
        step: time per image of a step alone, relative.
        operations: per image, relative.
        memory: relative.
        images_per_s: of the training, median.
        memory_mib: median.
    """

    key: str
    label: str
    epochs: int
    rounds: int
    loop: Ratio | None
    step: Ratio | None
    operations: Ratio | None
    memory: Ratio | None
    images_per_s: float | None
    memory_mib: float | None


def lines_of(table: CostTable, *, costs: Costs | None) -> list[CostLine]:
    """Return every row that has a recipe at the table's scale, timed or not."""
    rounds = range(ROUNDS)
    speeds = {row.key: {n: speed for n in rounds if costs and (speed := costs.speed(row.key, n))} for row in table.rows}
    base = speeds[table.file.base]

    def relative(key: str, quantity: Callable[[Speed], float]) -> Ratio | None:
        shared = [(speeds[key][n], base[n]) for n in speeds[key].keys() & base.keys()]
        ratios = [quantity(ours) / quantity(theirs) for ours, theirs in shared if quantity(theirs)]
        return Ratio(median(ratios), min(ratios), max(ratios)) if ratios else None

    lines = []
    for row in table.rows:
        timed = list(speeds[row.key].values())
        lines.append(
            CostLine(
                key=row.key,
                label=row.label,
                epochs=table.loaded[row.key].recipe.training.epochs,
                rounds=len(timed),
                loop=relative(row.key, lambda speed: 1 / speed.loop_images_per_s),
                step=relative(row.key, lambda speed: 1 / speed.step_images_per_s),
                operations=relative(row.key, lambda speed: speed.gflops_per_image),
                memory=relative(row.key, lambda speed: speed.memory_mib),
                images_per_s=median(each.loop_images_per_s for each in timed) if timed else None,
                memory_mib=median(each.memory_mib for each in timed) if timed else None,
            )
        )
    return lines


def heading(table: CostTable) -> str:
    """Return the title with its scale and what all rows change."""
    changes = f" · all rows with {', '.join(table.changes)}" if table.changes else ""
    return f"{table.file.title} · scale {table.scale}{changes}"


COLUMNS = (
    *("row", "epochs", "paper epochs", "epoch time", "paper epoch time", "of the step", "of operations"),
    *("training time", "paper training time", "memory", "paper memory", "images/s", "MiB"),
)
EXPENDABLE = ("paper epochs", "epochs", "MiB", "images/s", "of operations", "of the step", "paper memory", "memory")
"""What a narrow terminal can do without, in this order."""


def overview(table: CostTable, *, costs: Costs | None) -> list[list[str]]:
    """Return the rows under `COLUMNS`."""
    found, papers = lines_of(table, costs=costs), {row.key: row.paper for row in table.rows}
    (base,) = (line for line in found if line.key == table.file.base)
    rows = []
    for line in found:
        paper = papers[line.key]
        whole = None if line.loop is None else line.loop.value * line.epochs / base.epochs
        rows.append(
            [
                line.label,
                str(line.epochs),
                text.ABSENT if paper is None else str(paper.epochs),
                _shown(line.loop),
                _number(paper.epoch_time if paper else None),
                _shown(line.step),
                _shown(line.operations),
                _number(whole),
                _number(paper.training_time if paper else None),
                _shown(line.memory),
                _number(paper.memory if paper else None),
                text.ABSENT if line.images_per_s is None else f"{line.images_per_s:.0f}",
                text.ABSENT if line.memory_mib is None else f"{line.memory_mib:.0f}",
            ]
        )
    return rows


def remarks(table: CostTable, *, costs: Costs | None) -> list[str]:
    """Return what stands below the rows: what the columns mean, on what it was measured, footnotes."""
    lines = [*NOTES, *([] if table.scale == "paper" else [SMALL_SCALE])]
    if costs is None or not costs.timed:
        return [*lines, f"Nothing was timed yet: `obowlab ablate {table.name} --scale {table.scale}`.", *_footnotes(table)]
    speed = costs.timed[-1].speed
    where = speed.card or f"{speed.threads} thread(s) of {costs.processor}"
    batches = sorted({each.speed.measured_batch for each in costs.timed})
    lines.append(
        f"Timed with {' and '.join(map(str, batches))} images a step on {where} ({costs.host}), begun {costs.began}, torch "
        f"{costs.software.get('torch', 'unknown')}, commit {(costs.commit or 'unknown')[:12]}."
    )
    if len(batches) > 1:
        lines.append("Not all rows could be timed with the same batch, which their ratios then compare as well.")
    if speed.device == "cpu":
        lines.append(CPU_MEMORY)
    return [*lines, *_footnotes(table)]


def grid(table: CostTable, *, costs: Costs | None) -> Grid:
    """Return title, headings, rows and remarks."""
    return heading(table), COLUMNS, overview(table, costs=costs), remarks(table, costs=costs)


# -------------------------------------------------------------------------------------------------------------- helpers


def _footnotes(table: CostTable) -> list[str]:
    own: Mapping[str, None] = dict.fromkeys(note for row in table.rows for note in row.footnotes)
    return [*table.file.footnotes, *own]


def _shown(ratio: Ratio | None) -> str:
    return text.ABSENT if ratio is None else str(ratio)


def _number(value: float | None) -> str:
    return text.ABSENT if value is None else f"{value:.2f}"
