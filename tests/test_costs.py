"""Tables of costs: what a file may say, ratios by hand, timing that goes on where it stopped, and every form of the table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from obowlab.config import Machine, load_recipe
from obowlab.errors import UserError
from obowlab.launch.bounds import Measured, Speed
from obowlab.report.read import measured_in
from obowlab.tables import costs as module
from obowlab.tables.costs import (
    ROUNDS,
    Costs,
    CostTable,
    Timed,
    load_costs,
    measure_costs,
    select,
)
from obowlab.tables.costs_render import COLUMNS, Ratio, lines_of, overview, remarks
from obowlab.tables.measured import find_kept, write_kept
from obowlab.tables.spec import one_kind, table_files
from obowlab.training.flops import count_flops
from obowlab.training.work import Work
from tests.command_line import Obowlab
from tests.runs import small_recipe

ROOT = Path(__file__).resolve().parents[1]
Measure = Callable[..., Measured]


def speed(loop: float, *, step: float = 100.0, gflops: float = 1.0, memory: float = 50.0, batch: int = 32) -> Speed:
    """Return a speed with a little of everything."""
    return Speed(loop, step, gflops, memory, batch, "cpu", "", 1, "'synthetic'")


def costs_of(*timed: tuple[int, str, Speed]) -> Costs:
    """Return what was measured, of nowhere."""
    each = tuple(Timed(round=number, row=row, speed=found) for number, row, found in timed)
    return Costs(
        identity="x", host="h", processor="p", cores=2, commit=None, software={"torch": "2"}, began="2026-01-01", timed=each
    )


@pytest.fixture
def table() -> CostTable:
    """Return the shipped table at the smallest scale."""
    return load_costs("table8", scale="demo")


# ------------------------------------------------------------------------------------------------------------- the file


@pytest.mark.parametrize("scale", ["demo", "tiny", "paper"])
def test_the_shipped_table_has_its_rows_at_every_scale_with_one_batch(scale: str) -> None:
    table = load_costs("table8", scale=scale)
    keys = {"supervised", "vanilla", "full", "moco", "byol"}
    assert keys <= set(table.loaded)
    assert len({loaded.recipe.training.batch_size for loaded in table.loaded.values()}) == 1
    if scale == "paper":
        assert {loaded.recipe.backbone.arch for loaded in table.loaded.values()} == {"resnet50"}
        assert {key: table.loaded[key].recipe.training.epochs for key in keys - {"vanilla"}} == {
            row.key: row.paper.epochs for row in table.rows if row.paper and row.key in keys
        }


def test_the_paper_s_training_times_are_its_epochs_times_its_time_per_epoch() -> None:
    for row in load_costs("table8", scale="paper").rows:
        if row.paper is not None:
            assert row.paper.training_time == pytest.approx(row.paper.epoch_time * row.paper.epochs / 100, abs=0.005)


def test_all_stands_for_tables_that_are_trained() -> None:
    assert one_kind(["all", "table3"]) is None
    assert one_kind(["table8"]) == "costs"
    assert "table8" not in table_files()
    with pytest.raises(UserError, match=r"table8 is another kind of table than all: one after the other"):
        one_kind(["table8", "all"])
    with pytest.raises(UserError, match=r"Did you mean 'table8'"):
        one_kind(["tabel8"])


FILE = """
kind = "costs"
title = "Mine"
base = "a"
[[row]]
key = "a"
label = "A"
recipes = {{ demo = "demo-vanilla" }}
[[row]]
key = "{key}"
label = "B"
recipes = {{ {scale} = "{recipe}" }}
"""


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"key": "a"}, "two rows have the key 'a'"),
        ({"scale": "dmo"}, "names the scale 'dmo'"),
        ({"recipe": "demo-ful"}, "row 'b': There is no recipe 'demo-ful'"),
    ],
)
def test_a_file_that_is_wrong_is_refused_by_name(tmp_path: Path, values: dict[str, str], words: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(FILE.format(**{"key": "b", "scale": "demo", "recipe": "demo-full", **values}))
    with pytest.raises(UserError, match=words):
        load_costs(str(path), scale="demo")


def test_a_row_without_a_recipe_at_a_scale_is_left_out_there(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(FILE.format(key="b", scale="tiny", recipe="tiny-full"))
    assert [row.key for row in load_costs(str(path), scale="demo").rows] == ["a"]
    with pytest.raises(UserError, match="the base row 'a' has no recipe at scale tiny"):
        load_costs(str(path), scale="tiny")
    path.write_text(path.read_text().replace('base = "a"', 'base = "c"'))
    with pytest.raises(UserError, match="no row has the key 'c'"):
        load_costs(str(path), scale="demo")


def test_rows_are_selected_with_the_base_row(table: CostTable) -> None:
    assert select(["full,moco"], table=table) == ["supervised", "full", "moco"]
    assert select([], table=table) == list(table.loaded)
    with pytest.raises(UserError, match="no row 'mocco' at scale demo"):
        select(["mocco"], table=table)


# ------------------------------------------------------------------------------------------------------------ the ratios


def test_ratios_are_medians_over_the_rounds_that_both_rows_have(table: CostTable) -> None:
    costs = costs_of(
        (0, "supervised", speed(200, step=400, gflops=2, memory=100)),
        (0, "full", speed(100, step=100, gflops=5, memory=150)),
        (1, "supervised", speed(300, step=300, gflops=2, memory=100)),
        (1, "full", speed(100, step=100, gflops=5, memory=250)),
        (2, "full", speed(1, step=1, gflops=5, memory=1)),  # its base row was not timed in this round
    )
    lines = {line.key: line for line in lines_of(table, costs=costs)}
    full = lines["full"]
    assert full.loop == Ratio(2.5, 2.0, 3.0)
    assert full.step == Ratio(3.5, 3.0, 4.0)
    assert full.operations == Ratio(2.5, 2.5, 2.5)
    assert full.memory == Ratio(2.0, 1.5, 2.5)
    assert full.images_per_s == 100
    assert lines["supervised"].loop == Ratio(1, 1, 1)
    assert lines["moco"].loop is None
    assert str(full.loop) == "2.50 (2.00-3.00)"
    assert str(full.operations) == "2.50"


def test_the_whole_training_is_time_per_epoch_times_epochs() -> None:
    table = load_costs("table8", scale="paper")
    costs = costs_of((0, "supervised", speed(300)), (0, "full", speed(100)))
    rows = {row[0]: dict(zip(COLUMNS, row, strict=True)) for row in overview(table, costs=costs)}
    assert rows["OBoW (full)"]["training time"] == "6.00"  # 200 epochs of 3, beside 100 of 1
    assert rows["OBoW (full)"]["paper training time"] == "7.82"
    assert rows["MoCo v2"]["training time"] == "–"


def test_what_could_not_be_timed_alike_is_said(table: CostTable) -> None:
    costs = costs_of((0, "supervised", speed(300)), (0, "full", speed(100, batch=16)))
    assert any(line.startswith("Not all rows could be timed with the same batch") for line in remarks(table, costs=costs))
    assert any("Nothing was timed yet: `obowlab ablate table8 --scale demo`" in line for line in remarks(table, costs=None))


def test_operations_are_those_of_the_arithmetic() -> None:
    """Forward is 1, backward 2: supervised 3 for one image; MoCo v2 3 and 1 for its key; BYOL 3 and 1 for each of two crops."""

    def flops(name: str, **changes: Any) -> int:
        recipe = load_recipe(name, changes={"training.batch_size": 8, **changes}).recipe
        return count_flops(Work(recipe, batch_size=8, device=torch.device("cpu")).step)

    supervised = flops("demo-supervised")
    assert flops("demo-moco", **{"method.batchnorm_splits": 1}) / supervised == pytest.approx(4 / 3, rel=0.02)
    assert flops("demo-byol") / supervised == pytest.approx(8 / 3, rel=0.04)


# ------------------------------------------------------------------------------------------------------------ the timing


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let recipes be timed by nobody; return their names as they come."""
    names: list[str] = []

    def measure(name: str, **_: Any) -> Measured:
        names.append(name)
        return Measured(speed=speed(100.0 + len(names)))

    monkeypatch.setattr(module, "measure", measure)
    return names


def test_timing_goes_on_where_it_stopped(
    table: CostTable, tmp_path: Path, timed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine, whole = Machine(runs_root=tmp_path), module.measure
    rows = select(["full"], table=table)

    def stops(name: str, **how: Any) -> Measured:
        if len(timed) == 3:
            raise KeyboardInterrupt
        return whole(name, **how)

    monkeypatch.setattr(module, "measure", stops)
    with pytest.raises(KeyboardInterrupt):
        measure_costs(table, rows=rows, machine=machine, say=str)
    monkeypatch.setattr(module, "measure", whole)
    costs = measure_costs(table, rows=rows, machine=machine, say=str)
    assert timed == ["demo-supervised", "demo-full"] * ROUNDS
    assert find_kept(Costs, table.file_name, folder=tmp_path) == costs
    assert [(each.round, each.row) for each in costs.timed] == [(n, row) for n in range(ROUNDS) for row in rows]
    measure_costs(table, rows=rows, machine=machine, say=str)
    assert len(timed) == 2 * ROUNDS
    measure_costs(table, rows=rows, machine=machine.model_copy(update={"threads": 7}), say=str)  # another way to compute
    assert len(timed) == 4 * ROUNDS


def test_changes_of_all_rows_are_another_table(tmp_path: Path, table: CostTable, timed: list[str]) -> None:
    machine = Machine(runs_root=tmp_path)
    measure_costs(table, rows=["supervised"], machine=machine, say=str)
    other = load_costs("table8", scale="demo", overrides=["training.batch_size=16"])
    assert {loaded.recipe.training.batch_size for loaded in other.loaded.values()} == {16}
    assert find_kept(Costs, other.file_name, folder=tmp_path) is None
    measure_costs(other, rows=["supervised"], machine=machine, say=str)
    assert len(timed) == 2 * ROUNDS
    assert find_kept(Costs, table.file_name, folder=tmp_path) is not None


# ----------------------------------------------------------------------------------------------------------- the commands


@pytest.mark.usefixtures("workplace")
def test_the_table_is_timed_kept_and_shown(obowlab: Obowlab, timed: list[str], tmp_path: Path) -> None:
    words = ("table8", "--scale", "demo")
    code, out, _ = obowlab("ablate", *words, "--rows", "moco", "--dry-run")
    assert (code, timed) == (0, [])
    assert "Would time each row 3 times" in out
    code, out, err = obowlab("ablate", *words, "--rows", "moco", "--records", str(tmp_path / "records"), "--device", "cpu")
    assert code == 0, err
    assert "Timing MoCo v2, round 3 of 3; 1 to go." in err
    assert len(timed) == 2 * ROUNDS
    for form in ("md", "json", "csv", "html"):
        from_store = obowlab("table", *words, "--format", form)[1]
        assert from_store == obowlab("table", *words, "--format", form, "--records", str(tmp_path / "records"))[1]
        assert "MoCo v2" in from_store or '"moco"' in from_store
    file = tmp_path / "t.md"
    assert obowlab("table", *words, "--format", "md", "--out", str(file))[0] == 0
    assert file.read_text() == obowlab("table", *words, "--format", "md")[1]
    assert obowlab("table", *words)[1].splitlines()[1].split()[:2] == ["row", "epochs"]
    ((title, _, rows, _),), problems = measured_in(Path("runs"))
    assert not problems
    assert title == "Table 8: cost of training, relative to supervised · scale demo"
    assert next(row[0] for row in rows) == "Supervised"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("ablate", "table3", "table8"), "table8 is another kind of table than table3: one after the other"),
        (("table", "table3", "table8"), "table8 is another kind of table than table3"),
        (("table", "table8", "--format", "verdicts"), "table8 has no directions"),
        (("ablate", "table8", "--scale", "demo", "--rows", "x"), "table8 has no row 'x'"),
        (("ablate", "table8", "--launcher", "slurm"), "leave --launcher out"),
        (("ablate", "table8", "--scale", "demo", "--set", "method.kapa=3"), "method.kapa"),
    ],
)
@pytest.mark.usefixtures("workplace")
def test_mistakes_are_told_before_anything_is_timed(
    obowlab: Obowlab, timed: list[str], words: tuple[str, ...], message: str
) -> None:
    code, _, err = obowlab(*words)
    assert (code, timed) == (2, [])
    assert message in err


@pytest.mark.usefixtures("workplace")
def test_a_process_of_its_own_times_real_training(tmp_path: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_recipe(tmp_path, dataset="small")
    path = tmp_path / "mine.toml"
    path.write_text(FILE.format(key="b", scale="demo", recipe="small.toml"))
    path.write_text(path.read_text().replace("demo-vanilla", "small.toml"))
    table = load_costs(str(path), scale="demo")
    machine = Machine(data_root=data_root, runs_root=tmp_path / "runs", device="cpu", loader="torch", workers=0)
    monkeypatch.setattr(module, "ROUNDS", 1)
    costs = measure_costs(table, rows=["a"], machine=machine, say=str, seconds=0.2)
    (each,) = costs.timed
    assert each.speed.loop_images_per_s > 0
    assert each.speed.step_images_per_s > 0
    assert each.speed.gflops_per_image > 0
    assert (each.speed.measured_batch, each.speed.device, each.speed.images) == (8, "cpu", "'small'")
    write_kept(costs, tmp_path / "x.costs")
    assert Costs.model_validate_json((tmp_path / "x.costs").read_text()) == costs


def test_what_was_measured_is_kept_with_the_project() -> None:
    table = load_costs("table8", scale="demo")
    costs = find_kept(Costs, table.file_name, folder=ROOT / "ablations/results/demo")
    assert costs is not None
    lines = lines_of(table, costs=costs)
    assert [line.rounds for line in lines] == [ROUNDS] * len(table.rows)
    assert all(line.loop and line.step and line.operations and line.memory for line in lines)
