"""How many seeds a table needs: from the spread between seeds seen so far, and the difference that is to be found.

A row's differences to the base row, one per seed, are taken as normal. The power of a two-sided paired t test over n seeds, its
chance to find a true difference, is then that of the noncentral t distribution (Cohen, "Statistical Power Analysis for the
Behavioral Sciences", 1988). Its level is 5 % divided by the rows that a table compares: the hardest step of Holm's correction, so
that a row is found whatever the others show.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from scipy.special import chdtri, nctdtr, stdtrit

from obowlab import text
from obowlab.errors import UserError
from obowlab.launch.cost import CostBook
from obowlab.runs.listing import RunSummary
from obowlab.runs.records import Records
from obowlab.tables.build import paired_differences, paper_difference
from obowlab.tables.spec import PlannedRow, PlannedTable
from obowlab.tables.statistics import LEVEL

FIRST_SEEDS = 3
"""Seeds to begin with where no spread is known, and the fewest that are proposed."""

MOST_SEEDS = 1000
"""Where the search for a number of seeds ends."""

COLUMNS = ("row", "seeds", "SD over seeds", "difference", "needed", "training left")


def power_of(seeds: int, *, effect: float, sd: float, level: float = LEVEL) -> float:
    """Return the chance that a two-sided paired t test finds a difference, with its sign.

    Args:
        seeds: pairs of runs, at least 2.
        effect: the true difference, in points.
        sd: standard deviation of the pairs' differences over seeds, in points, above 0.
        level: error rate of the test.
    """
    shift, quantile = abs(effect) / sd * math.sqrt(seeds), float(stdtrit(seeds - 1, 1 - level / 2))
    power = 1 - float(nctdtr(seeds - 1, shift, quantile))
    return 1.0 if math.isnan(power) else power  # scipy gives no value for some shifts above 36, whose power is 1


def seeds_needed(*, effect: float, sd: float, power: float, level: float = LEVEL) -> int:
    """Return the smallest number of seeds with a power, at least 2; `MOST_SEEDS` + 1 if that many are too few."""
    if effect == 0:
        return MOST_SEEDS + 1
    if sd == 0:
        return 2
    numbers = range(2, MOST_SEEDS + 1)
    return next((n for n in numbers if power_of(n, effect=effect, sd=sd, level=level) >= power), MOST_SEEDS + 1)


def sd_interval(sd: float, *, seeds: int) -> tuple[float, float]:
    """Return the ends of the 95 % interval of a standard deviation that was estimated from some seeds, at least 2."""
    low, high = (math.sqrt((seeds - 1) / float(chdtri(seeds - 1, share))) for share in (LEVEL / 2, 1 - LEVEL / 2))
    return sd * low, sd * high


@dataclass(frozen=True)
class RowPower:
    """What is known of a row, and what it needs.

    Attributes:
        place: as `table3/hard_dynamic`.
        row: the row.
        seeds: that it and the base row have.
        sd: standard deviation of its difference to the base row over these, in points; None with fewer than two.
        effect: the difference to find, in points; None where it is unknown.
        source: where the difference is from.
        needed: seeds; `MOST_SEEDS` + 1 for more than can be searched; None where the spread is unknown.
        trained_s: seconds that its runs took, their median; None when unknown.
    """

    place: str
    row: PlannedRow
    seeds: int
    sd: float | None
    effect: float | None
    source: Literal["given", "paper", "seen"]
    needed: int | None
    trained_s: float | None


def propose(
    tables: Sequence[PlannedTable],
    *,
    records: Records,
    rows: Mapping[str, Sequence[str]],
    power: float,
    effect: float | None = None,
) -> list[RowPower]:
    """Return what every row needs that is compared with a base row, on the primary metric of its table.

    Args:
        tables: at one scale.
        records: what is there.
        rows: table -> keys of the rows wanted, all if empty.
        power: wanted chance to find a row's difference.
        effect: the difference to find, in points; where absent the paper's, or else the one seen so far.

    Raises:
        UserError: `power` or `effect` make no sense.
    """
    if not 0 < power < 1:
        raise UserError(f"--power {power:g} is no chance between 0 and 1: 0.8 finds a true difference four times out of five.")
    if effect is not None and not 0 < effect < math.inf:
        raise UserError(f"--effect {effect:g} is no difference that can be found: give points above 0, for example 2.5.")
    return [
        _row_power(row, table=table, records=records, power=power, effect=effect)
        for table in tables
        for row in table.rows
        if not row.is_base and (not rows or row.row.key in rows.get(table.name, ()))
    ]


def num_seeds(rows: Sequence[RowPower], *, most: int) -> int:
    """Return how many seeds all rows should have, no fewer than are there; first `FIRST_SEEDS` while a spread is unknown.

    Args:
        rows: of `propose`.
        most: that may be proposed.
    """
    needed = [row.needed for row in rows if row.needed is not None]
    wanted = max(needed) if needed and len(needed) == len(rows) else 0
    return min(max([FIRST_SEEDS, wanted, *(row.seeds for row in rows)]), most)


def overview(
    rows: Sequence[RowPower], *, power: float, most: int, runs: Mapping[str, RunSummary], book: CostBook
) -> tuple[list[tuple[str, ...]], list[str]]:
    """Describe a proposal.

    Args:
        rows: of `propose`.
        power: as it was asked for.
        most: seeds that may be proposed.
        runs: of the run store, by fingerprint; what is finished there costs nothing.
        book: what trainings cost.

    Returns:
        A row of `COLUMNS` per row, and lines that say what is proposed.
    """
    sources = {"given": "--effect", "paper": "paper", "seen": "seen"}
    lines = [
        f"needed: seeds at which a paired t test finds the difference with a chance of {100 * power:g} %, "
        f"at {100 * LEVEL:g} % divided by the rows that its table compares (Holm's hardest step)."
    ]
    if any(row.source == "seen" and row.effect is not None for row in rows):
        lines.append("A difference seen so far may be larger by luck than the true one; --effect POINTS says which one to find.")
    seeds = num_seeds(rows, most=most)
    unknown = ", ".join(row.place for row in rows if row.needed is None)
    short = ", ".join(row.place for row in rows if row.needed is not None and row.needed > seeds)
    if unknown:
        lines.append(
            f"Proposed: --seeds {seeds} to begin with, as the spread of {unknown} is unknown; the same command proposes "
            "again when they are trained. --rows leaves rows out."
        )
    else:
        lines.append(f"Proposed: --seeds {seeds}{f', the most that --max-seeds allows: too few for {short}' if short else ''}.")
    return [
        (
            row.place,
            str(row.seeds),
            text.ABSENT if row.sd is None else "{:.2f} [{:.2f}, {:.2f}]".format(row.sd, *sd_interval(row.sd, seeds=row.seeds)),
            text.ABSENT if row.effect is None else f"{row.effect:+.2f} ({sources[row.source]})",
            "unknown" if row.needed is None else f"> {MOST_SEEDS}" if row.needed > MOST_SEEDS else str(row.needed),
            _training_left(row, runs=runs, book=book),
        )
        for row in rows
    ], lines


# -------------------------------------------------------------------------------------------------------------- helpers


def _row_power(row: PlannedRow, *, table: PlannedTable, records: Records, power: float, effect: float | None) -> RowPower:
    metric = table.file.primary
    differences = paired_differences(row, base=table.base, records=records, metric=metric)
    seeds = 0 if differences is None else len(differences)
    mean, sd = None, None
    if differences is not None and seeds > 1:
        mean, sd = float(differences.mean()), float(differences.mean(axis=1).std(ddof=1))
    source: Literal["given", "paper", "seen"] = "given"
    if effect is None:
        effect, source = paper_difference(row, base=table.base, metric=metric), "paper"
    if effect is None:
        effect, source = mean, "seen"
    needed = None
    if sd is not None and effect is not None:
        needed = seeds_needed(effect=effect, sd=sd, power=power, level=LEVEL / (len(table.rows) - 1))
    keys = row.loaded.recipe.fingerprints(seeds={record.seed for record in records.values()}).values()
    took = [records[key].trained_s for key in keys if key in records and records[key].status == "finished"]
    known = [seconds for seconds in took if seconds is not None]
    trained_s = median(known) if known else None
    return RowPower(f"{table.name}/{row.row.key}", row, seeds, sd, effect, source, needed, trained_s)


def _training_left(row: RowPower, *, runs: Mapping[str, RunSummary], book: CostBook) -> str:
    """Return how long the trainings take that a row still needs, its stages too, as a text."""
    needed = FIRST_SEEDS if row.needed is None else row.needed
    if needed > MOST_SEEDS:
        return text.ABSENT
    left_s, stages = 0.0, row.row.loaded.stages()
    for stage in stages:
        keys = stage.recipe.fingerprints(seeds=range(needed)).values()
        due = sum(key not in runs or runs[key].state.status != "finished" for key in keys)
        seconds = book.cost(stage.recipe).seconds
        if seconds is None and stage is stages[-1]:
            seconds = row.trained_s  # as records have it
        if due and seconds is None:
            return "unknown"
        left_s += due * (seconds or 0.0)
    return text.duration(left_s)
