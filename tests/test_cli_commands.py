"""Each command of the command line, from its options to what it prints and files."""

from __future__ import annotations

import json
import os
import signal
import socket
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from obowlab.cli import doctor, ui
from obowlab.config import Machine, load_recipe
from obowlab.errors import UserError
from obowlab.runs.folder import RunFolder
from obowlab.tracking.mirror import SyncReport
from tests.command_line import Obowlab, contents, result
from tests.runs import small_recipe

pytestmark = pytest.mark.usefixtures("workplace")


# -------------------------------------------------------------------------------------------------------------- recipes


def test_config_show_prints_every_value_with_the_file_that_set_it(obowlab: Obowlab) -> None:
    code, out, _ = obowlab("config", "show", "full", "--set", "method.kappa=6")
    rows = {line.split()[0]: line for line in out.splitlines()}
    assert code == 0
    assert "200" in rows["training.epochs"]
    assert rows["training.epochs"].endswith("full.toml")
    assert rows["method.num_words"].endswith("imagenet20-vanilla.toml")
    assert rows["method.kappa"].endswith("--set method.kappa=6")
    assert rows["method.msd_momentum"].endswith("default")
    assert json.loads(obowlab("config", "show", "full", "--json")[1]) == load_recipe("full").recipe.model_dump(mode="json")


def test_config_diff_prints_differences_only(obowlab: Obowlab) -> None:
    _, out, _ = obowlab("config", "diff", "imagenet20-vanilla", "imagenet20-full", "--set", "method.kappa=6")
    keys = [line.split()[0] for line in out.splitlines()[1:]]
    assert keys == ["title", "views.num_crops", "views.num_patches", "method.levels", "method.kappa"]
    assert "do not differ" in obowlab("config", "diff", "full", "full")[1]


def test_config_list_shows_title_and_cost(obowlab: Obowlab) -> None:
    _, out, _ = obowlab("config", "list")
    line = next(line for line in out.splitlines() if line.startswith("full "))
    assert "ResNet-50 on ImageNet" in line
    assert "4 V100 GPUs" in line


# ----------------------------------------------------------------------------------------------------------------- runs


def test_a_recipe_of_ones_own_that_is_called_like_a_shipped_one_is_named(obowlab: Obowlab, workplace: Path) -> None:
    (workplace / "demo.toml").write_text('extends = "demo"\ntraining.epochs = 1\n')
    code, _, err = obowlab("run", "demo", "--dry-run")
    assert code == 0
    assert "demo.toml of this folder is another: `obowlab run ./demo.toml`." in err
    assert obowlab("config", "show", "demo")[1] != obowlab("config", "show", "./demo.toml")[1]
    assert "demo.toml of this folder" not in obowlab("run", "./demo.toml", "--dry-run")[2]


def test_run_hands_everything_to_the_launcher_and_prints_the_results(
    obowlab: Obowlab, data_root: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []

    def launch(loaded: Any, **how: Any) -> int:
        calls.append({"name": loaded.name, "kappa": loaded.recipe.method.kappa, **how})
        folder = RunFolder.create(loaded, seed=how["seed"], runs_root=how["machine"].runs_root)
        folder.add_result(result("knn", "student", 12.5))
        return 0

    monkeypatch.setattr("obowlab.launch.local.launch", launch)
    monkeypatch.setattr("obowlab.launch.gpu_leases.count_gpus", lambda: 2)
    words = [
        "run",
        "demo",
        "--seed",
        "7",
        "--set",
        "method.kappa=3",
        "--set",
        "data.dataset=small",
        "--set",
        "training.batch_size=8",
        "--data-root",
        str(data_root),
    ]
    words += ["--runs-root", "elsewhere", "--gpus", "2", "--workers", "1", "--loader", "torch", "--fresh"]
    words += ["--no-progress", "--no-quote"]
    code, out, err = obowlab(*words)
    assert (code, err) == (0, "")
    assert "knn_top1" in out
    assert "12.50 ± 0.50 %" in out
    (call,) = calls
    machine = call.pop("machine")
    assert call == {"name": "demo", "kappa": 3.0, "seed": 7, "fresh": True, "progress": False, "cost": None}
    assert machine == Machine(
        data_root=data_root, runs_root=workplace / "elsewhere", device="cuda", procs=2, workers=1, loader="torch"
    )


def test_the_launchers_exit_code_is_the_commands(obowlab: Obowlab, data_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("obowlab.launch.local.launch", lambda loaded, **how: 130)
    words = ["--set", "data.dataset=small", "--set", "training.batch_size=8", "--data-root", str(data_root)]
    code, out, _ = obowlab("run", "demo", "--no-quote", "--set", "evaluation.protocols=[]", *words)
    assert (code, out) == (130, "")


def test_a_class_list_that_is_not_there_stops_the_run_before_it_trains(obowlab: Obowlab, data_root: Path) -> None:
    words = ["run", "imagenet20-vanilla", "--set", "data.dataset=small", "--set", "training.batch_size=8"]
    code, _, err = obowlab(*words, "--data-root", str(data_root))
    assert code == 2
    assert "novel_classes_1" in err


@pytest.mark.parametrize(
    ("recipe", "procs", "setting"),
    [("demo", 3, "training.batch_size (32)"), ("demo-moco", 16, "method.batchnorm_splits (4)")],
)
def test_processes_that_cannot_share_a_batch_are_refused_before_anything_begins(
    recipe: str, procs: int, setting: str, workplace: Path, obowlab: Obowlab
) -> None:
    said = f"{setting} must be a multiple of the number of processes ({procs}): change --procs"
    code, out, err = obowlab("run", recipe, "--procs", str(procs))
    assert (code, out) == (2, "")
    assert err.startswith(f"Error: {said}")
    code, out, err = obowlab("run", recipe, "--procs", str(procs), "--dry-run")
    assert (code, err) == (2, "")
    assert f"\nWould be refused: {said}" in out
    assert contents(workplace) == {}


def test_finished_run_is_not_started_again(obowlab: Obowlab, finished: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("obowlab.launch.local.launch", lambda loaded, **how: pytest.fail("started again"))
    code, out, _ = obowlab("run", "demo", "--set", "evaluation.knn.num_neighbours=5")
    assert code == 0
    assert f"Run {finished.run_id} is finished" in out
    assert "evaluation.knn.num_neighbours" in out
    row = next(line for line in out.splitlines() if line.startswith("fewshot_5shot"))
    assert row.split("  ")[0] == "fewshot_5shot"
    assert row.index("31.25 ± 0.50 %") < row.index("11.75 ± 0.50 %") < row.index("200") < row.index("fewshot v1 abababab")


def test_runs_list_and_show(obowlab: Obowlab, finished: RunFolder) -> None:
    _, out, _ = obowlab("runs", "list")
    header, row = out.splitlines()
    assert row.startswith(f"{finished.run_id}  finished  10/10")
    assert row.split("  ")[-2:] == [" 31.2 ± 0.5", " 40.0 ± 0.5"]
    assert header.split()[:2] == ["run", "status"]
    (listed,) = json.loads(obowlab("runs", "list", "--json")[1])
    assert listed["run_id"] == finished.run_id
    assert len(listed["results"]) == 3
    _, out, _ = obowlab("runs", "show", "demo-s0")
    assert "finished" in out
    assert ["perplexity_image_conv5", "20.25", "words"] in [line.split() for line in out.splitlines()]
    shown = json.loads(obowlab("runs", "show", str(finished.path), "--json")[1])
    assert shown["info"]["recipe"] == finished.info.recipe.model_dump(mode="json")
    assert shown["last_metrics"] == {"step": 10, "loss": 3.5, "perplexity_image_conv5": 20.25}


def test_exported_run_is_a_run_elsewhere(obowlab: Obowlab, finished: RunFolder, workplace: Path) -> None:
    finished.write_artifact("mirror.json", "{}")
    finished.write_artifact("words/index.html", "page")
    assert obowlab("runs", "export", "demo")[0] == 0
    with tarfile.open(workplace / f"{finished.run_id}.tar.gz") as bundle:
        names = {Path(name).name for name in bundle.getnames()}
        bundle.extractall(workplace / "other", filter="data")
    assert {"run.json", "metrics.jsonl", "encoder.safetensors", "results", "index.html"} <= names
    assert not {"checkpoint.pt", "mirror.json", "machine.json", "lock"} & names
    code, out, _ = obowlab("runs", "show", finished.run_id, "--runs-root", "other")
    assert code == 0
    assert "31.25 ± 0.50 %" in out
    assert obowlab("runs", "export", "demo", "--checkpoint", "--out", "all.tar.gz")[0] == 0
    with tarfile.open(workplace / "all.tar.gz") as bundle:
        assert f"{finished.run_id}/checkpoint.pt" in bundle.getnames()


def test_sync_reports_every_run_and_fails_when_something_is_pending(
    obowlab: Obowlab, finished: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        def __init__(self, folder: RunFolder, *, tracking_uri: str | None) -> None:
            assert tracking_uri == "http://127.0.0.1:9"

        def sync(self, *, timeout_s: float) -> SyncReport:
            return SyncReport(sent=2, pending=3, error=f"no answer within {timeout_s:.0f} s")

    monkeypatch.setattr("obowlab.tracking.mirror.Mirror", Broken)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    code, out, _ = obowlab("runs", "sync", "--timeout", "5")
    assert (code, out) == (1, f"{finished.run_id}: 2 sent, 3 pending: no answer within 5 s\n")


# ------------------------------------------------------------------------------------------------------ eval and weights


def test_results_of_eval_are_printed_filed_and_sent_on(
    obowlab: Obowlab, finished: RunFolder, workplace: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (workplace / "data").symlink_to(data_root)
    from obowlab.evaluation import Result
    from obowlab.weights.subject import Subject

    asked: dict[str, Any] = {}

    def measure(chosen: Subject, **how: Any) -> list[Result]:
        asked.update(how, neighbours=chosen.recipe.evaluation.knn.num_neighbours)
        measured = Result.from_json(result("knn", "student", 22.0))
        how["keep"](measured)
        return [measured]

    class Mirror:
        def __init__(self, folder: RunFolder, *, tracking_uri: str | None) -> None:
            asked["mirrored"] = folder.results()

        def sync(self, *, timeout_s: float) -> SyncReport:
            return SyncReport(sent=1, pending=0)

    monkeypatch.setattr("obowlab.training.measure.measure", measure)
    monkeypatch.setattr("obowlab.tracking.mirror.Mirror", Mirror)
    words = [
        "eval",
        "demo",
        "--protocol",
        "knn",
        "--dataset",
        "small",
        "--set",
        "evaluation.knn.num_neighbours=3",
        "--json",
        "out.json",
    ]
    code, out, err = obowlab(*words)
    assert (code, err) == (0, "")
    assert "22.00 ± 0.50 %" in out
    assert (asked["protocols"], asked["dataset"], asked["with_random"], asked["neighbours"]) == (("knn",), "small", True, 3)
    assert json.loads((workplace / "out.json").read_text())[0]["measurements"][0]["value"] == 22.0
    assert len(asked["mirrored"]) == len(finished.results()) == 4
    code, _, err = obowlab("eval", "demo", "--set", "training.epochs=3")
    assert (code, "evaluation.* keys" in err) == (2, True)


def test_weights_go_out_and_come_back(obowlab: Obowlab, workplace: Path) -> None:
    import torch

    from obowlab.config import Backbone
    from obowlab.methods.backbones import build_backbone

    torch.manual_seed(0)
    torch.save(build_backbone(Backbone(arch="resnet18")).state_dict(), workplace / "net.pth")
    code, out, err = obowlab("weights", "import", "net.pth")
    assert (code, err) == (0, "")
    assert "torchvision's names, resnet18" in out
    code, out, err = obowlab("weights", "export", "net.safetensors", "--format", "torchvision", "--out", "back.pth")
    assert (code, err) == (0, "")
    assert "largest difference of a feature" in out
    before, after = (torch.load(workplace / name, weights_only=True) for name in ("net.pth", "back.pth"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_eval_of_a_file_measures_it(obowlab: Obowlab, workplace: Path, data_root: Path) -> None:
    from obowlab.methods.backbones import build_backbone
    from obowlab.weights.encoder_file import save_encoder

    overrides = ["backbone.width=4", "views.original_size=16", "views.original_resize=18"]
    recipe = load_recipe("tiny-vanilla", overrides=overrides).recipe
    save_encoder(
        build_backbone(recipe.backbone), path=workplace / "net.safetensors", recipe=recipe, fingerprint=None, source="test"
    )
    words = [
        "eval",
        "net.safetensors",
        "--dataset",
        "small",
        "--protocol",
        "knn",
        "--data-root",
        str(data_root),
        "--device",
        "cpu",
    ]
    code, out, _ = obowlab(*words, "--loader", "torch", "--workers", "0", "--json", "knn.json")
    assert code == 0
    assert "knn_top1" in out
    (measured,) = json.loads((workplace / "knn.json").read_text())
    assert measured["details"]["dataset"] == "small"
    assert measured["details"]["view"]["size"] == 16
    assert measured["measurements"][0]["count"] == 30
    code, _, err = obowlab(*words, "--recipe", "full")
    assert (code, "another --recipe" in err) == (2, True)


def test_a_measurement_that_could_not_be_written_is_refused_before_it_is_made(
    obowlab: Obowlab, finished: RunFolder, tmp_path: Path
) -> None:
    before = len(finished.results())
    missing = "The folder of --json nowhere/x.json does not exist"
    for file, sentence in ((".", "--json . is a folder"), ("nowhere/x.json", missing)):
        code, _, err = obowlab("eval", str(finished.path), "--json", file)
        assert (code, sentence in err) == (2, True)
    code, _, err = obowlab("eval", str(finished.path), "--set", "evaluation.protocols=[]")
    assert code == 2
    assert "measures nothing by itself: add --protocol fewshot, linear or knn." in err
    assert len(finished.results()) == before


def test_what_was_measured_before_an_interruption_is_added(
    obowlab: Obowlab, workplace: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from obowlab.evaluation import EVALUATORS

    small_recipe(workplace, dataset="small", epochs=1)
    machine = ("--data-root", str(data_root), "--device", "cpu", "--loader", "torch", "--workers", "0")
    assert obowlab("run", "small", "--set", "evaluation.protocols=[]", *machine)[0] == 0

    def interrupted(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

    monkeypatch.setitem(EVALUATORS, "linear", replace(EVALUATORS["linear"], run=interrupted))
    code, _, err = obowlab("eval", "small", "--protocol", "knn", "--protocol", "linear", "--no-random", *machine)
    assert code == 130
    assert "Interrupted: what was measured is added to the run; the same command measures again" in err
    (path,) = (workplace / "runs").glob("small-s0-*")
    assert [each["protocol"] for each in RunFolder.open(path).results()] == ["knn"]


# ----------------------------------------------------------------------------------------------------------------- data


def test_data_prepare_list_verify(obowlab: Obowlab, workplace: Path, image_folder: Path) -> None:
    words = ["data", "prepare", "photos", "--source", str(image_folder), "--workers", "1"]
    code, out, _ = obowlab(*words)
    assert code == 0
    assert "60 train, 30 val images of 5 classes" in out
    assert "train: 60 images of 5 classes" in out
    assert "already prepared" in obowlab(*words)[1]
    _, out, _ = obowlab("data", "list")
    assert next(line for line in out.splitlines() if line.startswith("photos ")).rstrip().endswith("prepared")
    listed = {row["name"]: row for row in json.loads(obowlab("data", "list", "--json")[1])}
    assert listed["photos"]["splits"]["train"]["num_images"] == 60
    assert not listed["imagenet"]["prepared"]
    code, out, _ = obowlab("data", "verify", "photos", "--sample", "5")
    assert code == 0
    assert "10 decoded, 10 compared with the source" in out
    beton = workplace / "data" / "photos" / "val.beton"
    damaged = bytearray(beton.read_bytes())
    damaged[-100] ^= 1
    beton.write_bytes(damaged)
    code, out, _ = obowlab("data", "verify", "photos")
    assert code == 1
    assert "val: " in out
    assert "problem(s)" in out


def test_unreadable_images_are_listed(obowlab: Obowlab, workplace: Path, image_folder: Path) -> None:
    for split in ("train", "val"):
        folder = workplace / "source" / split / "a"
        folder.mkdir(parents=True)
        (folder / "good.jpg").symlink_to(image_folder / split / "class_0" / "image_00.jpg")
    (workplace / "source" / "train" / "a" / "bad.jpg").write_bytes(b"no image")
    code, out, _ = obowlab("data", "prepare", "photos", "--source", "source")
    assert code == 0
    assert "1 images cannot be read" in out
    assert "train/a/bad.jpg: " in out


# --------------------------------------------------------------------------------------------------------------- doctor

GOOD_TORCH = {
    "torch": "2",
    "torchvision": "0",
    "built_for": None,
    "cuda": False,
    "gpus": [],
    "nccl": False,
    "gloo": True,
    "sum": 512.0,
}


def test_doctor_reports_a_library_that_does_not_load_with_the_command_that_fixes_it(
    obowlab: Obowlab, monkeypatch: pytest.MonkeyPatch
) -> None:
    def probe(code: str) -> dict[str, Any] | str:
        return {doctor._TORCH: "ImportError: libtorch.so: cannot open", doctor._MLFLOW: {"version": "3"}}.get(
            code, "No module named 'ffcv'"
        )

    monkeypatch.setattr(doctor, "probe", probe)
    code, out, err = obowlab("doctor", "--json")
    checks = {check["name"]: check for check in json.loads(out)}
    assert (code, err) == (1, "")
    assert checks["torch"]["status"] == "fail"
    assert "libtorch.so" in checks["torch"]["text"]
    assert "-m pip install --force-reinstall torch torchvision" in checks["torch"]["fix"]
    assert (checks["ffcv"]["status"], checks["mlflow"]["status"], checks["python"]["status"]) == ("warn", "ok", "ok")
    assert checks["data tinyimagenet100"]["fix"] == "obowlab data prepare tinyimagenet100 --source DIR"
    assert all(check["fix"] for check in checks.values() if check["status"] == "fail")


def test_doctor_is_content_with_optional_things_missing(
    obowlab: Obowlab, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {doctor._TORCH: GOOD_TORCH, doctor._MLFLOW: {"version": "3"}, doctor._FFCV: {"version": "1"}}
    monkeypatch.setattr(doctor, "probe", found.__getitem__)
    monkeypatch.setattr(doctor, "MIN_FREE_DISK", 1.0)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")
    code, out, _ = obowlab("doctor")
    assert code == 0
    assert "secret" not in out
    assert "http://127.0.0.1:9 does not answer" in out
    assert "no GPU: runs go to the CPU" in out
    assert contents(workplace) == {}
    (workplace / "runs").write_text("a file where the folder should be")
    assert obowlab("doctor")[0] == 1


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("import json; print('chatter'); print(json.dumps({'a': 1}))", {"a": 1}),
        ("import no_such_library", "ModuleNotFoundError: No module named 'no_such_library'"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "killed by signal 11"),
        ("import time; time.sleep(30)", "no answer within 1 s"),
    ],
)
def test_probe_survives_whatever_it_tries(code: str, found: object) -> None:
    assert doctor.probe(code, timeout_s=1.0) == found


# ------------------------------------------------------------------------------------------------------------------- ui


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_ui_ends_the_whole_group_of_its_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pids = tmp_path / "pids"
    script = f"trap '' TERM; sleep 60 & echo $$ $! > {pids}; wait"
    before = signal.getsignal(signal.SIGTERM)
    started = time.monotonic()
    monkeypatch.setattr(ui, "STOP_TIMEOUT_S", 0.3)

    def serve_until_terminated() -> None:
        with ui._serving(["sh", "-c", script], cwd=tmp_path, environment={}):
            while not (pids.exists() and pids.read_text().strip()):
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)

    with pytest.raises(KeyboardInterrupt):
        serve_until_terminated()
    assert time.monotonic() - started < 9  # not the ten seconds it would have served on
    server, grandchild = map(int, pids.read_text().split())
    assert not is_alive(server)
    while is_alive(grandchild):  # killed, though not waited for
        assert time.monotonic() - started < 60
        time.sleep(0.01)
    assert signal.getsignal(signal.SIGTERM) is before


def test_ui_refuses_a_port_in_use_and_a_remote_store(obowlab: Obowlab, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind((ui.HOST, 0))
        taken.listen()
        with pytest.raises(UserError, match="choose another --port"):
            ui._refuse_taken(taken.getsockname()[1])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://tracking.example.org")
    code, _, err = obowlab("ui")
    assert (code, "open its address instead" in err) == (2, True)
