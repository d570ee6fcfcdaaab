"""`obowlab bench`: what bounds a run follows from made-up numbers; the parts are measured on a tiny recipe."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from obowlab.config import Machine, load_recipe
from obowlab.data.datasets import open_split
from obowlab.launch import bounds
from obowlab.launch.bounds import Facts, Measured, Part, advice, bound, verdict
from obowlab.training import bottleneck
from obowlab.training.distributed import join
from obowlab.training.flops import count_flops, matmul_tflops
from obowlab.training.work import Work
from tests.command_line import Obowlab
from tests.runs import chain_recipe, small_recipe

FACTS = Facts(
    device="cpu",
    card="",
    gpus=0,
    cores=6,
    threads=1,
    workers=1,
    loader="ffcv",
    precision="float32",
    bfloat16=False,
    batch_size=64,
    measured_batch=64,
    images="'synthetic'",
    source_px=256,
    tflops=0.05,
    peak_tflops=0.1,
    train_s=100.0,
    evaluation_s=10.0,
)
ON_GPU = replace(FACTS, device="cuda", card="NVIDIA H100 80GB HBM3", gpus=4, tflops=400.0, peak_tflops=989.0)
PARTS = ["loader", "rendering", "step", "encoder work", "together", "features", "few-shot", "linear probe", "k-NN"]


def parts(loader: float, rendering: float, step: float, together: float | None) -> list[Part]:
    """Return parts with these times of a step of 64 images, in milliseconds."""
    times = {"loader": loader, "rendering": rendering, "step": step, "together": together}
    return [Part(name, None if ms is None else 64e3 / ms, ms) for name, ms in times.items()]


# ------------------------------------------------------------------------------------------------------- what bounds a run


@pytest.mark.parametrize(
    ("times", "name"),
    [
        ((10, 5, 50, 56), "step"),
        ((60, 5, 50, 61), "loader"),
        ((54, 5, 50, 56), "step"),  # the loader keeps up with both together
        ((40, 30, 35, 66), "step"),
        ((40, 35, 30, 66), "rendering"),
        ((40, 30, 35, 104), "loader"),  # in turns: the longest counts
        ((40, 30, 35, 90), "step"),
        ((40, 30, 35, None), "step"),
        ((70, 30, 35, None), "loader"),
    ],
)
def test_the_slowest_part_bounds_a_run(times: tuple[float, float, float, float | None], name: str) -> None:
    assert bound(parts(*times), train_s=100.0, evaluation_s=99.0) == name


def test_an_evaluation_that_takes_longer_than_the_training_bounds_the_run() -> None:
    found = parts(60, 5, 50, 61)
    assert bound(found, train_s=100.0, evaluation_s=101.0) == "evaluation"
    assert bound(found, train_s=None, evaluation_s=101.0) == "loader"
    name, sentence = verdict(found, facts=replace(FACTS, evaluation_s=120.0))
    assert name == "evaluation"
    assert sentence.startswith("Evaluation bounds a run here (2 min beside 2 min of training): measure with fewer protocols")


def test_the_sentence_has_the_times_and_what_to_change() -> None:
    assert verdict(parts(10, 5, 50, 56), facts=FACTS) == (
        "step",
        "Step bounds a run here (50.0 ms a step where a step of all parts takes 56.0 ms): try --procs 4, or a GPU.",
    )
    assert verdict(parts(99, 5, 50, None), facts=FACTS)[1] == "Loader bounds a run here (99.0 ms a step): try --workers 6."


@pytest.mark.parametrize(
    ("name", "facts", "words"),
    [
        ("loader", replace(FACTS, workers=6, loader="torch"), "install obowlab[ffcv] for the compiled loader"),
        ("loader", replace(FACTS, workers=6), "shrink the images to about 256 px before `obowlab data prepare`"),
        ("step", replace(FACTS, cores=1), "train on a GPU, or on a machine with more cores"),
        ("step", FACTS, "try --procs 4, or a GPU"),
        ("step", replace(FACTS, precision="bfloat16"), "try --set training.precision=float32, which makes another run: this"),
        ("step", replace(FACTS, precision="bfloat16", bfloat16=True), "try --procs 4, or a GPU"),
        ("rendering", FACTS, "try --procs 4, or a GPU"),  # 64 images cannot be shared by 6 or 5
        ("step", ON_GPU, "try --set training.precision=bfloat16, which makes another run, or --gpus 4"),
        ("step", replace(ON_GPU, gpus=1, precision="bfloat16"), "try a machine with more GPUs and --gpus N"),
        ("rendering", replace(ON_GPU, gpus=3), "try --gpus 2"),
    ],
)
def test_the_advice_is_for_this_machine(name: str, facts: Facts, words: str) -> None:
    assert advice(name, facts=facts).startswith(words)


# ------------------------------------------------------------------------------------------------------------ the command


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Let the command measure nothing; return how it would have."""
    calls: dict[str, Any] = {}

    def measure(name: str, **how: Any) -> Measured:
        calls.update(how, name=name)
        how["say"]("Loader.")
        return Measured([*parts(10, 5, 50, 56), Part("features", 1234.5, None, "a note")], calls.get("facts", FACTS))

    monkeypatch.setattr(bounds, "measure", measure)
    return calls


@pytest.mark.usefixtures("workplace")
def test_the_table_and_the_sentence_are_printed(obowlab: Obowlab, made_up: dict[str, Any]) -> None:
    code, out, err = obowlab("bench", "full", "--set", "method.kappa=3", "--seconds", "7", "--threads", "2", "--workers", "3")
    lines = out.splitlines()
    assert (code, err) == (0, "Loader.\n")
    assert lines[0].split("  ")[0] == "part"
    assert [line.split()[0] for line in lines[1:6]] == ["loader", "rendering", "step", "together", "features"]
    assert lines[1].split() == ["loader", "6400", "10"]
    assert lines[5].split() == ["features", "1234", "–", "a", "note"]
    assert lines[6] == "The step does 50.0 GFLOP/s on the CPU, 50 % of what a matrix product was timed at."
    assert lines[7].startswith("Step bounds a run here")
    assert (made_up["name"], made_up["overrides"], made_up["seconds"]) == ("full", ("method.kappa=3",), 7.0)
    assert (made_up["machine"].threads, made_up["machine"].workers) == (2, 3)


@pytest.mark.usefixtures("workplace")
def test_mfu_is_of_the_cards_peak(obowlab: Obowlab, made_up: dict[str, Any]) -> None:
    made_up["facts"] = ON_GPU
    assert "The step does 400.0 TFLOP/s on NVIDIA H100 80GB HBM3, MFU 40 % in float32.\n" in obowlab("bench")[1]
    made_up["facts"] = replace(ON_GPU, card="Tesla K80", peak_tflops=None)
    assert "The step does 400.0 TFLOP/s on Tesla K80.\n" in obowlab("bench")[1]


@pytest.mark.usefixtures("workplace")
def test_json_has_everything_in_one_line(obowlab: Obowlab, made_up: dict[str, Any]) -> None:
    code, out, _ = obowlab("bench", "--json")
    (line,) = out.splitlines()
    found = json.loads(line)
    assert code == 0
    assert (found["recipe"], found["bound"], found["utilisation"], found["cores"]) == ("demo", "step", 50.0, 6)
    assert found["sentence"].startswith("Step bounds")
    assert found["parts"][0] == {"name": "loader", "images_per_s": 6400.0, "ms_per_step": 10, "note": ""}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("no-such",), "There is no recipe 'no-such'"),
        (("demo", "--set", "method.kapa=3"), "Did you mean 'method.kappa'"),
        (("demo", "--seconds", "0"), "--seconds"),
        (("demo", "--device", "cuda"), "This machine has 0 GPUs, not 1"),
    ],
)
def test_mistakes_are_told_before_anything_is_measured(
    obowlab: Obowlab, workplace: Path, made_up: dict[str, Any], words: tuple[str, ...], message: str
) -> None:
    code, _, err = obowlab("bench", *words)
    assert code == 2
    assert message in err
    assert not made_up
    assert list(workplace.iterdir()) == []


@pytest.mark.long
@pytest.mark.usefixtures("workplace")
def test_a_process_of_its_own_measures(obowlab: Obowlab, tmp_path: Path, data_root: Path, workplace: Path) -> None:
    small_recipe(tmp_path, dataset="small")
    words = ("bench", str(tmp_path / "small.toml"), "--data-root", str(data_root), "--seconds", "1", "--device", "cpu", "--json")
    code, out, err = obowlab(*words)
    assert code == 0, err
    assert [part["name"] for part in json.loads(out)["parts"]] == PARTS
    code, _, err = obowlab(*words, "--set", "data.images_per_class=1")
    assert code == 2
    assert "is larger than the training set" in err.splitlines()[-1]
    assert list(workplace.iterdir()) == []


# -------------------------------------------------------------------------------------------------------------- the parts


def measured(
    recipe: Path, *overrides: str, machine: Machine, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, Part], Facts | None, str]:
    """Run the process that measures in this one; return its parts, its facts and its error."""
    scratch.mkdir()
    values = {"name": str(recipe), "overrides": overrides, "seconds": 0.2, "scratch": str(scratch)}
    request = {**values, "machine": machine.model_dump(mode="json")}
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(request)))
    monkeypatch.setattr(sys, "stdout", out)
    assert bottleneck.main() == 0
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    found = [Part(**line["part"]) for line in lines if "part" in line]
    facts = next((Facts(**line["facts"]) for line in lines if "facts" in line), None)
    return {part.name: part for part in found}, facts, next((line["error"] for line in lines if "error" in line), "")


def test_every_part_is_measured(tmp_path: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_recipe(tmp_path, dataset="small")
    machine = Machine(data_root=data_root, runs_root=tmp_path / "runs", device="cpu", loader="torch", workers=0)
    found, facts, error = measured(
        tmp_path / "small.toml", machine=machine, scratch=tmp_path / "scratch", monkeypatch=monkeypatch
    )
    assert error == ""
    assert list(found) == PARTS
    assert all(part.images_per_s and part.images_per_s > 0 for part in found.values())
    for part in list(found.values())[:5]:
        assert part.images_per_s * part.ms_per_step == pytest.approx(8e3)
    assert "times its encoder work" in found["step"].note
    assert found["loader"].note == "torch, 0 worker(s), 'small'"
    assert facts is not None
    assert (facts.measured_batch, facts.batch_size, facts.images, facts.device) == (8, 8, "'small'", "cpu")
    num_train = open_split("small", "train", data_root=data_root).num_images // 8 * 8
    assert facts.train_s == pytest.approx(4 * num_train / found["together"].images_per_s)
    assert facts.evaluation_s > 0
    assert facts.tflops > 0
    assert verdict(list(found.values()), facts=facts)[1].endswith(".")
    assert not (tmp_path / "runs").exists()  # the run that was measured lies in the scratch folder


def test_protocols_that_are_not_timed_are_named(tmp_path: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_recipe(tmp_path, dataset="small")
    changed = 'extends = "small"\n[method]\nname = "supervised"\n[evaluation]\nprotocols = ["classes", "knn"]\n'
    (tmp_path / "labels.toml").write_text(changed)
    machine = Machine(data_root=data_root, runs_root=tmp_path / "runs", device="cpu", loader="torch", workers=0)
    found, _, error = measured(tmp_path / "labels.toml", machine=machine, scratch=tmp_path / "scratch", monkeypatch=monkeypatch)
    assert error == ""
    num_train, num_val = (open_split("small", name, data_root=data_root).num_images for name in ("train", "val"))
    assert found["features"].note.endswith(f"{num_train + num_val} views for this recipe; not timed: the rest of classes")


def test_the_loop_counts_steps_and_nothing_else(tmp_path: Path, data_root: Path) -> None:
    """With two steps in the time, a look at the signals before or after training would count as half of a step's work more."""
    loaded = small_recipe(tmp_path, dataset="small")
    machine = Machine(data_root=data_root, runs_root=tmp_path / "runs", device="cpu", loader="torch", workers=0)
    with join(machine) as world:
        run = bottleneck.make_run(loaded, machine=machine, world=world)
        part = bottleneck.together(run, seconds=0.0, batch=8)
    assert run.folder.state.step == 4  # one of warm-up, then three, between which lie two
    assert part.note == "training as `obowlab run` does it, 2 steps"


def test_images_are_drawn_where_the_data_set_is_not_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain_recipe(tmp_path, dataset="imagenet")
    machine = Machine(data_root=tmp_path / "data", runs_root=tmp_path / "runs", device="cpu", loader="torch", workers=0)
    monkeypatch.setattr(bottleneck, "DRAWN_SIZE", (60, 40))
    monkeypatch.setattr(bottleneck, "DRAWN_IMAGES", 8)
    found, facts, error = measured(
        tmp_path / "chain.toml", machine=machine, scratch=tmp_path / "scratch", monkeypatch=monkeypatch
    )
    assert error == ""
    assert "drawn images of 60x40: 'imagenet' is not prepared in" in found["loader"].note
    assert found["together"].images_per_s is None
    assert found["together"].note == "not measured: the stage before this one is not trained here"
    assert "an epoch" not in found["k-NN"].note
    assert found["k-NN"].note.endswith("in a bank of 1281167")
    assert facts is not None
    assert facts.train_s is None
    assert not (tmp_path / "data").exists()


def test_what_cannot_be_trained_is_told(tmp_path: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_recipe(tmp_path, dataset="small")
    machine = Machine(data_root=data_root, runs_root=tmp_path / "runs", device="cpu", loader="torch", workers=0)
    where = {"machine": machine, "scratch": tmp_path / "scratch", "monkeypatch": monkeypatch}
    found, facts, error = measured(tmp_path / "small.toml", "data.images_per_class=1", **where)
    assert "is larger than the training set" in error
    assert (found, facts) == ({}, None)


def test_a_batch_that_takes_too_long_is_measured_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Work, "step", lambda self: None)
    monkeypatch.setattr(Work, "seconds", lambda self, work: (self.batch_size / 100, 0.0))  # 100 images a second
    recipe = load_recipe("demo", overrides=["training.batch_size=64"]).recipe
    how = {"machine": Machine(), "device": torch.device("cpu")}
    assert bottleneck.choose_batch(recipe, seconds=7.0, **how)[0] == 16
    assert bottleneck.choose_batch(recipe, seconds=8.0, **how)[0] == 64


def test_a_batch_that_does_not_fit_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, most = load_recipe("demo", overrides=["training.batch_size=64"]).recipe, 40

    class Fake:
        def __init__(self, recipe: Any, *, batch_size: int, **how: Any) -> None:
            if batch_size > most:
                raise torch.OutOfMemoryError

        def step(self) -> None: ...

        def seconds(self, work: Any) -> tuple[float, float]:
            return 0.0, 0.0

    monkeypatch.setattr(bottleneck, "Work", Fake)
    how = {"machine": Machine(), "device": torch.device("cuda"), "seconds": 1.0}
    assert bottleneck.choose_batch(recipe, **how)[0] == 32
    most = 8
    with pytest.raises(bottleneck.UserError, match="Not even 16 images of this recipe fit"):
        bottleneck.choose_batch(recipe, **how)


def test_operations_are_counted() -> None:
    left, right = torch.randn(3, 5), torch.randn(5, 7)
    assert count_flops(lambda: left @ right) == 2 * 3 * 5 * 7
    assert matmul_tflops(seconds=0.0) > 0


def test_methods_without_its_two_passes_have_no_encoder_work() -> None:
    recipe = load_recipe("demo-moco", overrides=["backbone.width=4"]).recipe
    work = Work(recipe, batch_size=16, device=torch.device("cpu"))
    (step,) = bottleneck.steps(work, seconds=0.0)
    assert step[0].name == "step"
    assert step[0].note == f"fixed batch of 16 images, not {recipe.training.batch_size}"
