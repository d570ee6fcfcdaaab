"""What a person sees: 80 and 200 columns, progress, Ctrl-C, closed pipes, terminals without colours or letters."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest

from obowlab import text
from obowlab.cli import doctor, main, output
from obowlab.config import Loaded, load_recipe
from obowlab.data import synthetic
from obowlab.launch.processes import StopSignals
from obowlab.runs import RunFolder
from obowlab.training.reporter import PLAIN_WIDTH, Reporter, progress_line, training_facts
from tests.command_line import Obowlab, result
from tests.test_docs import blocks

pytestmark = pytest.mark.usefixtures("workplace")
ROOT = Path("runs")
LONG = "birds-of-the-north-sea-with-a-very-long-name"
ANSI = re.compile(r"\x1b\[[0-9;]*m")


def make(
    name: str, *, status: str, step: int, total: int, seed: int = 0, measured: Sequence[tuple[str, float]] = ()
) -> RunFolder:
    """Make the folder of a run; of a recipe of that name, or of demo under another."""
    recipe = load_recipe("demo", overrides=["method.kappa=8"]).recipe if name == LONG else load_recipe(name).recipe
    folder = RunFolder.create(Loaded(name=name, recipe=recipe, sources={}), seed=seed, runs_root=ROOT)
    for protocol, value in measured:
        filed = result(protocol, "student", value)
        filed["measurements"][0] |= {"low": value - 2.125, "high": value + 2.25}
        folder.add_result(filed)
    folder.set_state(status=status, step=step, total_steps=total, trained_s=60.0)
    return folder


@pytest.fixture
def store(workplace: Path) -> Iterator[None]:
    """A store with what a list may hold: long names, results, a run that is trained, one that was stopped."""
    with ExitStack() as stack:
        make("demo", status="finished", step=2352, total=2352, measured=[("fewshot", 95.62), ("linear", 97.92), ("knn", 97.08)])
        make("demo-full", status="finished", step=2352, total=2352, measured=[("fewshot", 99.72), ("linear", 99.92)])
        stopped = make("tiny-vanilla", status="interrupted", step=15321, total=162480, seed=12)
        stopped.set_state(message="stopped by SIGTERM; the same command resumes from the last checkpoint")
        trained = make(LONG, status="running", step=300, total=700)
        stack.enter_context(trained.lock())
        yield


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, obowlab: Obowlab) -> Callable[..., list[str]]:
    """The command line on a terminal of so many columns: the lines it prints, without styles."""

    def call(columns: int, *words: str) -> list[str]:
        monkeypatch.setenv("COLUMNS", str(columns))
        with monkeypatch.context() as patch:
            patch.setattr(sys.stdout, "isatty", lambda: True)
            code, out, err = obowlab(*words)
        assert code == 0, err
        return ANSI.sub("", out).splitlines()

    return call


# ---------------------------------------------------------------------------------------------------------------- widths

COMMANDS = (
    "runs list",
    "runs list --where seed>=0 --sort method.kappa",
    "runs show demo",
    "runs show tiny-vanilla",
    f"runs compare demo {LONG}",
    "jobs --all",
    "data list",
    "config list",
    "config show tiny-full",
    "config diff demo imagenet20-full-authors",
    "tune --list",
)


def numbers(lines: Sequence[str]) -> set[str]:
    return set(re.findall(r"\d[\d.,:/]*\d|\d", "\n".join(lines)))


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize("columns", [80, 200])
@pytest.mark.parametrize("words", COMMANDS)
def test_a_table_fits_and_no_number_is_broken(
    words: str, columns: int, terminal: Callable[..., list[str]], obowlab: Obowlab
) -> None:
    lines = terminal(columns, *words.split())
    plain = obowlab(*words.split())[1].splitlines()
    assert max(map(text.width, lines)) <= columns
    shown = [line for line in lines if not line.startswith("Not shown in")]
    whole = numbers(plain) | {value for number in numbers(plain) for value in (number.rstrip(",:"), f"{number}.")}
    assert numbers(shown) <= whole | {"95.6", "97.9", "97.1", "99.7", "99.9"}  # of results without their intervals
    if columns == 200 and words.startswith("runs"):
        assert [line.rstrip() for line in lines] == [line.rstrip() for line in plain]


@pytest.mark.usefixtures("store")
def test_a_shortened_name_still_finds_its_run(terminal: Callable[..., list[str]]) -> None:
    (line,) = [line for line in terminal(80, "runs", "list") if line.startswith("birds")]
    name = line.split()[0]
    assert len(name) < len(LONG)
    assert "…" in name
    assert RunFolder.find(name.rpartition("-")[2], runs_root=ROOT).info.name == LONG


def test_columns_without_text_make_room_first_and_are_not_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    columns = ("name", "often used", "n", "empty column", "n")  # two of one heading
    output.print_table(columns, [("a" * 9, "word", "1234567", "", "7654321")], right=("n",), hide=("often used", "empty column"))
    lines = ANSI.sub("", capsys.readouterr().out).splitlines()
    assert lines == [
        "name             n        n",
        "aaaaaaaaa  1234567  7654321",
        "Not shown in 30 columns: often",
        "used.",
    ]


@pytest.mark.parametrize(
    ("line", "columns", "expected"),
    [
        ("about 5 minutes", 9, ["about 5", "minutes"]),
        ("of 162 480 steps", 8, ["of", "162 480", "steps"]),
        ("on 20 % of it", 5, ["on", "20 %", "of it"]),
        ("at 8.82 ± 0.50 here", 9, ["at", "8.82 ± 0.50", "here"]),
        ("/data/one/1234567/two", 8, ["/data/", "one/", "1234567/", "two"]),
        ("x=1e-05,y", 5, ["x=", "1e-05", ",y"]),
        ("abcdefghij", 4, ["abcd", "efgh", "ij"]),
        ("0123456789", 4, ["0123456789"]),
        ("日本語日本語", 6, ["日本語", "日本語"]),
        ("", 4, [""]),
    ],
)
def test_wrapping_breaks_no_number(line: str, columns: int, expected: list[str]) -> None:
    assert text.wrap(line, columns) == expected


@pytest.mark.parametrize(
    ("name", "columns", "expected"),
    [
        ("demo-s0-0a1b2c3d", 16, "demo-s0-0a1b2c3d"),
        (f"{LONG}-s12-0a1b2c3d", 24, "birds-of-t…-s12-0a1b2c3d"),
        ("method.teacher_momentum_end", 12, "method.t…end"),
        ("abc123456789def0123", 10, "abc…"),
    ],
)
def test_shortening_keeps_seed_and_digits(name: str, columns: int, expected: str) -> None:
    shown = text.shorten(name, columns)
    assert shown.startswith(expected) if expected.endswith("…") else shown == expected
    assert len(shown) <= columns


def test_control_characters_of_a_cell_do_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_table(("name", "text"), [("a", "one\ntwo\x1b[2Jthree")])
    assert capsys.readouterr().out.splitlines()[1] == "a     one two\\x1b[2Jthree"


# ---------------------------------------------------------------------------------------------------------------- pages


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize("page", ["docs/commands.md", "docs/training.md"])
def test_transcripts_are_what_the_program_prints(page: str, terminal: Callable[..., list[str]]) -> None:
    transcripts = [block for block in blocks(page) if block.marker == "transcript"]
    assert transcripts
    for block in transcripts:
        first, *lines = block.text.splitlines()
        if first.startswith("$ obowlab run "):
            training = load_recipe("demo").recipe.training
            facts = training_facts(
                epoch=2.5,
                epochs=training.epochs,
                step=420,
                steps=training.epochs * (synthetic.num_images("train") // training.batch_size),
                images_per_s=642.3,
                values={"loss": 5.8134, "perplexity_image_conv5": 9},
            )
            expected = [progress_line([f"{text.duration(117.4)} left", *facts])]
        else:
            expected = terminal(80, *first.removeprefix("$ obowlab ").split())
        assert lines == expected, f"{page}:{block.line}\n" + "\n".join(expected)


# --------------------------------------------------------------------------------------------------------------- progress


def test_progress_begins_with_the_time_left_and_fits() -> None:
    values = {"loss": 123.4567, "perplexity_image_conv5": 1234.5, "monitor_accuracy": 12.345}
    facts = training_facts(epoch=79.01, epochs=200, step=162480, steps=1624800, images_per_s=123456.7, values=values)
    line = progress_line(["3 h 20 min left", *facts])
    assert line.startswith("3 h 20 min left · epoch 80/200 · step 162480/1624800 · 123457 img/s")
    assert len(line) <= PLAIN_WIDTH
    assert progress_line(facts, columns=20) == "epoch 80/200"
    assert training_facts(epoch=0.0, epochs=3, step=0, steps=9, images_per_s=1, values={})[0] == "epoch 1/3"


def test_progress_goes_to_the_log_and_waits_between_plain_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("obowlab.training.reporter.PLAIN_LINE_EVERY_S", 0.0)
    reporter = Reporter(tmp_path / "log.txt")
    with reporter.steps(done=0, total=10):
        reporter.step(done=5, left_s=125.0, facts=["epoch 1/2", "step 5/10"])
    assert (tmp_path / "log.txt").read_text().endswith(" 2 min left · epoch 1/2 · step 5/10\n")


def test_json_is_one_line_without_progress(
    obowlab: Obowlab, monkeypatch: pytest.MonkeyPatch, store: None, tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor, "probe", lambda code: "does not load")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for words in (
        "runs list",
        "runs show demo",
        "runs compare demo demo-full",
        "runs trash",
        "jobs",
        "data list",
        "config list",
        "config show demo",
        "tune --list",
        "doctor",
    ):
        _, out, err = obowlab(*words.split(), "--json")
        assert (out.count("\n"), err) == (1, ""), words
        assert out.isascii()
        assert out == json.dumps(json.loads(out), separators=(",", ":")) + "\n"


def test_long_silences_are_filled_on_a_terminal_only(obowlab: Obowlab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "probe", lambda code: "does not load")
    assert obowlab("doctor")[2] == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    err = obowlab("doctor")[2]
    assert "Loading torch, mlflow and ffcv" in err
    assert err.endswith("\r\x1b[K")


# ------------------------------------------------------------------------------------------------- a terminal, and a pipe


def on_terminal(words: Sequence[str], *, columns: int = 80, **env: str) -> tuple[int, str]:
    """Run the command line on a pseudo terminal; return its exit code and all that it shows."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {**{name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}, **env}
    command = [sys.executable, "-m", "obowlab.cli", *words]
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True)
    os.close(slave)
    out = b""
    while True:
        try:
            chunk = os.read(master, 65536)
        except OSError:  # the other side is closed
            break
        out += chunk
    os.close(master)
    return process.wait(timeout=240), out.decode(errors="replace")


def test_a_real_terminal_gets_styles_and_its_width(store: None) -> None:
    code, out = on_terminal(["runs", "list"])
    assert code == 0
    assert "\x1b[1mrun " in out
    assert max(len(ANSI.sub("", line)) for line in out.splitlines()) <= 80
    code, out = on_terminal(["config", "list"], NO_COLOR="1", LC_ALL="C", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert code == 0
    assert out.isascii()
    assert not re.search(r"\x1b\[[0-9;]*3\d", out)
    code, out = on_terminal(["runs", "show", "demo"], LC_ALL="C", PYTHONIOENCODING="ascii", PYTHONUTF8="0", columns=50)
    (header, row, *_) = [ANSI.sub("", line) for line in out.splitlines() if "student" in line or "linear_top1" in line]
    assert row.startswith("linear_top1")
    assert header.index("student") + len("student") == row.index("%") + 1  # numbers stand under their heading


def test_no_color_takes_colours_and_leaves_words(monkeypatch: pytest.MonkeyPatch) -> None:
    assert output.coloured("ok", "green") == "\x1b[32mok\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert output.coloured("ok", "green") == "ok"


@pytest.mark.parametrize(
    "words", [["config", "show", "full"], ["config", "show", "full", "--json"], ["--help"], ["runs", "--help"]]
)
def test_a_reader_that_leaves_ends_a_command_quietly(words: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    process = subprocess.Popen([sys.executable, "-m", "obowlab.cli", *words], stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    _, errors = process.communicate(timeout=240)
    assert (process.returncode, errors) == (141, b"")


def test_the_first_interruption_is_answered_at_once_with_what_is_kept(store: None) -> None:
    script = (
        "import os, sys, time\n"
        "from obowlab.cli import main\n"
        "from obowlab.cli import doctor\n"
        "def probe(code):\n"
        "    os.write(1, b'waiting\\n')\n"  # whole: several threads say it
        "    time.sleep(1.5)\n"  # a thread that does not stop: the answer comes before it is over
        "    return 'x'\n"
        "doctor.probe = probe\n"
        "sys.exit(main(['doctor']))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == "Interrupted: nothing was changed.\n"
    assert process.poll() is None, "the answer did not come first"
    assert process.wait(timeout=240) == 130
    assert process.stderr.read() == ""


@pytest.mark.parametrize(
    ("words", "place", "said"),
    [
        ("runs sync", "obowlab.tracking.mirror.Mirror.sync", "what was sent is kept, and the same command sends the rest."),
        ("data verify photos", "obowlab.data.datasets.verify", "nothing was changed."),
        ("data prepare photos --source .", "obowlab.data.datasets.prepare", "'photos' is as it was before"),
        ("report", "obowlab.report.read.read_store", "what is in report stays as it was."),
        ("eval demo", "obowlab.launch.gpu_leases.using_gpus", "no result was written; the same command measures again"),
        ("embed demo . --out x.npz", "obowlab.launch.gpu_leases.using_gpus", "x.npz was not written."),
        ("run demo --fresh", "obowlab.launch.stages.open_stages", "the same command continues from what is saved."),
    ],
)
def test_every_long_command_says_what_an_interruption_leaves(
    words: str, place: str, said: str, store: None, obowlab: Obowlab, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

    monkeypatch.setattr(place, interrupted)
    monkeypatch.setattr("obowlab.data.image_folder.list_images", lambda folder: ["one"])
    known = SimpleNamespace(name="demo", folder=None, recipe=load_recipe("demo").recipe)
    monkeypatch.setattr("obowlab.weights.subject.find_subject", lambda *_, **__: known)
    monkeypatch.setattr("obowlab.weights.source.find_source", lambda *_, **__: known)  # second: the line above imports it
    monkeypatch.setattr("obowlab.launch.preflight.check_protocols", lambda *_, **__: None)
    before = signal.getsignal(signal.SIGINT)
    code, _, err = obowlab(*words.split())
    assert code == 130
    (line,) = [line for line in err.splitlines() if line.startswith("Interrupted")]
    assert line.startswith(f"Interrupted: {said}")
    assert signal.getsignal(signal.SIGINT) is before


def test_a_launcher_says_at_once_what_becomes_of_its_run(capfd: pytest.CaptureFixture[str]) -> None:
    signals = StopSignals(notice="Stopping: demo saves what it has.")
    with signals.listening():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
    assert capfd.readouterr().err.strip() == "Stopping: demo saves what it has."
    assert signals.received == [signal.SIGINT, signal.SIGTERM]


def test_what_is_ignored_in_the_background_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        monkeypatch.setattr("obowlab.cli.config.print_table", lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))
        assert main(["config", "list"]) == 0
    finally:
        signal.signal(signal.SIGINT, before)
