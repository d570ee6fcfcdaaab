"""A table of transfer as text: what was measured of every encoder, beside the paper's values."""

from __future__ import annotations

from collections.abc import Sequence

from obowlab import text
from obowlab.runs.results import unpack
from obowlab.tables.build import COMPARABLE
from obowlab.tables.model import Estimate
from obowlab.tables.render import NOT_COMPARABLE, Grid, estimate_text
from obowlab.tables.statistics import estimate, stacked
from obowlab.tables.transfer import Entry, TransferColumn, TransferRow, Transfers, TransferTable

NOTE = (
    "Percent; ± is the 95 % interval over test images, and over seeds of the classifier where there are several. The encoder is "
    "one and the same: what another pretraining would give is not in it."
)
SMALL_SCALE = "At this scale images, networks and epochs are not the paper's; its values stand beside ours for orientation."
MARK = "*"


def heading(table: TransferTable) -> str:
    """Return the title with its scale, and the badge of tables that are not at the paper's."""
    badge = "" if table.scale == COMPARABLE else f" · {NOT_COMPARABLE} with the paper's values"
    return f"{table.file.title} · scale {table.scale}{badge}"


def columns_of(table: TransferTable) -> list[str]:
    """Return the headings of `overview`."""
    heads = ["row", "epochs"]
    for column in table.file.column:
        heads += [*([column.label] if column.protocol else []), f"{column.label} paper"]
    return heads


def expendable(table: TransferTable) -> list[str]:
    """Return the headings that a narrow terminal can do without, in this order."""
    measured = [column for column in table.file.column if column.protocol]
    alone = [f"{column.label} paper" for column in table.file.column if not column.protocol]
    papers = [f"{column.label} paper" for column in reversed(measured)]
    first = [*alone, "epochs"] if measured else ["epochs", *reversed(alone[1:])]
    return [*first, *papers, *(column.label for column in reversed(measured[1:]))]


def overview(table: TransferTable, *, transfers: Transfers) -> list[list[str]]:
    """Return the rows under `columns_of`."""
    lines = []
    last = ""
    for row in table.file.row:
        if row.group and row.group != last:
            lines.append([row.group, *[""] * (len(columns_of(table)) - 1)])
        last = row.group
        entries = transfers.of_row(row.key)
        cells = [row.label, text.ABSENT if row.epochs is None else str(row.epochs)]
        for column in table.file.column:
            if column.protocol:
                mark = MARK if _why_not(table, column=column, row=row, entries=entries) else ""
                cells.append(estimate_text(value_of(column, entries=entries)) + mark)
            cells.append(text.estimate(row.paper.get(column.metric), digits=1))
        lines.append(cells)
    return lines


def value_of(column: TransferColumn, *, entries: Sequence[Entry]) -> Estimate | None:
    """Return the mean over seeds of what was measured alike with the newest; None where nothing was."""
    found = [(entry, each) for entry in entries for each in entry.measurements if each["name"] == column.metric]
    found = [(entry, each) for entry, each in found if entry.protocol == column.protocol]
    alike = [each for entry, each in found if entry.basis == found[-1][0].basis]
    if not alike:
        return None
    if len(alike) == 1:  # its own interval: Wilson's, or a jackknife's
        return Estimate(float(alike[0]["value"]), float(alike[0]["interval"]), 1)
    observations = stacked([unpack(each["samples"]) for each in alike])
    if observations is None:
        return None
    mean = estimate(observations)
    return Estimate(mean.value, mean.interval, mean.seeds)


def remarks(table: TransferTable, *, transfers: Transfers) -> list[str]:
    """Return what stands below the rows: what was measured, what cannot be compared, footnotes."""
    lines = [NOTE, *([] if table.scale == COMPARABLE else [SMALL_SCALE])]
    for row in table.file.row:
        entries = transfers.of_row(row.key)
        if entries:
            seeds = sorted({entry.seed for entry in entries})
            of_seeds = f"; seeds {', '.join(map(str, seeds))} of the classifiers" if len(seeds) > 1 else ""
            lines.append(f"{row.label}{_epochs(row)}: {entries[-1].encoder}{of_seeds}")
        if len({(entry.protocol, entry.basis) for entry in entries}) > len({entry.protocol for entry in entries}):
            lines.append(f"{row.label}: seeds were measured on other images or with another version; the newest are shown.")
        for column in table.file.column:
            if why := _why_not(table, column=column, row=row, entries=entries):
                lines.append(f"{MARK} {row.label}, {column.label}: {why}, so it is not comparable with the paper's.")
    if not transfers.entries and table.protocols:
        lines.append(f"Nothing was measured yet: `obowlab ablate {table.name} --scale {table.scale}`.")
    return [*lines, *table.file.footnotes, *dict.fromkeys(note for row in table.file.row for note in row.footnotes)]


def grid(table: TransferTable, *, transfers: Transfers) -> Grid:
    """Return title, headings, rows and remarks."""
    return heading(table), columns_of(table), overview(table, transfers=transfers), remarks(table, transfers=transfers)


# -------------------------------------------------------------------------------------------------------------- helpers


def _epochs(row: TransferRow) -> str:
    return "" if row.epochs is None else f" ({row.epochs} epochs)"


def _why_not(table: TransferTable, *, column: TransferColumn, row: TransferRow, entries: Sequence[Entry]) -> str:
    """Return why a value at the paper's scale is none of the paper's kind; empty where it is, or there is none."""
    if table.scale != COMPARABLE or column.images is None:
        return ""
    counts = {
        int(each["count"])
        for entry in entries
        if entry.protocol == column.protocol
        for each in entry.measurements
        if each["name"] == column.metric
    }
    if counts <= {column.images}:
        return ""
    return f"{max(counts)} test images where the paper has {column.images}"
