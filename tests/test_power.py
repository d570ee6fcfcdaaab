"""How many seeds a table needs: known numbers, a simulation, and what `ablate --seeds auto` says and trains."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from obowlab.errors import UserError
from obowlab.runs.records import Record, store_runs, write_records
from obowlab.tables.power import MOST_SEEDS, num_seeds, power_of, propose, sd_interval, seeds_needed
from obowlab.tables.spec import PlannedTable, load_table
from tests.command_line import Obowlab
from tests.report_store import add_row_runs, own_table
from tests.test_tables import record, records_of

HARD, FIXED = (-4, -6, -7), (-30, -31, -35)
"""By how many points the rows of Table 3 differ from the base row, seed by seed."""


@pytest.fixture
def table3() -> PlannedTable:
    return load_table("table3", scale="demo")


def seen(table: PlannedTable, **differences: tuple[int, ...]) -> dict[str, Record]:
    """Return records of a base row at 50, and of other rows at so many points more with each seed."""
    rows = {row.row.key: row for row in table.rows}
    made = [
        record(rows[key], seed=seed, value=50 + more, trained_s=120.0)
        for key, all_ in differences.items()
        for seed, more in enumerate(all_)
    ]
    longest = max(map(len, differences.values()), default=0)
    return records_of(*(record(table.base, seed=seed, value=50) for seed in range(longest)), *made)


# ------------------------------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize(
    ("effect", "level", "power", "expected"),
    [
        # Two-sided paired t tests, as G*Power and the usual tables have them.
        (0.2, 0.05, 0.8, 199),
        (0.5, 0.05, 0.8, 34),
        (0.8, 0.05, 0.8, 15),
        (1.0, 0.05, 0.8, 10),
        (0.5, 0.05, 0.95, 54),
        (0.5, 0.01, 0.8, 51),
    ],
)
def test_numbers_of_seeds_as_in_the_books(effect: float, level: float, power: float, expected: int) -> None:
    for sd in (1.0, 2.5):
        assert seeds_needed(effect=effect * sd, sd=sd, power=power, level=level) == expected
        assert seeds_needed(effect=-effect * sd, sd=sd, power=power, level=level) == expected, "either direction"


@pytest.mark.parametrize(("seeds", "effect", "level"), [(2, 3.0, 0.05), (3, 2.0, 0.05), (4, 3.0, 0.025), (10, 1.0, 0.01)])
def test_power_is_the_share_of_simulated_tests_that_find_the_difference(seeds: int, effect: float, level: float) -> None:
    draws = effect + 2.0 * np.random.default_rng(seeds).normal(size=(20_000, seeds))
    found = stats.ttest_1samp(draws, 0.0, axis=1)
    share = float(((found.pvalue < level) & (found.statistic > 0)).mean())
    assert power_of(seeds, effect=effect, sd=2.0, level=level) == pytest.approx(share, abs=0.015)


def test_without_a_difference_either_sign_is_found_as_often_as_the_level_says() -> None:
    assert 2 * power_of(5, effect=0.0, sd=1.0, level=0.02) == pytest.approx(0.02)


def test_power_grows_with_seeds_and_difference_without_gaps() -> None:
    effects = np.geomspace(0.1, 1000.0, 40)
    power = np.array([[power_of(seeds, effect=effect, sd=1.0, level=0.025) for seeds in range(2, 40)] for effect in effects])
    assert np.isfinite(power).all()
    assert (np.diff(power, axis=0) > -1e-9).all()
    assert (np.diff(power, axis=1) > -1e-9).all()
    assert power[:, 3] == pytest.approx(stats.nct.sf(stats.t.ppf(0.9875, 4), 4, effects * 5**0.5), abs=1e-9)


def test_ends_of_the_search() -> None:
    assert seeds_needed(effect=0.0, sd=1.0, power=0.8) == MOST_SEEDS + 1
    assert seeds_needed(effect=0.01, sd=1.0, power=0.8) == MOST_SEEDS + 1
    assert seeds_needed(effect=1.0, sd=0.0, power=0.8) == 2
    assert seeds_needed(effect=1e6, sd=1.0, power=0.999) == 2
    assert seeds_needed(effect=3.0, sd=1.0, power=1 - 1e-12) < 60


def test_the_interval_of_a_standard_deviation_holds_the_truth() -> None:
    draws = 2.0 * np.random.default_rng(0).normal(size=(4000, 3))
    ends = np.array([sd_interval(sd, seeds=3) for sd in draws.std(axis=1, ddof=1)])
    held = ((ends[:, 0] < 2.0) & (ends[:, 1] > 2.0)).mean()
    assert held == pytest.approx(0.95, abs=0.012)
    low, high = sd_interval(1.0, seeds=3)
    assert (low, high) == (pytest.approx(0.5207, abs=1e-4), pytest.approx(6.285, abs=1e-3))  # of the usual tables


# ---------------------------------------------------------------------------------------------------------------- proposals


def test_a_proposal_from_three_seeds(table3: PlannedTable) -> None:
    hard, fixed = propose([table3], records=seen(table3, hard_dynamic=HARD, soft_fixed=FIXED), rows={}, power=0.8)
    assert (hard.place, hard.seeds, hard.source) == ("table3/hard_dynamic", 3, "paper")
    assert hard.sd == pytest.approx(np.std(HARD, ddof=1))
    assert hard.effect == pytest.approx(59.98 - 62.44)
    assert hard.needed == seeds_needed(effect=2.46, sd=float(np.std(HARD, ddof=1)), power=0.8, level=0.025), "two rows: 5 % / 2"
    assert (fixed.needed, num_seeds([hard, fixed], most=100)) == (3, hard.needed)
    assert num_seeds([hard, fixed], most=4) == 4
    (given,) = propose(
        [table3], records=seen(table3, hard_dynamic=HARD), rows={"table3": ["hard_dynamic"]}, power=0.9, effect=10.0
    )
    expected = seeds_needed(effect=10.0, sd=float(np.std(HARD, ddof=1)), power=0.9, level=0.025)
    assert (given.source, given.needed) == ("given", expected)


def test_fewer_than_two_seeds_say_nothing(table3: PlannedTable) -> None:
    rows = propose([table3], records=seen(table3, hard_dynamic=HARD, soft_fixed=(-30,)), rows={}, power=0.8)
    assert [(row.seeds, row.sd is None, row.needed is None) for row in rows] == [(3, False, False), (1, True, True)]
    assert num_seeds(rows, most=10) == 3, "first the three that show a spread"
    assert num_seeds(propose([table3], records={}, rows={}, power=0.8), most=10) == 3
    assert num_seeds([], most=2) == 2


def test_seeds_that_are_there_stay(table3: PlannedTable) -> None:
    far = (-30, -31, -32, -30, -31)
    rows = propose([table3], records=seen(table3, soft_fixed=far), rows={"table3": ["soft_fixed"]}, power=0.8)
    assert ([row.needed for row in rows], num_seeds(rows, most=10), num_seeds(rows, most=4)) == ([2], 5, 4)


def test_an_own_table_takes_the_difference_seen_so_far(tmp_path: Path) -> None:
    planned = load_table(own_table(tmp_path), scale="demo")
    rows = {row.place: row for row in propose([planned], records=seen(planned, small=HARD, large=(0, 0, 0)), rows={}, power=0.8)}
    small, large = rows["queue/small"], rows["queue/large"]
    assert (small.source, small.effect) == ("seen", pytest.approx(np.mean(HARD)))
    assert small.needed == seeds_needed(effect=17 / 3, sd=float(np.std(HARD, ddof=1)), power=0.8, level=0.025)
    assert large.needed == MOST_SEEDS + 1, "no number of seeds finds a difference of 0"


@pytest.mark.parametrize(
    ("power", "effect", "said"),
    [
        (1.0, None, "--power 1 is no chance"),
        (0.0, None, "--power 0 is no chance"),
        (float("nan"), None, "--power nan"),
        (0.8, 0.0, "--effect 0 is no difference"),
        (0.8, float("inf"), "--effect inf"),
        (0.8, float("nan"), "--effect nan"),
    ],
)
def test_senseless_wishes_are_refused(power: float, effect: float | None, said: str, table3: PlannedTable) -> None:
    with pytest.raises(UserError, match=said):
        propose([table3], records={}, rows={}, power=power, effect=effect)


# -------------------------------------------------------------------------------------------------------------- the command


def typed(obowlab: Obowlab, words: str) -> tuple[int, str, str]:
    return obowlab("ablate", "table3", "--scale", "demo", "--dry-run", *words.split())


def row_of(out: str, place: str) -> list[str]:
    return next(line for line in out.splitlines() if line.startswith(place)).split()[1:]


@pytest.mark.usefixtures("workplace")
def test_the_command_proposes_and_plans(obowlab: Obowlab, table3: PlannedTable) -> None:
    code, out, _ = typed(obowlab, "--seeds auto")
    assert code == 0
    assert row_of(out, "table3/hard_dynamic") == ["0", "–", "-2.46", "(paper)", "unknown", "unknown"]
    assert "Proposed: --seeds 3 to begin with, as the spread of table3/hard_dynamic, table3/soft_fixed is unknown;" in out
    assert "3 rows at scale demo, 3 seed(s): 9 trainings; 0 done" in out
    write_records(seen(table3, hard_dynamic=HARD, soft_fixed=FIXED).values(), folder=Path("records"))
    first = typed(obowlab, "--seeds auto --records records --power 0.8")
    assert first == typed(obowlab, "--seeds auto --records records --power 0.8"), "the same store, the same plan"
    code, out, _ = first
    assert code == 0
    assert row_of(out, "table3/hard_dynamic") == ["3", "1.53", "[0.80,", "9.60]", "-2.46", "(paper)", "7", "14", "min"]
    assert row_of(out, "table3/soft_fixed")[-3:] == ["3", "6", "min"]
    assert "a chance of 80 %, at 5 % divided by the rows" in out
    assert "Proposed: --seeds 7." in out
    assert "7 seed(s): 21 trainings" in out
    _, out, _ = typed(obowlab, "--seeds auto --records records --max-seeds 5")
    assert "Proposed: --seeds 5, the most that --max-seeds allows: too few for table3/hard_dynamic." in out
    assert "5 seed(s): 15 trainings" in out
    _, out, _ = typed(obowlab, "--seeds auto --records records --effect 9 --rows hard_dynamic")
    assert row_of(out, "table3/hard_dynamic")[-5:] == ["+9.00", "(--effect)", "3", "6", "min"]
    assert "table3/soft_fixed" not in out
    assert not Path("runs").exists()


@pytest.mark.usefixtures("workplace")
def test_what_is_finished_in_the_store_counts_and_costs_nothing(obowlab: Obowlab) -> None:
    path = own_table(Path.cwd())
    planned = load_table(path, scale="demo")
    add_row_runs(planned, runs_root=Path("runs"), means={"base": 50, "small": 30}, seeds=(0, 1, 2))
    code, out, _ = obowlab("ablate", str(path), "--scale", "demo", "--seeds", "auto", "--rows", "small", "--dry-run")
    assert code == 0
    assert row_of(out, "queue/small")[0] == "3"
    assert row_of(out, "queue/small")[-4:] == ["(seen)", "2", "0", "s"]
    assert "A difference seen so far may be larger by luck" in out
    assert "Proposed: --seeds 3." in out
    assert "6 done" in out
    assert len(store_runs(Path("runs"))) == 6


@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--seeds auto --power 1.5", "--power 1.5 is no chance between 0 and 1"),
        ("--seeds auto --effect -2", "--effect -2 is no difference"),
        ("--seeds auto --max-seeds 1", "1 is not in the range x>=2"),
        ("--seeds 3 --power 0.8", "--power, --effect and --max-seeds are for `--seeds auto`"),
        ("--effect 2", "are for `--seeds auto`"),
        ("--seeds automatic", "'automatic' is neither a number of seeds, 1 or more, nor 'auto'"),
        ("--seeds 0", "'0' is neither a number of seeds"),
        (f"--seeds {'9' * 5000}", "is neither a number of seeds"),
    ],
)
def test_the_command_refuses(words: str, said: str, obowlab: Obowlab) -> None:
    code, out, err = typed(obowlab, words)
    assert (code, out) == (2, "")
    assert said in err
