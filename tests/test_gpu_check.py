"""`make gpu-check` where there is no GPU: it says so; and its code runs on the CPU, where its numbers mean nothing."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from obowlab.training.flops import peak_tflops
from tests.gpu import check, speed, steps, test_steps, test_targets, test_views
from tests.gpu.speed import Options, Row

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def options(tmp_path: Path) -> Options:
    """Tiny sizes on the CPU."""
    return Options(CPU, tiny=True, out=tmp_path)


def named(rows: list[Row]) -> dict[str, Row]:
    return {row.name: row for row in rows}


# ------------------------------------------------------------------------------------------------------------ the command


def test_without_a_gpu_every_part_is_skipped_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    assert check.main([]) == 0
    assert capsys.readouterr().out.splitlines() == [f"{part}: {check.SKIPPED}" for part in check.LIMITS_S]
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_the_command_leaves_a_table_and_a_json(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "tests.gpu.check", "--try-on-cpu", "--only", "render"]
    environment = {"PATH": "", "PYTHONPATH": str(ROOT), "OUT": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "gpu-check.json").read_text())
    assert {"card", "driver", "torch", "python", "cores", "commit", "date", "seconds", "parts", "rows", "tests"} <= report.keys()
    assert list(report["parts"]) == ["render"]
    for row in report["rows"]:
        assert row["value"] > 0
        assert row["verdict"] == ""
        assert row["name"] in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"gpu-check.json", "render.log"}


def test_a_part_that_fails_keeps_what_it_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(part: str, out: Path, *, limit_s: float, on_gpu: bool) -> tuple[list[Row], str]:
        if part == "step":
            return [Row("a step", 3.0, "ms")], "stopped after 150 s"
        return [Row("another", 2.0, "s", most=1.0)], ""

    monkeypatch.setattr(check, "speed", measure)
    monkeypatch.setenv("OUT", str(tmp_path))
    assert check.main(["--try-on-cpu", "--only", "step", "render"]) == 1
    printed = capsys.readouterr().out
    for words in ("a step", "3 ms", "stopped after 150 s", "another", "≤ 1 s"):
        assert words in printed
    report = json.loads((tmp_path / "gpu-check.json").read_text())
    assert report["parts"]["step"]["problem"] == "stopped after 150 s"
    assert report["parts"]["render"]["problem"] == ""


def test_without_time_left_a_part_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUT", str(tmp_path))
    assert check.main(["--try-on-cpu", "--only", "demo", "--minutes", "0.1"]) == 1
    (row,) = json.loads((tmp_path / "gpu-check.json").read_text())["rows"]
    assert (row["value"], row["note"]) == (None, "no time left of 0.1 minutes")


def test_processes_are_stopped_and_their_last_words_kept(tmp_path: Path) -> None:
    log = tmp_path / "log"
    python = [sys.executable, "-c"]
    assert check.run_part([*python, "pass"], log=log, limit_s=30, environment={}) == ""
    slow = "import subprocess, time; subprocess.Popen(['sleep', '60']); time.sleep(60)"
    assert check.run_part([*python, slow], log=log, limit_s=0.5, environment={}) == "stopped after 0 s"
    wrong = "print('first'); raise SystemExit('no room')"
    assert check.run_part([*python, wrong], log=log, limit_s=30, environment={}) == "exit code 1: no room"


# --------------------------------------------------------------------------------------------------------------- verdicts


@pytest.mark.parametrize(
    ("row", "verdict"),
    [
        (Row("", 1.0), ""),
        (Row("", None), "not measured"),
        (Row("", None, most=1.0), "not measured"),
        (Row("", 1.15, most=1.15), "ok"),
        (Row("", 1.16, most=1.15), "missed"),
        (Row("", 999.0, least=1000.0), "missed"),
        (Row("", 1000.0, least=1000.0), "ok"),
        (Row("", float("nan"), most=1.0), "missed"),
    ],
)
def test_verdicts(row: Row, verdict: str) -> None:
    assert row.verdict == verdict


def test_the_loader_is_held_against_the_step_that_was_measured() -> None:
    rows = [Row(check.STEP_RATE, 2000.0), Row(check.LOADER_RATE, 2300.0, least=1200.0)]
    assert [row.verdict for row in check.with_loader_target(rows)] == ["", "missed"]
    assert check.with_loader_target(rows[1:]) == rows[1:]


def test_tests_that_fail_or_do_not_end_are_counted() -> None:
    lines: list[dict[str, Any]] = [
        {"test": "tests/gpu/test_a.py::one", "outcome": "stopped"},
        {"test": "tests/gpu/test_a.py::one", "outcome": "passed", "numbers": {"full, peak memory at 64 images, GB": 21.0}},
        {"test": "tests/gpu/test_a.py::two", "outcome": "failed", "words": "no"},
        {"test": "tests/gpu/test_a.py::three", "outcome": "skipped", "words": "why"},
        {"test": "tests/gpu/test_a.py::four", "outcome": "stopped"},
    ]
    failed, memory = check.rows_of_tests(check.outcomes(lines))
    assert (failed.value, failed.verdict, failed.note) == (2.0, "missed", "1 passed, 1 skipped")
    assert (memory.name, memory.unit, memory.verdict) == ("full, peak memory at 64 images", "GB", "missed")
    (nothing,) = check.rows_of_tests({})
    assert nothing.verdict == "not measured"


def test_lines_of_a_part_that_was_stopped_within_one(tmp_path: Path) -> None:
    (tmp_path / "rows").write_text('{"name": "one"}\n{"name": "tw')
    assert check.read_lines(tmp_path / "rows") == [{"name": "one"}]
    assert check.read_lines(tmp_path / "missing") == []


def test_the_gpu_is_idle_where_no_kernel_and_no_copy_runs() -> None:
    def event(category: str, start: float, duration: float) -> dict[str, Any]:
        return {"cat": category, "ts": start, "dur": duration}

    events = [event("kernel", 10, 20), event("kernel", 15, 5), event("gpu_memcpy", 40, 10), event("cpu_op", 0, 200)]
    events += [event("kernel", 50, 50), {"cat": "kernel", "ts": 500}]
    assert speed.idle_share(events) == pytest.approx(100 * 10 / 90)
    assert speed.idle_share([event("cpu_op", 0, 200)]) is None


def test_peaks_are_those_of_the_card() -> None:
    assert peak_tflops("NVIDIA H100 80GB HBM3", "bfloat16") == 989
    assert peak_tflops("NVIDIA H100 PCIe", "tf32") == 378
    assert peak_tflops("NVIDIA A100-SXM4-80GB", "float16") == 312
    assert peak_tflops("Tesla K80", "float32") is None


# ------------------------------------------------------------------------------------------------------- parts on the CPU


@pytest.mark.long
def test_tests_that_need_a_gpu_are_skipped_with_a_sentence(tmp_path: Path) -> None:
    rows, problem, tests = check.correctness(tmp_path, limit_s=120, on_gpu=False)
    assert problem == ""
    assert [row.verdict for row in rows] == ["not measured"]
    assert {line["outcome"] for line in tests.values()} == {"skipped"}
    assert {line["words"] for line in tests.values()} == {"needs an NVIDIA GPU: `make test-gpu` on a machine that has one"}
    assert next(iter(tests)).startswith("test_steps.py::")


@pytest.mark.long
@pytest.mark.parametrize("precision", speed.PRECISIONS)
def test_a_step_is_timed(options: Options, precision: str) -> None:
    rows = named(list(speed._step(options, recipe="full", precision=precision)))
    assert rows[f"full, {precision}: step / encoder work"].most == 1.15
    assert rows[f"full, {precision}: step"].value > 0
    assert (f"full, {precision}: GPU idle" in rows) == (precision == "bfloat16")
    if precision == "bfloat16":
        assert rows["full, bfloat16: images/s"].least == 1000
        packed = (options.out / rows["full, bfloat16: GPU idle"].note).read_bytes()
        events = json.loads(gzip.decompress(packed))["traceEvents"]
        assert any(event.get("cat") == "cpu_op" for event in events)
        assert check.STEP_RATE in rows


@pytest.mark.long
@pytest.mark.parametrize("part", ["detector", "render", "evaluation", "loader", "compiled"])
def test_a_part_is_measured(options: Options, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed.benchmarks, "photos", lambda scratch: None)  # images are drawn
    path = options.out / "rows.jsonl"
    assert speed.main([part, str(path), "--try-on-cpu"]) == 0
    rows = [Row(**line) for line in check.read_lines(path)]
    assert len(rows) >= 2
    assert all(row.value > 0 for row in rows)
    if part == "loader":
        assert rows[1].name == check.LOADER_RATE
        assert rows[1].note.endswith("drawn images of 500x375")


@pytest.mark.long
def test_the_demo_is_timed(options: Options) -> None:
    rows = named(list(speed.demo(options)))
    assert rows["obowlab run demo, from nothing"].value > rows["obowlab run demo: training alone"].value > 0
    assert rows["obowlab run demo: fewshot_5shot"].unit == "%"


# ------------------------------------------------------------------------------------------------- comparisons on the CPU


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the tests of a GPU compare the CPU with itself."""
    for module in (test_steps, test_targets, test_views):
        monkeypatch.setattr(module, "CUDA", CPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("name", steps.ROUNDED)
def test_bounds_of_a_step_hold_on_a_cpu(name: str) -> None:
    test_steps.test_float64_equals_the_cpu(name, 1)
    test_steps.test_float32_equals_the_cpu_in_float64(name)
    test_steps.test_lower_precision_stays_within_its_bounds(name, "bfloat16")


def test_a_step_that_differs_is_found() -> None:
    expected = steps.record("obow", device=CPU, dtype=torch.float64, steps=1)
    found = {key: value.clone() for key, value in expected.items()}
    assert steps.worst(steps.differences(found, expected), "")[1] == 0
    found["state vocabularies.conv5.words"][0, 0] += 1e-3
    key, error = steps.worst(steps.differences(found, expected), "")
    assert key == "state vocabularies.conv5.words"
    assert error > test_steps.FLOAT32_BOUND
    found["metric loss 0"].fill_(float("nan"))
    assert steps.worst(steps.differences(found, expected), "metric")[1] == float("inf")


@pytest.mark.usefixtures("on_cpu")
def test_targets_are_compared_on_a_cpu() -> None:
    test_targets.test_soft_targets_equal_the_cpus(torch.float32, 1e-5, "max")
    test_targets.test_hard_targets_and_nearest_words_equal_the_cpus("mean")
    test_targets.test_kept_distances_survive_being_read(torch.float32)
    test_targets.test_softmax_into_its_own_input_is_the_softmax()


@pytest.mark.usefixtures("on_cpu")
def test_views_are_compared_on_a_cpu() -> None:
    test_views.test_flips_and_normalisation_are_equal_to_the_bit()
    test_views.test_colours_without_blur_are_equal_but_for_rare_single_levels()
    test_views.test_all_operations_are_within_one_level("float32")
    test_views.test_the_blur_is_a_float32_product("float32")
