"""Tables of transfer: the paper's values, encoders of runs and files, what is measured, kept and shown."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import resnet18

from obowlab.config import Machine
from obowlab.config.scales import SCALES
from obowlab.data.datasets import open_split, prepare
from obowlab.data.drawn_coco import draw_coco
from obowlab.data.drawn_places import FOLDERS, NUM_IMAGES, PLACES, draw, draw_places
from obowlab.data.drawn_voc import draw_voc
from obowlab.data.synthetic import class_parts
from obowlab.errors import UserError
from obowlab.report.read import measured_in
from obowlab.runs.folder import RunFolder
from obowlab.runs.results import pack
from obowlab.tables.measured import read_kept
from obowlab.tables.spec import table_files
from obowlab.tables.statistics import estimate
from obowlab.tables.transfer import Entry, Transfers, load_transfer, question
from obowlab.tables.transfer_measuring import Measuring
from obowlab.tables.transfer_render import MARK, overview, remarks, value_of
from tests.command_line import Obowlab
from tests.runs import small_recipe

# ------------------------------------------------------------------------------------------------------ the shipped tables


def test_table6_has_the_papers_rows_and_columns() -> None:
    table = load_transfer("table6", scale="paper")
    lines = {(row.label, row.epochs): row.paper for row in table.file.row if row.paper}
    assert len(lines) == 13
    assert list(lines["OBoW", 200].values()) == [73.8, 56.8, 89.3, 82.9, 64.8, 57.9, 82.9, 90.7]
    assert lines["SimCLR", 200] == {"imagenet_top1": 66.8}
    assert lines["BYOL", 1000] == {"imagenet_top1": 74.3, "semi1_top5": 78.4, "semi10_top5": 89.0}
    assert [column.label for column in table.file.column] == [
        "ImageNet",
        "Places205",
        "VOC07",
        "AP50",
        "AP75",
        "AP",
        "1 %",
        "10 %",
    ]
    for row in table.file.row:
        if row.key in table.pretraining and row.epochs is not None:
            assert table.pretraining[row.key].recipe.training.epochs == row.epochs, row.key
    assert {name: loaded.name for name, loaded in table.trainings.items()} == {
        name: name for name in ("linear-imagenet", "places205", "voc-detection", "semi-1", "semi-10")
    }


@pytest.mark.parametrize("scale", SCALES)
def test_table6_can_be_measured_at_every_scale(scale: str) -> None:
    table = load_transfer("table6", scale=scale)
    assert set(table.protocols) == {"linear-imagenet", "places205", "voc07-svm", "voc-detection", "semi-1", "semi-10"}
    assert {"random", "supervised", "obow"} <= table.pretraining.keys()
    assert "table6" not in table_files()


@pytest.mark.parametrize("scale", SCALES)
def test_table9_can_be_measured_at_every_scale(scale: str) -> None:
    table = load_transfer("table9", scale=scale)
    assert table.protocols == ("coco-detection",)
    assert {"random", "supervised", "obow"} <= table.pretraining.keys()
    shown = {line[0]: line[2:] for line in overview(table, transfers=Transfers())}
    assert [value for value in shown["OBoW"] if value != "–"] == ["40.8", "36.4"], "beside ours, which are missing"


FILE = """
kind = "transfer"
title = "Mine"
[[column]]
metric = "{metric}"
label = "places"
protocol = "{protocol}"
presets = {{ demo = "{preset}" }}
[[row]]
key = "{key}"
label = "A"
recipes = {{ {scale} = "demo" }}
paper = {{ {value} = 50.0 }}
[[row]]
key = "b"
label = "B"
"""
RIGHT = {
    "metric": "places205_top1",
    "protocol": "places205",
    "preset": "demo",
    "key": "a",
    "scale": "demo",
    "value": "places205_top1",
}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"protocol": "places2005"}, "names the protocol 'places2005'. Did you mean 'places205'"),
        ({"preset": "tiny"}, "--protocol places205 has no preset 'tiny'"),
        ({"metric": "places205_top", "value": "places205_top"}, "'places205_top' is not a metric of an evaluation"),
        ({"key": "b"}, "two rows have the name 'b'"),
        ({"scale": "dmo"}, "row 'a' names the scale 'dmo'. Did you mean 'demo'"),
        ({"value": "places205_top5"}, "row 'a' has a value of 'places205_top5', which is no column"),
    ],
)
def test_a_file_that_is_wrong_is_refused_by_name(tmp_path: Path, values: dict[str, str], words: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(FILE.format(**{**RIGHT, **values}))
    with pytest.raises(UserError) as refused:
        load_transfer(str(path), scale="demo")
    assert words in str(refused.value)


# ------------------------------------------------------------------------------------------------------------- the values


def entry(value: float, *, seed: int = 0, basis: str = "x", weights: str = "w", correct: list[int] | None = None) -> Entry:
    correct = [1, 0, 1, 1] if correct is None else correct
    measurement = {
        "name": "places205_top1",
        "value": value,
        "interval": 9.0,
        "count": len(correct),
        "samples": pack(correct, of=1),
    }
    return Entry(
        row="obow",
        protocol="places205",
        seed=seed,
        question=f"{seed} {weights}",
        encoder="a run",
        weights_hash=weights,
        dataset="d",
        basis=basis,
        run_id=None,
        measurements=(measurement,),
    )


def test_several_seeds_are_averaged_as_in_other_tables_and_one_keeps_its_interval() -> None:
    (column,) = (each for each in load_transfer("table6", scale="demo").file.column if each.protocol == "places205")
    one = value_of(column, entries=[entry(75.0)])
    assert one is not None
    assert (one.value, one.interval, one.seeds) == (75.0, 9.0, 1)
    answers = [[1, 0, 1, 1], [1, 1, 1, 1]]
    both = value_of(column, entries=[entry(0.0, seed=seed, correct=each) for seed, each in enumerate(answers)])
    expected = estimate(np.array(answers, dtype=np.float64) * 100)
    assert both is not None
    assert (both.value, both.interval, both.seeds) == (expected.value, expected.interval, 2)
    other = value_of(column, entries=[entry(50.0, basis="older"), entry(75.0, seed=1)])
    assert other is not None
    assert (other.value, other.seeds) == (75.0, 1)


def test_the_newest_encoder_of_a_row_counts_and_a_question_is_answered_once() -> None:
    transfers = Transfers()
    for each in (entry(1.0), entry(2.0, seed=1), entry(3.0, weights="v"), entry(4.0, weights="v")):
        transfers = transfers.with_entry(each)
    assert [each.measurements[0]["value"] for each in transfers.of_row("obow")] == [4.0]
    assert len(transfers.entries) == 3
    assert transfers.answer("0 w") == entry(1.0)
    assert transfers.answer("nothing") is None


def test_a_value_over_other_images_than_the_papers_is_marked() -> None:
    table = load_transfer("table6", scale="paper")
    lines = {line[0]: line for line in overview(table, transfers=Transfers(entries=(entry(75.0),)))}
    assert f"75.00 ± 9.00{MARK}" in lines["OBoW"]
    told = remarks(table, transfers=Transfers(entries=(entry(75.0),)))
    assert f"{MARK} OBoW, Places205: 4 test images where the paper has 20500, so it is not comparable with the paper's." in told
    small = load_transfer("table6", scale="demo")
    assert not any(line.startswith(MARK) for line in remarks(small, transfers=Transfers(entries=(entry(75.0),))))


def test_another_protocol_seed_or_encoder_is_another_question() -> None:
    table = load_transfer("table6", scale="demo")

    def ask(protocol: str = "places205", seed: int = 0, weights: str = "w", **settings: Any) -> str:
        return question(table, protocol=protocol, seed=seed, weights_hash=weights, settings=settings)

    assert len({ask(), ask("semi-1"), ask(seed=1), ask(weights="v"), ask("voc07-svm"), ask("voc07-svm", costs=[1.0])}) == 6
    assert ask() == "1cf5461a8d834012f6aba77055fcd42cf84310971fa2cfd0fbf505bea3d7e0d7", (
        "what was measured by earlier versions is found"
    )


# ----------------------------------------------------------------------------------------------------------- drawn places


def test_drawn_places_are_read_as_places205_and_show_no_class_of_the_synthetic_set(tmp_path: Path) -> None:
    place = draw_places(tmp_path)
    prepare("drawn-places", source=place, data_root=tmp_path / "data", workers=1)
    splits = [open_split("drawn-places", split, data_root=tmp_path / "data") for split in ("train", "val")]
    assert [len(split.labels) for split in splits] == [720, 360]
    assert sum(len(split.labels) for split in splits) == NUM_IMAGES
    assert splits[0].class_names[0] == "fine-rows-over_coarse-spots"
    assert len(set(FOLDERS)) == len(PLACES) == 24
    assert not any(set(parts) <= set(pair) for pair in PLACES for parts in class_parts())
    assert not np.array_equal(draw("train", index=0), draw("train", index=1))
    with pytest.raises(UserError, match="is there already: remove it, or name another folder"):
        draw_places(tmp_path)


@pytest.mark.parametrize("draw_images", [draw_places, draw_voc, draw_coco])
def test_drawing_that_is_interrupted_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, draw_images: Callable[[Path], Path]
) -> None:
    done = []

    def save(*_: object, **__: object) -> None:
        done.append(1)
        if len(done) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(KeyboardInterrupt):
        draw_images(tmp_path)
    assert list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------------------------------------------- the commands

MINE = """
kind = "transfer"
title = "Mine"
[[column]]
metric = "places205_top1"
label = "places"
protocol = "places205"
datasets = { demo = "small" }
[column.set.demo]
"training.epochs" = 2
"training.batch_size" = 8
"optimizer.learning_rate" = 0.1
"views.original_size" = 24
"views.original_resize" = 28
[[column]]
metric = "svm_map"
label = "VOC"
protocol = "voc07-svm"
datasets = { demo = "drawn-voc" }
[[row]]
key = "random"
label = "Random"
untrained = true
recipes = { demo = "small.toml" }
[[row]]
key = "ours"
label = "Ours"
recipes = { demo = "small.toml" }
paper = { places205_top1 = 50.0 }
[[row]]
key = "theirs"
label = "Theirs"
"""


@pytest.fixture
def place(workplace: Path, data_root: Path) -> Path:
    """A table of one's own, its recipe, and the images of one of its two columns."""
    small_recipe(workplace, dataset="small", epochs=1, overrides=("evaluation.protocols=[]",))
    (workplace / "mine.toml").write_text(MINE)
    (workplace / "data").symlink_to(data_root)
    return workplace


QUIET = ("--device", "cpu", "--loader", "torch", "--workers", "0")


def test_what_is_missing_is_measured_kept_and_shown(place: Path, obowlab: Obowlab) -> None:
    words = ("mine.toml", "--scale", "demo")
    code, out, err = obowlab("ablate", *words, *QUIET, "--seeds", "2", "--dry-run")
    assert code == 0, err
    assert "Left out: voc07-svm: " in out
    assert "Would measure 2 times" in out, "of the untrained network alone"
    assert not (place / "runs").exists()
    assert obowlab("run", "small", *QUIET)[0] == 0
    words = (*words, "--rows", "ours")
    code, out, err = obowlab("ablate", *words, *QUIET, "--seeds", "2", "--records", "records")
    assert code == 0, err
    assert "Measuring places205 of Ours, seed 1 (2 of 2)." in err
    words = words[:-2]
    assert "Ours: small-s0-" in (shown := obowlab("table", *words)[1])
    assert "; seeds 0, 1 of the classifiers" in shown
    kept = read_kept(Transfers, place / "runs/.tables/mine-demo.transfer")
    assert kept is not None
    assert [(each.row, each.seed) for each in kept.entries] == [("ours", 0), ("ours", 1)]
    (run,) = (RunFolder.open(path.parent) for path in (place / "runs").glob("small-s0-*/run.json"))
    assert {each["details"]["seed"] for each in run.results() if each["protocol"] == "classes"} == {0, 1}, (
        "it has its measurements too"
    )
    for form in ("md", "json", "csv", "html"):
        from_store = obowlab("table", *words, "--format", form)[1]
        assert from_store == obowlab("table", *words, "--format", form, "--records", "records")[1]
        assert "Ours" in from_store or '"ours"' in from_store
    assert json.loads(obowlab("table", *words, "--format", "json")[1])[0]["measured"]["entries"][0]["row"] == "ours"
    again = obowlab("ablate", *words, *QUIET, "--rows", "ours", "--seeds", "2")
    assert again[0] == 0
    assert "Measuring" not in again[2]


def test_a_row_is_given_an_encoder_and_keeps_it(place: Path, obowlab: Obowlab) -> None:
    words = ("mine.toml", "--scale", "demo", *QUIET)
    assert obowlab("run", "small", *QUIET)[0] == 0
    assert obowlab("weights", "export", "small", "--format", "safetensors", "--out", "theirs.safetensors")[0] == 0
    code, out, err = obowlab("ablate", *words, "--rows", "theirs", "--weights", "theirs=theirs.safetensors")
    assert code == 0, err
    assert "Theirs: theirs.safetensors" in out
    (place / "theirs.safetensors").unlink()
    code, out, err = obowlab("ablate", *words, "--rows", "theirs", "--seeds", "2")
    assert code == 0, err
    assert "Measuring places205 of Theirs, seed 1 (1 of 1)." in err
    assert obowlab("ablate", *words, "--rows", "ours,theirs", "--weights", "theirs=small")[0] == 0
    kept = read_kept(Transfers, place / "runs/.tables/mine-demo.transfer")
    assert kept is not None
    assert len({each.weights_hash for each in kept.entries}) == 1, "the file holds the run's weights"
    assert math.isclose(*(each.measurements[0]["value"] for each in kept.of_row("theirs")[:1] + kept.of_row("ours")[:1]))


def test_a_row_is_given_a_file_of_others_or_a_run_of_another_store(place: Path, obowlab: Obowlab) -> None:
    words = ("mine.toml", "--scale", "demo", *QUIET, "--rows", "theirs")
    torch.save(resnet18().state_dict(), "theirs.pth")
    code, out, err = obowlab("ablate", *words, "--weights", "theirs=theirs.pth", "--dry-run")
    assert code == 0, err
    assert "Would measure 1 times" in out
    assert obowlab("run", "small", *QUIET, "--runs-root", "elsewhere")[0] == 0
    (run,) = (path.parent for path in (place / "elsewhere").glob("small-s0-*/run.json"))
    code, out, err = obowlab("ablate", *words, "--weights", f"theirs={run}")
    assert code == 0, err
    assert f"Theirs: {run.name}" in out


def test_svms_of_a_row_are_a_column_as_well(place: Path, obowlab: Obowlab, tmp_path: Path) -> None:
    (place / "data").unlink()
    prepare("drawn-voc", source=draw_voc(tmp_path / "drawn"), data_root=place / "data", workers=1)
    words = ("mine.toml", "--scale", "demo", *QUIET)
    code, out, err = obowlab("ablate", *words, "--rows", "random")
    assert code == 0, err
    assert "Left out: places205: " in out
    line = next(line for line in obowlab("table", "mine.toml", "--scale", "demo")[1].splitlines() if line.startswith("Random"))
    assert "±" in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("ablate", "table6", "table3"), "table3 is another kind of table than table6"),
        (("ablate", "table3", "--weights", "obow=x"), "--weights gives encoders to rows of a table of transfer"),
        (("ablate", "table6", "--weights", "obow"), "--weights obow: name a row and its encoder"),
        (("ablate", "table6", "--weights", "obwo=x"), "table6 has no row 'obwo' (--rows). Did you mean 'obow'?"),
        (("ablate", "table6", "--weights", "obow=x.pth"), "There is no weights file 'x.pth'."),
        (("ablate", "table6", "--rows", "obwo"), "table6 has no row 'obwo' (--rows). Did you mean 'obow'?"),
        (("ablate", "table6", "--set", "training.epochs=1"), "table6 takes no --set"),
        (("ablate", "table6", "--launcher", "slurm"), "leave --launcher out"),
        (("table", "table6", "--format", "verdicts"), "table6 has no directions"),
        (("ablate", "table6"), "Nothing of table6 can be measured here, see above."),
    ],
)
@pytest.mark.usefixtures("workplace")
def test_mistakes_are_told_before_anything_is_measured(obowlab: Obowlab, words: tuple[str, ...], message: str) -> None:
    code, _, err = obowlab(*words)
    assert code == 2
    assert message in err


@pytest.mark.usefixtures("workplace")
def test_a_table_without_protocols_is_shown_and_not_measured(obowlab: Obowlab) -> None:
    words = FILE.format(**RIGHT).replace('protocol = "places205"\n', "").replace('presets = { demo = "demo" }\n', "")
    Path("alone.toml").write_text(words)
    code, _, err = obowlab("ablate", "alone.toml", "--scale", "demo")
    assert code == 2
    assert "alone has the paper's values alone so far" in err
    assert "50.0" in obowlab("table", "alone.toml", "--scale", "demo")[1]


def test_two_commands_at_once_keep_what_both_measured(tmp_path: Path) -> None:
    table = load_transfer("table6", scale="demo")
    first, second = (
        Measuring(table, machine=Machine(runs_root=tmp_path), keep=lambda _: None, dry_run=False)
        for _ in range(2)  # type: ignore[arg-type, return-value]
    )
    first.record(entry(75.0))
    second.record(entry(60.0).model_copy(update={"question": "another"}))
    assert [each.question for each in second.transfers.entries] == [entry(75.0).question, "another"]
    assert read_kept(Transfers, tmp_path / ".tables" / table.file_name) == second.transfers


def test_what_was_measured_is_never_replaced_because_it_cannot_be_read(obowlab: Obowlab, tmp_path: Path) -> None:
    path = tmp_path / ".tables/table6-demo.transfer"
    path.parent.mkdir()
    path.write_text("{")
    for command in ("ablate", "table"):
        code, _, err = obowlab(command, "table6", "--scale", "demo", "--runs-root", str(tmp_path))
        assert (code, f"{path} is damaged, or of another version of obowlab: move it away" in err) == (2, True)
    assert path.read_text() == "{"
    grids, (problem,) = measured_in(tmp_path)
    assert not grids
    assert str(path) in problem


def test_the_report_shows_what_was_measured(tmp_path: Path) -> None:
    table = load_transfer("table6", scale="demo")
    path = tmp_path / ".tables" / table.file_name
    path.parent.mkdir()
    path.write_text(Transfers(entries=(entry(75.0),)).model_dump_json())
    ((title, columns, rows, _),), problems = measured_in(tmp_path)
    assert not problems
    assert title.startswith("Table 6: encoders trained on ImageNet, transferred · scale demo · not comparable")
    line = dict(zip(columns, next(row for row in rows if row[0] == "OBoW"), strict=True))
    assert (line["Places205"], line["Places205 paper"]) == ("75.00 ± 9.00", "56.8")
