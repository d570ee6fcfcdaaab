"""The command line: what it offers, what it refuses, what it prints, and what it leaves alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import click
import pytest

from obowlab import __version__
from obowlab.cli import COMMANDS, cli, doctor, main, options, ui
from obowlab.cli import eval as eval_module
from obowlab.cli import weights as weights_module
from obowlab.cli.output import print_table
from obowlab.config import Evaluation, Machine, load_recipe
from obowlab.errors import UserError
from obowlab.track.folder import RunFolder
from obowlab.track.mirror import SyncReport

GOLDEN = Path(__file__).parent / "golden" / "cli.txt"
HEAVY = ("torch", "mlflow", "pydantic", "numpy", "rich", "optuna", "obowlab.config")

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder and home, so that whatever a command writes is seen."""
    place = tmp_path / "work"
    place.mkdir()
    monkeypatch.chdir(place)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for variable in ("OBOWLAB_MACHINE", "OBOWLAB_DATA_ROOT", "OBOWLAB_RUNS_ROOT", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(variable, raising=False)
    return place


@pytest.fixture
def obowlab(capsys: pytest.CaptureFixture[str]) -> Run:
    """Call the command line in this process: exit code, standard output, standard error."""

    def call(*words: str) -> tuple[int, str, str]:
        code = main(words)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def result(protocol: str, subject: str, value: float) -> dict[str, Any]:
    return {
        "protocol": protocol,
        "version": 1,
        "protocol_hash": "ab" * 32,
        "subject": subject,
        "weights_hash": "cd" * 32,
        "data_hash": "ef" * 32,
        "measurements": [
            {
                "name": f"{protocol}_5shot" if protocol == "fewshot" else f"{protocol}_top1",
                "value": value,
                "interval": 0.5,
                "count": 200,
            }
        ],
        "details": {"dataset": "synthetic"},
        "elapsed_s": 1.0,
    }


@pytest.fixture
def finished(workplace: Path) -> RunFolder:
    """A finished run of `demo`, with results and no weights."""
    folder = RunFolder.create(load_recipe("demo"), seed=0, runs_root=workplace / "runs")
    folder.append_attempt({"host": "here"})
    with folder.metric_log() as log:
        log.append(10, {"loss": 3.5, "perplexity_image_conv5": 20.25})
    folder.add_result(result("fewshot", "student", 31.25))
    folder.add_result(result("fewshot", "random", 11.75))
    folder.add_result(result("linear", "student", 40.0))
    folder.write_artifact("encoder.safetensors", b"weights")
    folder.write_artifact("checkpoint.pt", b"checkpoint")
    folder.set_state(status="finished", step=10, total_steps=10)
    return folder


def contents(place: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(place)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(place.rglob("*"))
        if path.is_file()
    }


# -------------------------------------------------------------------------------------------------------------- offering


def test_help_of_every_command_imports_nothing_heavy() -> None:
    program = (
        "import sys, contextlib, io\n"
        "from obowlab.cli import COMMANDS, cli, main\n"
        "commands = [[]] + [[name] for name in COMMANDS]\n"
        f"heavy = {HEAVY!r}\n"
        "def check(words):\n"
        "    text = io.StringIO()\n"
        "    with contextlib.redirect_stdout(text):\n"
        "        assert main([*words, '--help']) == 0, words\n"
        "    assert 'Usage: obowlab' in text.getvalue(), words\n"
        "    print(*words, *(name for name in heavy if name in sys.modules), sep=' ')\n"
        "check([])\n"
        "assert not [name for name in sys.modules if name.startswith('obowlab.cli.')], 'the root help imports no command'\n"
        "for name in COMMANDS:\n"
        "    check([name])\n"
        "    command = cli.get_command(None, name)\n"
        "    for inner in getattr(command, 'commands', {}):\n"
        "        check([name, inner])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) >= 1 + len(COMMANDS) + 10
    assert [line for line in lines if any(heavy in line.split() for heavy in HEAVY)] == []


def test_help_lines_are_what_the_commands_say() -> None:
    for name, (_, text) in COMMANDS.items():
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        assert (command.help or "").partition("\n")[0] == text
        assert command.name == name


def tree(command: click.Command, path: str) -> list[str]:
    lines = [path]
    for parameter in command.params:
        names = "/".join([*parameter.opts, *parameter.secondary_opts])
        kind = parameter.type.name if not isinstance(parameter.type, click.Choice) else "|".join(parameter.type.choices)
        facts = [kind, *(["required"] if parameter.required else []), *(["repeatable"] if parameter.multiple else [])]
        lines.append(f"  {names}: {', '.join(facts)}")
    for inner in getattr(command, "commands", {}).values():
        lines += tree(inner, f"{path} {inner.name}")
    return lines


def test_commands_and_options_are_the_golden_ones() -> None:
    lines = ["obowlab"]
    for name in COMMANDS:
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        lines += tree(command, f"obowlab {name}")
    text = "\n".join(lines) + "\n"
    if os.environ.get("OBOWLAB_WRITE_GOLDEN"):
        GOLDEN.write_text(text, encoding="utf-8")
    assert text == GOLDEN.read_text(encoding="utf-8"), "the command line changed; look at it, then `make golden`"


def test_every_command_has_a_dry_run_and_help_for_every_option() -> None:
    def check(command: click.Command) -> int:
        if isinstance(command, click.Group):
            return sum(check(inner) for inner in command.commands.values())
        assert any(parameter.name == "dry_run" for parameter in command.params), command.name
        for parameter in command.params:
            assert not isinstance(parameter, click.Option) or parameter.help, (command.name, parameter.name)
        return 1

    commands = [cli.get_command(click.Context(cli), name) for name in COMMANDS]
    assert sum(check(command) for command in commands if command is not None) == 16


def test_choices_are_those_of_the_code_they_stand_for() -> None:
    from obowlab.training.weights import Format

    assert get_args(Machine.model_fields["device"].annotation) == options.DEVICES
    assert get_args(Machine.model_fields["loader"].annotation) == options.LOADERS
    assert Evaluation().protocols == eval_module.PROTOCOLS
    assert get_args(Format) == weights_module.FORMATS


def test_version(obowlab: Run) -> None:
    assert obowlab("--version") == (0, f"obowlab {__version__}\n", "")


def test_no_arguments_show_the_help(obowlab: Run) -> None:
    code, out, _ = obowlab()
    assert code == 0
    assert "Usage: obowlab" in out


# -------------------------------------------------------------------------------------------------------------- refusing

BAD = {
    "rum demo": "no command 'obowlab rum'. Did you mean 'run'?",
    "runs lst": "no command 'obowlab runs lst'. Did you mean 'list'?",
    "config shw full": "Did you mean 'show'?",
    "xyzzy": "no command 'obowlab xyzzy'. Known: run, eval,",
    "--verbose run demo": "no option '--verbose'",
    "run": "Missing argument 'NAME'",
    "run ful": "no recipe 'ful'. Did you mean 'full'?",
    "run nothing.toml": "no recipe file 'nothing.toml'",
    "run demo extra": "unexpected extra argument",
    "run demo --sed 3": "no option '--sed' of 'obowlab run'. Did you mean '--seed'?",
    "run demo --seed -1": "--seed",
    "run demo --seed x": "--seed",
    "run demo --gpus 0": "--gpus",
    "run demo --gpus 2 --device cpu": "--gpus N stands for",
    "run demo --gpus 2 --procs 3": "--gpus N stands for",
    "run demo --procs 0": "--procs",
    "run demo --device tpu": "'tpu' is not one of 'auto', 'cpu', 'cuda'",
    "run demo --loader fcv": "'fcv' is not one of",
    "run demo --workers -1": "--workers",
    "run demo --set": "--set",
    "run demo --set kappa": "--set needs key=value, not 'kappa'",
    "run demo --set kapa=3": "Unknown key 'kapa' (--set kapa=3). Did you mean 'method.kappa'?",
    "run demo --set method.kappa=fast": "'method.kappa' (--set method.kappa=fast)",
    "run demo --set training.epochs=0": "'training.epochs'",
    "run demo --set views.crop_scale=[0.5,0.1]": "crop_scale must be [low, high]",
    "run demo --machine nowhere.toml": "Cannot read nowhere.toml",
    "run demo --resume": "to resume; `obowlab runs list`",
    "run tiny-vanilla": "obowlab data prepare tinyimagenet100 --source DIR",
    "run full --dry-run": "obowlab data prepare imagenet --source DIR",
    "run demo --set data.dataset=../x": "'data.dataset'",
    "eval": "Missing argument 'RUN|FILE'",
    "eval nothing": "no run 'nothing'",
    "eval nothing.safetensors": "no weights file 'nothing.safetensors'",
    "eval nothing --protocol fewshots": "'fewshots' is not one of",
    "data prepare": "Missing argument 'NAME'",
    "data prepare photos": "Give --source DIR",
    "data prepare photos --source nowhere": "nowhere is neither a folder nor a .tar file",
    "data prepare Photos! --source .": "'Photos!' cannot name a data set",
    "data prepare synthetic --source .": "is drawn",
    "data prepare photos --source . --dry-run": "train",
    "data verify photos": "'photos' is not prepared",
    "data verify photos --sample 0": "--sample",
    "config show": "Missing argument 'NAME'",
    "config show tiny-vanila": "Did you mean 'tiny-vanilla'?",
    "config diff full": "needs a second recipe",
    "config diff full fulll": "Did you mean 'full'?",
    "config show full --set method.kapa=3": "Did you mean 'method.kappa'?",
    "runs show nothing": "no run 'nothing'",
    "runs sync nothing": "no run 'nothing'",
    "runs sync --timeout 0": "--timeout",
    "runs export nothing": "no run 'nothing'",
    "weights import nothing.pth": "no file 'nothing.pth'",
    "weights export nothing --out x.pth": "no run 'nothing'",
    "weights export nothing": "--out",
    "weights export nothing --out x --format onnx": "'onnx' is not one of",
    "ui --port 0": "--port",
    "ui": "There are no runs",
    "doctor --jason": "Did you mean '--json'?",
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_one_line_exit_code_2_and_nothing_written(words: str, obowlab: Run, tmp_path: Path) -> None:
    code, out, err = obowlab(*words.split())
    assert code == 2
    assert out == ""
    assert err.startswith("Error: ")
    assert err.count("\n") == 1
    assert BAD[words] in err
    assert contents(tmp_path) == {}


def test_file_that_is_no_weights_is_refused(obowlab: Run, workplace: Path) -> None:
    (workplace / "noise.pth").write_bytes(b"\x80\x02noise")
    (workplace / "noise.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0noise")
    before = contents(workplace)
    for words in (
        "weights import noise.pth",
        "eval noise.pth",
        "eval noise.safetensors",
        "weights export noise.pth --out out.pth",
    ):
        code, out, err = obowlab(*words.split())
        assert (code, out, err.count("\n")) == (2, "", 1), words
        assert "noise" in err
    assert contents(workplace) == before


def test_a_target_that_is_there_is_not_overwritten(obowlab: Run, finished: RunFolder, workplace: Path) -> None:
    (workplace / "mine.tar.gz").write_bytes(b"mine")
    (workplace / "mine.safetensors").write_bytes(b"mine")
    (workplace / "theirs.pth").write_bytes(b"theirs")
    before = contents(workplace)
    for words in (
        "runs export demo --out mine.tar.gz",
        "weights export demo --out mine.safetensors",
        "weights import theirs.pth --out mine.safetensors",
    ):
        code, _, err = obowlab(*words.split())
        assert (code, "is there already" in err) == (2, True), words
    assert contents(workplace) == before


def test_interruption_is_one_line_and_exit_code_130(obowlab: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("obowlab.cli.config.print_table", interrupted)
    code, out, err = obowlab("config", "list")
    assert (code, out, err.strip()) == (130, "", "Interrupted.")


# --------------------------------------------------------------------------------------------------------------- dry runs

DRY = {
    "run demo": [
        "Would draw the synthetic",
        "Would continue run demo-s0-",
        "step 4 of 10",
        "15 epochs of synthetic",
        "fewshot, linear, knn",
        "mlflow.db",
    ],
    "eval RUN": ["Would measure fewshot, linear, knn of demo-s0-", "random initialisation"],
    "eval RUN --protocol knn --no-random --dataset other": ["Would measure knn of demo-s0-", " on other"],
    "data prepare photos --source SOURCE": ["Would write", "60 train, 30 val images of 5 classes"],
    "data prepare synthetic": ["Would draw"],
    "data verify photos": ["Would hash"],
    "data list": ["Would list"],
    "config list": ["Would list"],
    "config show full": ["Would print"],
    "config diff full demo": ["Would compare"],
    "runs list": ["Would list"],
    "runs show RUN": ["Would show run 'demo-s0-"],
    "runs sync": ["Would send", "of run 'demo-s0-"],
    "runs export RUN": ["Would write run.json, state.json", "demo-s0-"],
    "weights import FILE": ["Would read weights.pth and write its encoder to weights.safetensors"],
    "weights export RUN --out out.pth": ["Would write the encoder of", "as torchvision"],
    "doctor": ["Would import torch"],
    "ui": ["Would serve sqlite:///"],
}


@pytest.mark.parametrize("words", DRY)
def test_dry_run_says_what_and_changes_nothing(
    words: str, obowlab: Run, finished: RunFolder, workplace: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)  # nor is anything started
    (workplace / "weights.pth").write_bytes(b"weights")
    if words == "run demo":
        finished.set_state(status="interrupted", step=4)
    before = contents(workplace)
    places = {"RUN": finished.run_id, "SOURCE": str(image_folder), "FILE": "weights.pth"}
    code, out, err = obowlab(*(places.get(word, word) for word in words.split()), "--dry-run")
    assert (code, err) == (0, "")
    assert all(line.startswith(("Would ", "  ")) for line in out.splitlines())
    assert [part for part in DRY[words] if part not in out] == []
    assert contents(workplace) == before


# -------------------------------------------------------------------------------------------------------------- recipes


def test_config_show_prints_every_value_with_the_file_that_set_it(obowlab: Run) -> None:
    code, out, _ = obowlab("config", "show", "full", "--set", "method.kappa=6")
    rows = {line.split()[0]: line for line in out.splitlines()}
    assert code == 0
    assert "200" in rows["training.epochs"]
    assert rows["training.epochs"].endswith("full.toml")
    assert rows["method.num_words"].endswith("imagenet20-vanilla.toml")
    assert rows["method.kappa"].endswith("--set method.kappa=6")
    assert rows["method.msd_momentum"].endswith("default")
    assert json.loads(obowlab("config", "show", "full", "--json")[1]) == load_recipe("full").recipe.model_dump(mode="json")


def test_config_diff_prints_differences_only(obowlab: Run) -> None:
    _, out, _ = obowlab("config", "diff", "imagenet20-vanilla", "imagenet20-full", "--set", "method.kappa=6")
    keys = [line.split()[0] for line in out.splitlines()[1:]]
    assert keys == ["title", "views.num_crops", "views.num_patches", "method.levels", "method.kappa"]
    assert "do not differ" in obowlab("config", "diff", "full", "full")[1]


def test_config_list_shows_title_and_cost(obowlab: Run) -> None:
    _, out, _ = obowlab("config", "list")
    line = next(line for line in out.splitlines() if line.startswith("full "))
    assert "ResNet-50 on ImageNet" in line
    assert "4 V100 GPUs" in line


# ----------------------------------------------------------------------------------------------------------------- runs


def test_run_hands_everything_to_the_launcher_and_prints_the_results(
    obowlab: Run, data_root: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []

    def launch(loaded: Any, **how: Any) -> int:
        calls.append({"name": loaded.name, "kappa": loaded.recipe.method.kappa, **how})
        folder = RunFolder.create(loaded, seed=how["seed"], runs_root=how["machine"].runs_root)
        folder.add_result(result("knn", "student", 12.5))
        return 0

    monkeypatch.setattr("obowlab.lab.launch.launch", launch)
    words = [
        "run",
        "demo",
        "--seed",
        "7",
        "--set",
        "method.kappa=3",
        "--set",
        "data.dataset=small",
        "--data-root",
        str(data_root),
    ]
    words += ["--runs-root", "elsewhere", "--gpus", "2", "--workers", "1", "--loader", "torch", "--fresh", "--no-progress"]
    code, out, err = obowlab(*words)
    assert (code, err) == (0, "")
    assert "knn_top1" in out
    assert "12.50 ± 0.50 %" in out
    (call,) = calls
    machine = call.pop("machine")
    assert call == {"name": "demo", "kappa": 3.0, "seed": 7, "fresh": True, "progress": False}
    assert machine == Machine(
        data_root=data_root, runs_root=workplace / "elsewhere", device="cuda", procs=2, workers=1, loader="torch"
    )


def test_the_launchers_exit_code_is_the_commands(obowlab: Run, data_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("obowlab.lab.launch.launch", lambda loaded, **how: 130)
    code, out, _ = obowlab("run", "demo", "--set", "data.dataset=small", "--data-root", str(data_root))
    assert (code, out) == (130, "")


def test_a_class_list_that_is_not_there_stops_the_run_before_it_trains(obowlab: Run, data_root: Path) -> None:
    words = ["run", "imagenet20-vanilla", "--set", "data.dataset=small", "--data-root", str(data_root)]
    code, _, err = obowlab(*words)
    assert code == 2
    assert "novel_classes_1" in err


def test_finished_run_is_not_started_again(obowlab: Run, finished: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("obowlab.lab.launch.launch", lambda loaded, **how: pytest.fail("started again"))
    code, out, _ = obowlab("run", "demo", "--set", "evaluation.knn.num_neighbours=5")
    assert code == 0
    assert f"Run {finished.run_id} is finished" in out
    assert "evaluation.knn.num_neighbours" in out
    row = next(line for line in out.splitlines() if line.startswith("fewshot_5shot"))
    assert row.split("  ")[0] == "fewshot_5shot"
    assert row.index("31.25 ± 0.50 %") < row.index("11.75 ± 0.50 %") < row.index("200") < row.index("fewshot v1 abababab")


def test_runs_list_and_show(obowlab: Run, finished: RunFolder) -> None:
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


def test_exported_run_is_a_run_elsewhere(obowlab: Run, finished: RunFolder, workplace: Path) -> None:
    finished.write_artifact("mirror.json", "{}")
    assert obowlab("runs", "export", "demo")[0] == 0
    with tarfile.open(workplace / f"{finished.run_id}.tar.gz") as bundle:
        names = {Path(name).name for name in bundle.getnames()}
        bundle.extractall(workplace / "other", filter="data")
    assert {"run.json", "metrics.jsonl", "encoder.safetensors", "results"} <= names
    assert not {"checkpoint.pt", "mirror.json", "machine.json", "lock"} & names
    code, out, _ = obowlab("runs", "show", finished.run_id, "--runs-root", "other")
    assert code == 0
    assert "31.25 ± 0.50 %" in out
    assert obowlab("runs", "export", "demo", "--checkpoint", "--out", "all.tar.gz")[0] == 0
    with tarfile.open(workplace / "all.tar.gz") as bundle:
        assert f"{finished.run_id}/checkpoint.pt" in bundle.getnames()


def test_sync_reports_every_run_and_fails_when_something_is_pending(
    obowlab: Run, finished: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        def __init__(self, folder: RunFolder, *, tracking_uri: str | None) -> None:
            assert tracking_uri == "http://127.0.0.1:9"

        def sync(self, *, timeout_s: float) -> SyncReport:
            return SyncReport(sent=2, pending=3, error=f"no answer within {timeout_s:.0f} s")

    monkeypatch.setattr("obowlab.track.mirror.Mirror", Broken)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    code, out, _ = obowlab("runs", "sync", "--timeout", "5")
    assert (code, out) == (1, f"{finished.run_id}: 2 sent, 3 pending: no answer within 5 s\n")


# ------------------------------------------------------------------------------------------------------ eval and weights


def test_results_of_eval_are_printed_filed_and_sent_on(
    obowlab: Run, finished: RunFolder, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from obowlab.evaluation import Result

    asked: dict[str, Any] = {}

    def measure(chosen: eval_module.Subject, **how: Any) -> list[Result]:
        asked.update(how, neighbours=chosen.recipe.evaluation.knn.num_neighbours)
        return [Result.from_json(result("knn", "student", 22.0))]

    class Mirror:
        def __init__(self, folder: RunFolder, *, tracking_uri: str | None) -> None:
            asked["mirrored"] = folder.results()

        def sync(self, *, timeout_s: float) -> SyncReport:
            return SyncReport(sent=1, pending=0)

    monkeypatch.setattr(eval_module, "_measure", measure)
    monkeypatch.setattr("obowlab.track.mirror.Mirror", Mirror)
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
    assert (asked["names"], asked["dataset"], asked["with_random"], asked["neighbours"]) == (("knn",), "small", True, 3)
    assert json.loads((workplace / "out.json").read_text())[0]["measurements"][0]["value"] == 22.0
    assert len(asked["mirrored"]) == len(finished.results()) == 4
    code, _, err = obowlab("eval", "demo", "--set", "training.epochs=3")
    assert (code, "evaluation.* keys" in err) == (2, True)


def test_weights_go_out_and_come_back(obowlab: Run, workplace: Path) -> None:
    import torch

    from obowlab.config import Backbone
    from obowlab.methods.backbones import build_backbone

    torch.manual_seed(0)
    torch.save(build_backbone(Backbone(arch="resnet18")).state_dict(), workplace / "net.pth")
    code, out, err = obowlab("weights", "import", "net.pth")
    assert (code, err) == (0, "")
    assert "torchvision, resnet18" in out
    code, out, err = obowlab("weights", "export", "net.safetensors", "--format", "torchvision", "--out", "back.pth")
    assert (code, err) == (0, "")
    assert "largest difference of a feature" in out
    before, after = (torch.load(workplace / name, weights_only=True) for name in ("net.pth", "back.pth"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_eval_of_a_file_measures_it(obowlab: Run, workplace: Path, data_root: Path) -> None:
    from obowlab.methods.backbones import build_backbone
    from obowlab.training.weights import save_encoder

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


# ----------------------------------------------------------------------------------------------------------------- data


def test_data_prepare_list_verify(obowlab: Run, workplace: Path, image_folder: Path) -> None:
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


def test_unreadable_images_are_listed(obowlab: Run, workplace: Path, image_folder: Path) -> None:
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


def test_doctor_reports_a_library_that_does_not_load_with_the_line_that_mends_it(
    obowlab: Run, monkeypatch: pytest.MonkeyPatch
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
    assert "-m pip install --force-reinstall torch torchvision" in checks["torch"]["mend"]
    assert (checks["ffcv"]["status"], checks["mlflow"]["status"], checks["python"]["status"]) == ("warn", "ok", "ok")
    assert checks["data tinyimagenet100"]["mend"] == "obowlab data prepare tinyimagenet100 --source DIR"
    assert all(check["mend"] for check in checks.values() if check["status"] == "fail")


def test_doctor_is_content_with_optional_things_missing(obowlab: Run, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_ui_ends_the_whole_group_of_its_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pids = tmp_path / "pids"
    script = f"trap '' TERM; sleep 60 & echo $$ $! > {pids}; wait"
    before = signal.getsignal(signal.SIGTERM)
    started = time.monotonic()
    monkeypatch.setattr(ui, "STOP_TIMEOUT_S", 0.3)

    def serve_until_terminated() -> None:
        with ui._serving(["sh", "-c", script], cwd=tmp_path):
            while not (pids.exists() and pids.read_text().strip()):
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)

    with pytest.raises(KeyboardInterrupt):
        serve_until_terminated()
    assert time.monotonic() - started < 5
    for pid in map(int, pids.read_text().split()):
        stat = Path(f"/proc/{pid}/stat")
        assert not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z"
    assert signal.getsignal(signal.SIGTERM) is before


def test_ui_refuses_a_port_in_use_and_a_remote_store(obowlab: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind((ui.HOST, 0))
        taken.listen()
        with pytest.raises(UserError, match="choose another --port"):
            ui._refuse_taken(taken.getsockname()[1])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://tracking.example.org")
    code, _, err = obowlab("ui")
    assert (code, "open its address instead" in err) == (2, True)


# --------------------------------------------------------------------------------------------------------------- output


def test_a_pipe_gets_plain_unwrapped_lines(capsys: pytest.CaptureFixture[str]) -> None:
    path = "/a" * 200
    print_table(("path", "n"), [(path, "7"), ("/b", "10")], right=("n",))
    header, first, second = capsys.readouterr().out.splitlines()
    assert first == f"{path}   7"
    assert second.endswith(" 10")
    assert header.startswith("path")
    assert "\x1b" not in header + first + second
