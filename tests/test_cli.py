"""The command line: what it offers, what it refuses, and what a dry run leaves alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import click
import pytest

from obowlab import __version__
from obowlab.cli import COMMANDS, cli, options
from obowlab.cli import eval as eval_module
from obowlab.cli import tune as tune_module
from obowlab.cli import weights as weights_module
from obowlab.cli import words as words_module
from obowlab.cli.output import print_table
from obowlab.config import Evaluation, Level, Machine, Padding, recipe_files
from obowlab.config.protocols import TRAININGS
from obowlab.config.scales import SCALES
from obowlab.data.split_names import SPLITS
from obowlab.runs.folder import RunFolder
from tests.command_line import Obowlab, contents

GOLDEN = Path(__file__).parent / "golden" / "cli.txt"
HEAVY = ("torch", "mlflow", "pydantic", "numpy", "rich", "optuna", "obowlab.config")


pytestmark = pytest.mark.usefixtures("workplace")


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
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240, check=False)
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
    assert sum(check(command) for command in commands if command is not None) == 35


def test_choices_are_those_of_the_code_they_stand_for() -> None:
    from obowlab.weights.formats import Format

    assert get_args(Machine.model_fields["device"].annotation) == options.DEVICES
    assert get_args(Machine.model_fields["loader"].annotation) == options.LOADERS
    protocols = get_args(get_args(Evaluation.model_fields["protocols"].annotation)[0])
    assert eval_module.TRAININGS == TRAININGS
    assert (*(name for name in protocols if name not in ("classes", *TRAININGS)), *TRAININGS) == eval_module.PROTOCOLS
    assert set(TRAININGS) <= set(recipe_files())
    assert get_args(Format) == weights_module.FORMATS
    assert get_args(Padding) == weights_module.PADDINGS
    assert get_args(Level) == words_module.LEVELS
    assert SPLITS == words_module.SPLITS
    assert tuple(SCALES) == tune_module.SCALES


def test_version(obowlab: Obowlab) -> None:
    assert obowlab("--version") == (0, f"obowlab {__version__}\n", "")


def test_no_arguments_show_the_help(obowlab: Obowlab) -> None:
    code, out, _ = obowlab()
    assert code == 0
    assert "Usage: obowlab" in out


# -------------------------------------------------------------------------------------------------------------- refusing

BAD = {
    "rum demo": "no command 'obowlab rum'. Did you mean 'run'?",
    "runs lst": "no command 'obowlab runs lst'. Did you mean 'list'?",
    "config shw full": "Did you mean 'show'?",
    "xyzzy": "no command 'obowlab xyzzy'. Known: run, tune, eval,",
    "--verbose run demo": "no option '--verbose'",
    "run": "Missing argument 'NAME'",
    "run ful": "no recipe 'ful'. Did you mean 'full'?",
    "run nothing.toml": "no recipe file 'nothing.toml'",
    "run demo extra": "unexpected extra argument",
    "run demo --sed 3": "no option '--sed' of 'obowlab run'. Did you mean '--seed'?",
    "run demo --epoch 3": "no option '--epoch' of 'obowlab run'. Did you mean '--set training.epochs=...'?",
    "run demo --batch_size 3": "Did you mean '--set training.batch_size=...'?",
    "run demo --kapa 3": "Did you mean '--set method.kappa=...'?",
    "run demo --xyz": "no option '--xyz' of 'obowlab run'.",
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
    "run full --device cpu": "obowlab data prepare imagenet --source DIR",
    "run demo --set data.dataset=../x": "'data.dataset'",
    "eval": "Missing argument 'RUN|FILE'",
    "eval nothing": "no run 'nothing'",
    "eval nothing.safetensors": "no weights file 'nothing.safetensors'",
    "eval nothing --protocol fewshots": "'fewshots' is not one of",
    "embed": "Missing argument 'RUN|FILE'",
    "embed nothing .": "Missing option '--out'",
    "embed nothing . --out x.csv": "--out x.csv must end in .npz or .parquet",
    "embed nothing . --out nowhere/x.npz": "The folder of --out nowhere/x.npz does not exist",
    "embed nothing nowhere --out x.npz": "There is no folder 'nowhere'",
    "embed nothing . --out x.npz": "holds no image",
    "embed nothing . --out x.npz --batch-size 0": "--batch-size",
    "data prepare": "Missing argument 'NAME'",
    "data prepare photos": "Give --source DIR",
    "data prepare photos --source nowhere": "nowhere is neither a folder nor a .tar file",
    "data prepare Photos! --source .": "'Photos!' cannot name a data set",
    "data prepare synthetic --source .": "is drawn",
    "data prepare photos --source . --dry-run": "train",
    "data verify photos": "'photos' is not prepared",
    "data verify photos --sample 0": "--sample",
    "table table3 --records nowhere": "There is no folder of records nowhere (--records)",
    "table table6 --records nowhere": "There is no folder of records nowhere (--records)",
    "table table8 --records nowhere": "There is no folder of records nowhere (--records)",
    "config show": "Missing argument 'NAME'",
    "config show tiny-vanila": "Did you mean 'tiny-vanilla'?",
    "config diff full": "needs a second recipe",
    "config diff full fulll": "Did you mean 'full'?",
    "config show full --set method.kapa=3": "Did you mean 'method.kappa'?",
    "runs show nothing": "no run 'nothing'",
    "runs sync nothing": "no run 'nothing'",
    "runs compare nothing": "Missing argument 'SECOND'",
    "runs compare nothing nothing": "no run 'nothing'",
    "runs tag nothing": "Missing argument 'NAME...'",
    "runs tag nothing x": "no run 'nothing'",
    "runs delete": "Missing argument 'RUN...'",
    "runs delete nothing": "no run 'nothing'",
    "runs restore nothing": "no run 'nothing' in the trash",
    "runs trash nothing": "no run 'nothing' in the trash",
    "runs list --status don": "There is no status 'don'",
    "runs list --where loss": "--where loss is no comparison",
    "runs sync --timeout 0": "--timeout",
    "runs export nothing": "no run 'nothing'",
    "weights import nothing.pth": "no file 'nothing.pth'",
    "weights export nothing --out x.pth": "no run 'nothing'",
    "weights export nothing": "--out",
    "weights export nothing --out x --format caffe": "'caffe' is not one of",
    "tune": "Name a study",
    "tune kappa-dleta": "Did you mean 'kappa-delta'?",
    "tune kappa-delta --scale dem": "'dem' is not one of 'paper', 'tiny', 'demo'. Did you mean 'demo'?",
    "tune kappa-delta --trials 0": "--trials",
    "ui --port 0": "--port",
    "ui": "There are no runs",
    f"runs show {'a' * 300}": "File name too long",
    f"run {'a' * 300}": "File name too long",
    f"weights inspect {'a' * 300}": "File name too long",
    "table table3 --out .": "--out . is a folder: name a file in it.",
    "embed nothing . --out nowhere.npz/../..": "must end in",
    "ablate table3 --scale demo --records /proc/version": "Cannot write records to /proc/version (--records)",
    "ablate table3 --scale demo --records /proc/version --dry-run": "name a folder that may be written to",
    "run demo --runs-root a?b": "whose name has a ? or a % before two digits",
    "run demo --runs-root My%20Data": "whose name has a ? or a % before two digits",
    "report --scale huge": "'huge' is not one of 'paper', 'tiny', 'demo'",
    "report --out /": "is not a report; choose another --out",
    "doctor --jason": "Did you mean '--json'?",
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_one_line_exit_code_2_and_nothing_written(words: str, obowlab: Obowlab, tmp_path: Path) -> None:
    code, out, err = obowlab(*words.split())
    assert code == 2
    assert out == ""
    assert err.startswith("Error: ")
    assert err.count("\n") == 1
    assert BAD[words] in err
    assert contents(tmp_path) == {}


def test_file_that_is_no_weights_is_refused(obowlab: Obowlab, workplace: Path, data_root: Path, image_folder: Path) -> None:
    (workplace / "noise.pth").write_bytes(b"\x80\x02noise")
    (workplace / "noise.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0noise")
    before = contents(workplace)
    for words in (
        "weights import noise.pth",
        f"eval noise.pth --protocol knn --dataset small --data-root {data_root}",
        "eval noise.safetensors",
        "eval noise.safetensors --dry-run",
        f"embed noise.safetensors {image_folder} --out x.npz --dry-run",
        "weights import noise.safetensors --out new.safetensors --dry-run",
        "weights export noise.safetensors --out out --dry-run",
        "weights export noise.pth --out out.pth",
        "weights continue noise.safetensors demo --dry-run",
    ):
        code, out, err = obowlab(*words.split())
        assert (code, out, err.count("\n")) == (2, "", 1), words
        assert "noise" in err
    assert contents(workplace) == before


def test_a_target_that_is_there_is_not_overwritten(obowlab: Obowlab, finished: RunFolder, workplace: Path) -> None:
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


def test_interruption_is_one_line_and_exit_code_130(obowlab: Obowlab, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("obowlab.cli.config.print_table", interrupted)
    code, out, err = obowlab("config", "list")
    assert (code, out, err) == (130, "", "Interrupted.\n")


# --------------------------------------------------------------------------------------------------------------- dry runs

DRY = {
    "run demo": [
        "Would draw the synthetic",
        "Would continue run demo-s0-",
        "step 4 of 10",
        "14 epochs of synthetic",
        "fewshot, linear, knn",
        "mlflow.db",
    ],
    "eval RUN": ["Would measure fewshot, linear, knn of demo-s0-", "random initialisation"],
    "eval RUN --protocol knn --no-random --dataset other": ["Would measure knn of demo-s0-", " on other"],
    "embed RUN SOURCE --out x.npz": ["Would write the features of 90 images", "by demo-s0-", "to x.npz"],
    "data prepare photos --source SOURCE": ["Would write", "60 train, 30 val images of 5 classes"],
    "data prepare synthetic": ["Would draw"],
    "data draw voc here": ["Would draw 1000 images into here/VOC2007"],
    "data verify photos": ["Would hash"],
    "data list": ["Would list"],
    "config list": ["Would list"],
    "config show full": ["Would print"],
    "config diff full demo": ["Would compare"],
    "runs list": ["Would list"],
    "runs show RUN": ["Would show run 'demo-s0-"],
    "runs compare RUN RUN": ["Would compare 'demo-s0-"],
    "runs tag RUN keep": ["Would give run 'demo-s0-", "the tags keep"],
    "runs delete RUN": ["Would move run 'demo-s0-", "to the trash of"],
    "runs trash --empty": ["Would remove 0 run(s)"],
    "runs sync": ["Would send", "of run 'demo-s0-"],
    "runs export RUN": ["Would write run.json, state.json", "demo-s0-"],
    "weights inspect FILE": ["Would say what weights.pth holds"],
    "weights import FILE": ["Would read weights.pth and write its encoder to weights.safetensors"],
    "weights continue FILE demo": ["Would make a run of demo, seed 0, in", "that continues where weights.pth stopped"],
    "weights export RUN --out net": ["Would write the encoder of demo-s0-", "to net as module"],
    "weights export RUN --out net.safetensors": ["to net.safetensors as safetensors"],
    "weights export FILE --out net --format timm": ["of weights.pth to net as timm", "not known before weights.pth is read"],
    "words RUN": ["Would find the 8 best patches", "demo-s0-"],
    "report": ["Would write a report of the runs in", "index.html", "Would send it to sqlite:///"],
    "doctor": ["Would import torch"],
    "tune kappa-delta --scale demo": ["Would begin study kappa-delta-demo", "method.kappa from 1.0 to 25.0 by its logarithm"],
    "ui": ["Would serve sqlite:///"],
    "ui --studies": ["Would serve the studies of journal:///"],
}


@pytest.mark.parametrize("words", DRY)
def test_dry_run_says_what_and_changes_nothing(
    words: str, obowlab: Obowlab, finished: RunFolder, workplace: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)  # nor is anything started
    for path in (workplace / "weights.pth", finished.path / "checkpoint.pt"):
        _write_torch_archive(path)
    if words == "run demo":
        finished.set_state(status="interrupted", step=4)
    before = contents(workplace)
    places = {"RUN": finished.run_id, "SOURCE": str(image_folder), "FILE": "weights.pth"}
    code, out, err = obowlab(*(places.get(word, word) for word in words.split()), "--dry-run")
    assert (code, err) == (0, "")
    assert all(line.startswith(("Would ", "  ")) for line in out.splitlines())
    assert [part for part in DRY[words] if part not in out] == []
    assert contents(workplace) == before


def _write_torch_archive(path: Path) -> None:
    """Write what looks like a file of torch.save from outside."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("weights/data.pkl", b"")


@pytest.mark.usefixtures("workplace")
def test_a_run_that_measures_nothing_has_no_random_initialisation_beside_it(obowlab: Obowlab) -> None:
    _, out, _ = obowlab("run", "demo", "--set", "evaluation.protocols=[]", "--dry-run")
    assert "  evaluation: none\n" in out
    _, out, _ = obowlab("run", "demo", "--dry-run")
    assert "  evaluation: fewshot, linear, knn, random initialisation beside it\n" in out


ALSO_DRY = (
    "ablate table3 --scale demo",
    "ablate table3 --scale demo --seeds auto --power 0.9",
    "ablate table8 --scale demo",
    "table table8 --scale demo",
    "bench demo",
    "init SOURCE",
    "table table3 --scale demo",
    "runs restore RUN",
    "jobs",
    "jobs logs 1",
    "jobs cancel 1",
    "jobs reap",
    "eval FILE --recipe tiny-vanilla --dataset photos",
    "weights export RUN --out net.pth",
    "weights export RUN --format timm --out net",
    "weights import OWN --out new.safetensors",
    "words RUN --level conv4",
)
"""Further dry runs, some of them refused."""


def test_dry_runs_and_refusals_import_no_torch(finished: RunFolder, workplace: Path, image_folder: Path) -> None:
    _write_torch_archive(workplace / "weights.pth")
    (workplace / "own.safetensors").write_bytes((finished.path / "encoder.safetensors").read_bytes())
    places = {"RUN": finished.run_id, "SOURCE": str(image_folder), "FILE": "weights.pth", "OWN": "own.safetensors"}
    lines = [[places.get(word, word) for word in words.split()] + ["--dry-run"] for words in (*DRY, *ALSO_DRY)]
    program = (
        "import json, sys\n"
        "from obowlab.cli import main\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    code = main(words)\n"
        "    assert code in (0, 2), words\n"
        "    assert 'torch' not in sys.modules, words\n"
    )
    done = subprocess.run([sys.executable, "-c", program, json.dumps(lines)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    dry = {name for name, command in _leaves() if any(option.name == "dry_run" for option in command.params)}
    typed = [" ".join(words) for words in lines]
    assert [name for name in dry if not any(line.startswith(name) for line in typed)] == []


def _leaves() -> Iterator[tuple[str, click.Command]]:
    """Yield every command that is no group, with its words."""
    for name in COMMANDS:
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        inner = getattr(command, "commands", {})
        yield from ((f"{name} {each}", inner[each]) for each in inner) if inner else [(name, command)]


@pytest.mark.parametrize("words", ["run full --gpus 4", "ablate table3 --gpus 4", "tune kappa-delta --gpus 4"])
def test_a_dry_run_says_what_this_machine_lacks_and_goes_on(
    words: str, obowlab: Obowlab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    code, out, _ = obowlab(*words.split(), "--dry-run")
    assert code == 0
    assert "not on this machine: This machine has 0 GPUs, not 4" in out
    assert "not on this machine: 'imagenet' is not prepared in" in out
    assert "Would be refused" not in out
    code, _, err = obowlab(*words.split())
    assert (code, "0 GPUs, not 4" in err) == (2, True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("run full --gpus 3", "training.batch_size (256) must be a multiple of the number of processes (3)"),
        ("run demo --nodes 2 --procs 2", "--nodes is for a cluster"),
        ("run imagenet20-vanilla --set data.images_per_class=1 --set training.batch_size=2000", "than the training set (1000"),
        ("run tiny-vanilla --set views.cutmix_probability=0.5 --procs 64", "gives each an odd share"),
    ],
)
def test_a_dry_run_says_what_no_machine_could_do(words: str, said: str, obowlab: Obowlab) -> None:
    code, out, err = obowlab(*words.split(), "--dry-run")
    assert (code, err) == (2, "")
    (line,) = [line for line in out.splitlines() if line.startswith("Would be refused: ")]
    assert said in line
    assert "Would train run" in out


# --------------------------------------------------------------------------------------------------------------- output


def test_a_pipe_gets_plain_unwrapped_lines(capsys: pytest.CaptureFixture[str]) -> None:
    path = "/a" * 200
    print_table(("path", "n"), [(path, "7"), ("/b", "10")], right=("n",))
    header, first, second = capsys.readouterr().out.splitlines()
    assert first == f"{path}   7"
    assert second.endswith(" 10")
    assert header.startswith("path")
    assert "\x1b" not in header + first + second
