"""`obowlab runs`: which runs a user means, comparing, tagging, and the trash; through the command line, on small run folders."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from obowlab.config import Machine, load_recipe
from obowlab.errors import UserError
from obowlab.launch.slurm import JobRequest, SlurmJob
from obowlab.runs import RunFolder, list_runs
from obowlab.runs.records import store_records
from obowlab.runs.results import pack
from obowlab.runs.selection import Comparison, select
from obowlab.runs.trash import TRASH, find_trashed, put_aside, remove_for_good, trashed_runs
from obowlab.tables.comparison import compare_runs
from tests.command_line import Obowlab, contents, result

pytestmark = pytest.mark.usefixtures("workplace")
ROOT = Path("runs")


def run(
    recipe: str = "demo", *, seed: int = 0, linear: float | None = None, status: str = "finished", **changes: Any
) -> RunFolder:
    """Make a run folder with one result."""
    overrides = [f"{key.replace('__', '.')}={value}" for key, value in changes.items()]
    folder = RunFolder.create(load_recipe(recipe, overrides=overrides), seed=seed, runs_root=ROOT)
    if linear is not None:
        folder.add_result(result("linear", "student", linear))
    folder.set_state(status=status, step=10, total_steps=10)
    return folder


def listed(obowlab: Obowlab, *words: str) -> list[str]:
    code, out, err = obowlab("runs", "list", "--json", *words)
    assert code == 0, err
    return [each["run_id"] for each in json.loads(out)]


# ----------------------------------------------------------------------------------------------------------- which runs


def test_a_name_means_the_recipe_of_that_name_and_not_one_that_begins_alike(obowlab: Obowlab) -> None:
    demo, full = run("demo"), run("demo-full")
    assert RunFolder.find("demo", runs_root=ROOT).run_id == demo.run_id
    assert RunFolder.find("demo-full", runs_root=ROOT).run_id == full.run_id
    assert RunFolder.find(demo.run_id[-8:], runs_root=ROOT).run_id == demo.run_id
    other = run("demo", seed=1)
    tenth = run("demo", seed=10)
    assert RunFolder.find("demo-s1", runs_root=ROOT).run_id == other.run_id
    code, _, err = obowlab("runs", "show", "demo")
    assert code == 2
    assert f"'demo' is the recipe of 3 runs: {demo.run_id}, {other.run_id}, {tenth.run_id}. Name one of them." in err
    assert full.run_id not in err
    assert "is a prefix of 4 runs" in obowlab("runs", "show", "dem")[2]
    for wrong, right in (("demoo", "demo"), ("demo-ful", "demo-full"), ("dmo-full", "demo-full")):
        code, _, err = obowlab("jobs", "logs", wrong)
        assert code == 2
        assert f"Did you mean '{right}'?" in err or wrong == "demo-ful"


@pytest.mark.parametrize("words", ["table table3 --scale demoo", "ablate table3 --scale demoo", "tune kappa-delta --scale demoo"])
def test_a_scale_is_proposed(words: str, obowlab: Obowlab) -> None:
    code, _, err = obowlab(*words.split())
    assert (code, "Did you mean 'demo'?" in err) == (2, True)


def test_runs_are_chosen_by_recipe_status_tag_and_comparison(obowlab: Obowlab) -> None:
    low, high = run("demo", linear=30.0), run("demo", seed=1, linear=50.0, method__kappa=8)
    full, failed = run("demo-full", linear=40.5), run("demo-full", seed=1, status="failed")
    assert listed(obowlab, "--recipe", "demo") == [high.run_id, low.run_id]
    assert listed(obowlab, "--recipe", "demo", "--recipe", "demo-full", "--where", "seed=1") == [failed.run_id, high.run_id]
    assert listed(obowlab, "--status", "failed,interrupted") == [failed.run_id]
    assert listed(obowlab, "--where", "linear_top1>40") == [full.run_id, high.run_id]
    assert listed(obowlab, "--where", "linear_top1 >= 40.5", "--where", "linear_top1 < 50") == [full.run_id]
    assert listed(obowlab, "--where", "linear_top1!=30") == [full.run_id, high.run_id]  # `failed` has none: no match
    assert listed(obowlab, "--where", "method.kappa=8") == [high.run_id]
    assert listed(obowlab, "--where", 'method.levels=["conv4", "conv5"]') == [failed.run_id, full.run_id]
    assert listed(obowlab, "--where", "data.dataset==synthetic", "--status", "finished", "--sort", "linear_top1") == [
        high.run_id,
        full.run_id,
        low.run_id,
    ]
    assert listed(obowlab, "--sort", "-linear_top1") == [low.run_id, full.run_id, high.run_id, failed.run_id]
    assert listed(obowlab, "--sort", "method.kappa")[-1] == high.run_id
    assert listed(obowlab, "--sort", "-created")[0] == low.run_id
    assert obowlab("runs", "tag", "demo-s0", "base")[0] == 0
    assert listed(obowlab, "--tag", "base") == [low.run_id]
    _, out, _ = obowlab("runs", "list", "--where", "method.kappa>7")
    assert out.splitlines()[0].split()[4] == "method.kappa"
    assert "No run in" in obowlab("runs", "list", "--where", "linear_top1>99")[1]


REFUSED = {
    "--where status=failed": "--where status=failed: write --status failed.",
    "--where linear_topp1>4": "no result or setting 'linear_topp1'. Did you mean 'linear_top1'?",
    "--where kapa>4": "Did you mean 'method.kappa'?",
    "--where linear_top1": "--where linear_top1 is no comparison",
    "--where linear_top1>": "is no comparison",
    "--where linear_top1>high": "'high' is no number",
    "--where linear_top1>nan": "'nan' is no number",
    "--sort linear": "no result or setting 'linear'. Did you mean",
    "--recipe dmo": "no run of recipe 'dmo'. Did you mean 'demo'?",
    "--status finishd": "no status 'finishd'. Did you mean 'finished'?",
    "--tag bas": "no run with the tag 'bas'. Did you mean 'base'?",
}


@pytest.mark.parametrize("words", REFUSED)
def test_a_name_that_there_is_not_is_refused_with_the_nearest(words: str, obowlab: Obowlab) -> None:
    run("demo", linear=30.0).add_labels({"obowlab.tag.base": "yes"})
    code, out, err = obowlab("runs", "list", *words.split())
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert REFUSED[words] in err


def test_comparisons_of_every_kind_of_value() -> None:
    values = {"flag": True, "one": 1, "open": None, "word": "obow", "many": ["a", "b"]}
    true = ("flag=true", "one=1", "one=1.0", "one<=1", "open=all", "word=obow", 'many=["a", "b"]', "word!=moco", "one!=2")
    false = ("flag=1", "one=true", "one>1", "word>1", "open>0", "none=1", "none!=1", 'many=["a"]', "word=1")
    assert [typed for typed in true if not Comparison.parse(typed).holds(values)] == []
    assert [typed for typed in false if Comparison.parse(typed).holds(values)] == []


def test_results_on_other_data_do_not_count(obowlab: Obowlab) -> None:
    folder = run("demo", linear=30.0)
    folder.add_result({**result("linear", "student", 99.0), "data_hash": "9" * 64, "details": {"dataset": "birds"}})
    (entry,) = select(ROOT, where=["linear_top1<40"])
    assert entry.measured["linear_top1"]["value"] == 30.0
    assert "99" not in obowlab("runs", "list")[1]


def test_a_damaged_result_hides_no_run(obowlab: Obowlab) -> None:
    broken, whole = run("demo", linear=30.0), run("demo-full", linear=40.0)
    next((broken.path / "results").iterdir()).write_text("{")
    code, out, err = obowlab("runs", "list")
    assert code == 0
    assert err.startswith("Warning: ")
    assert "is damaged" in err
    assert "40.0" in out
    assert {broken.run_id, whole.run_id} <= set(out.split())


# --------------------------------------------------------------------------------------------------------------- compare


def test_compare_pairs_what_was_asked_alike() -> None:
    one, other = run("demo"), run("demo", seed=1, method__kappa=8)
    rng = np.random.default_rng(0)
    answers = [rng.integers(0, 5, size=50).tolist() for _ in range(2)]
    for folder, correct in zip((one, other), answers, strict=True):
        filed = result("linear", "student", 25.0 * float(np.mean(correct)))
        filed["measurements"][0] |= {"count": 50, "samples": pack(correct, of=4)}
        folder.add_result(filed)
        folder.add_result({**result("knn", "student", 10.0 + folder.info.seed), "data_hash": str(folder.info.seed)})
        with folder.metric_log() as log:
            log.append(10, {"loss": 3.0 - folder.info.seed})
    comparison = compare_runs(one, other)
    assert comparison.settings == [("method.kappa", "5.0", "8.0")]
    # Two results of one millisecond stand in either order.
    paired, apart = sorted(comparison.results, key=lambda each: each.metric, reverse=True)
    differences = 25.0 * (np.array(answers[1]) - np.array(answers[0]))
    error = differences.std(ddof=1) / np.sqrt(50)
    assert paired.paired
    assert paired.difference == pytest.approx(differences.mean())
    assert paired.interval == pytest.approx(2.0095752371 * error)  # Student's quantile of 49 degrees of freedom
    assert (apart.paired, apart.difference, apart.interval) == (False, 1.0, pytest.approx(np.hypot(0.5, 0.5)))
    assert comparison.metrics == [("step", 10.0, 10.0), ("loss", 3.0, 2.0)]
    assert ("seed", "0", "1") in comparison.facts


def test_compare_prints_and_gives_json(obowlab: Obowlab) -> None:
    one, other = run("demo", linear=30.0), run("demo-full", linear=32.5)
    other.append_attempt({"commit": "a" * 40, "data_hash": "d" * 64, "cpu_model": "Fast"})
    code, out, err = obowlab("runs", "compare", "demo", "demo-full")
    assert (code, err) == (0, "")
    assert [f"A  {one.run_id}", f"B  {other.run_id}"] == out.splitlines()[:2]
    lines = [line.split() for line in out.splitlines()]
    assert ["views.num_crops", "1", "2"] in lines
    row = next(line for line in lines if line[:1] == ["linear_top1"])
    assert row == ["linear_top1", "student", "synthetic", "30.00", "±", "0.50", "32.50", "±", "0.50", "+0.00", "±", "0.00"]
    assert ["commit", "–", "a" * 12] in lines
    values = json.loads(obowlab("runs", "compare", "demo", "demo-full", "--json")[1])
    assert values["runs"] == [one.run_id, other.run_id]
    assert values["facts"]["data_hash"] == ["–", "d" * 64]
    assert obowlab("runs", "compare", "demo", "dmo-full")[0] == 2


# ------------------------------------------------------------------------------------------------------------------ tags


def test_tags_are_in_the_folder_and_change_nothing_of_the_run(obowlab: Obowlab) -> None:
    folder = run("demo")
    folder.add_labels({"obowlab.table": "table3"})
    before = folder.path.joinpath("run.json").read_bytes()
    assert obowlab("runs", "tag", "demo", "keep", "base-1.0") == (0, f"{folder.run_id}: base-1.0, keep\n", "")
    assert obowlab("runs", "tag", "demo", "keep") == (0, f"{folder.run_id}: base-1.0, keep\n", "")
    assert folder.path.joinpath("run.json").read_bytes() == before
    _, out, _ = obowlab("runs", "list")
    assert out.splitlines()[1].endswith("base-1.0, keep")
    assert "tags     base-1.0, keep" in obowlab("runs", "show", "demo")[1]
    assert obowlab("runs", "tag", "demo", "keep", "base-1.0", "--remove") == (0, f"{folder.run_id}: no tags\n", "")
    assert folder.labels() == {"obowlab.table": "table3"}
    for words, said in ((["two words"], "letters, digits"), (["nothing", "--remove"], "has no tag 'nothing'")):
        code, _, err = obowlab("runs", "tag", "demo", *words)
        assert (code, said in err) == (2, True)
    bare = run("demo", seed=1)
    assert obowlab("runs", "tag", "demo-s1", "x")[0] == obowlab("runs", "tag", "demo-s1", "x", "--remove")[0] == 0
    assert not (bare.path / "labels.json").exists()


# ----------------------------------------------------------------------------------------------------------------- trash


def test_a_deleted_run_is_nowhere_until_it_is_restored(obowlab: Obowlab, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, kept = run("demo", linear=30.0), run("demo-full")
    everything = contents(folder.path)
    code, _, err = obowlab("runs", "delete", "demo")
    assert (code, "--yes" in err) == (2, True)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("click.confirm", lambda question, **how: False)
    assert obowlab("runs", "delete", "demo")[:2] == (1, "Nothing was deleted.\n")
    monkeypatch.setattr("click.confirm", lambda question, **how: folder.run_id in question)
    code, out, _ = obowlab("runs", "delete", "demo")
    assert (code, f"obowlab runs restore {folder.run_id}" in out) == (0, True)
    assert [each.info.run_id for each in list_runs(ROOT)] == [kept.run_id]
    assert set(store_records(ROOT)) == {kept.info.fingerprint}
    assert folder.run_id not in obowlab("jobs", "--all")[1]
    assert "is in the trash already" in obowlab("runs", "delete", "demo", "--yes")[1]
    (row,) = json.loads(obowlab("runs", "trash", "--json")[1])
    assert (row["run_id"], row["deleted"]) == (folder.run_id, True)
    assert obowlab("runs", "restore", "demo") == (0, f"{folder.run_id} is back.\n", "")
    ours = {name: facts for name, facts in contents(folder.path).items() if not name.endswith(("lock", "mirror.json"))}
    assert ours == everything
    assert obowlab("runs", "trash")[1].startswith("The trash of ")
    assert "Did you mean" not in obowlab("runs", "restore", "demo")[2]


def test_deleting_takes_all_or_nothing_of_what_is_named(obowlab: Obowlab) -> None:
    full = (run("demo"), run("demo-full"))[1]
    before = contents(ROOT)
    assert f"`obowlab runs delete {full.run_id}`" in obowlab("runs", "delete", "demo-f", "--yes")[2]
    code, _, err = obowlab("runs", "delete", "demo", "dem-full", "--yes")
    assert (code, "Did you mean 'demo-full'?" in err) == (2, True)
    assert contents(ROOT) == before
    assert obowlab("runs", "delete", "demo", "demo", "demo-full", "--yes", "--dry-run")[1].count("Would move") == 2
    assert contents(ROOT) == before


def test_deleting_a_teacher_names_the_run_that_needs_it(obowlab: Obowlab) -> None:
    *earlier, last = load_recipe("demo-bownet").stages()
    teacher, other = (RunFolder.create(stage, seed=0, runs_root=ROOT) for stage in reversed(earlier))
    student = RunFolder.create(last, seed=0, runs_root=ROOT)
    other.set_state(status="finished")
    _, _, err = obowlab("runs", "delete", teacher.run_id, "--yes")
    assert err == f"Note: {student.run_id} is not finished and reads {teacher.run_id}, its teacher, which it would train again.\n"
    student.set_state(status="finished")
    assert obowlab("runs", "delete", other.run_id, "--yes")[2] == ""


def test_what_is_trained_or_lies_elsewhere_is_not_deleted(obowlab: Obowlab, tmp_path: Path) -> None:
    folder = run("demo")
    with folder.lock():
        code, _, err = obowlab("runs", "delete", "demo", "--yes")
    assert (code, "wait for it or stop it" in err) == (2, True)
    folder.set_state(status="running", pid=7, host="another")
    code, _, err = obowlab("runs", "delete", "demo", "--yes")
    assert (code, f"obowlab jobs cancel {folder.run_id}" in err) == (2, True)
    folder.set_state(status="finished")
    code, _, err = obowlab("runs", "delete", str(folder.path.absolute()), "--runs-root", str(tmp_path / "other"), "--yes")
    assert (code, "--runs-root" in err) == (2, True)
    elsewhere = tmp_path / "elsewhere"
    folder.path.rename(elsewhere)
    folder.path.symlink_to(elsewhere)
    code, _, err = obowlab("runs", "delete", "demo", "--yes")
    assert (code, "is a link" in err) == (2, True)
    folder.path.unlink()
    elsewhere.rename(folder.path)
    (tmp_path / "place").mkdir()
    (ROOT / TRASH).symlink_to(tmp_path / "place")
    code, _, err = obowlab("runs", "delete", "demo", "--yes")
    assert (code, "is a link to another place" in err) == (2, True)
    assert folder.state.status == "finished"
    assert not any((tmp_path / "place").iterdir())


def test_what_a_job_of_the_cluster_waits_for_is_not_deleted(obowlab: Obowlab, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run("demo", status="created")
    job = SlurmJob(id="77", request=JobRequest(arguments=(), runs=(folder.run_id,), what=""), submitted_at=0.0, folder=ROOT)
    monkeypatch.setattr("obowlab.launch.slurm.submitted_jobs", lambda root: [job])
    monkeypatch.setattr("obowlab.launch.slurm.states", lambda jobs: {"77": None})
    code, _, err = obowlab("runs", "delete", "demo", "--yes")
    assert (code, "`obowlab jobs cancel 77` first" in err) == (2, True)
    assert folder.path.is_dir()


def test_emptying_removes_links_and_not_what_they_name(obowlab: Obowlab, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "one.png").write_bytes(b"one")
    folder = run("demo")
    (folder.path / "link").symlink_to(tmp_path / "images")
    (folder.path / "file").symlink_to(tmp_path / "images" / "one.png")
    assert obowlab("runs", "delete", "demo", "--yes")[0] == 0
    other = put_aside(run("demo-full"))  # as --fresh does
    code, _, err = obowlab("runs", "trash", "--empty")
    assert (code, "--yes" in err, len(trashed_runs(ROOT))) == (2, True, 2)
    assert "Would remove 1 run(s)" in obowlab("runs", "trash", "demo", "--empty", "--dry-run")[1]
    assert obowlab("runs", "trash", "demo", "--empty", "--yes")[1].startswith("Removed 1 run(s) for good, ")
    assert list((ROOT / TRASH).iterdir()) == [other]
    assert (tmp_path / "images" / "one.png").read_bytes() == b"one"
    assert "by --fresh" in obowlab("runs", "trash")[1]
    assert "no run 'dem'" not in obowlab("runs", "restore", "dem")[2]


def test_a_run_comes_back_only_where_there_is_room(obowlab: Obowlab) -> None:
    old = run("demo", linear=20.0)
    put_aside(old)
    new = run("demo", linear=30.0)
    code, _, err = obowlab("runs", "restore", "demo")
    assert (code, f"`obowlab runs delete {new.run_id}` makes room" in err) == (2, True)
    assert obowlab("runs", "delete", "demo", "--yes")[0] == 0
    latest, first = find_trashed("demo", runs_root=ROOT)
    assert latest.was_deleted
    assert not first.was_deleted
    assert obowlab("runs", "restore", first.path.name)[0] == 0
    assert old.results()[0]["measurements"][0]["value"] == 20.0


def test_a_removal_that_was_killed_is_finished_by_the_next_and_never_comes_back(tmp_path: Path) -> None:
    program = (
        "import os, shutil, signal, sys\n"
        "from pathlib import Path\n"
        "shutil.rmtree = lambda path: os.kill(os.getpid(), signal.SIGKILL)\n"
        "from obowlab.runs.trash import remove_for_good, trashed_runs\n"
        "remove_for_good(trashed_runs(Path('runs')), runs_root=Path('runs'))\n"
    )
    put_aside(run("demo"), deleted=True)
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -signal.SIGKILL
    assert trashed_runs(ROOT) == []
    assert len(list((ROOT / TRASH).iterdir())) == 1
    remove_for_good([], runs_root=ROOT)
    assert list((ROOT / TRASH).iterdir()) == []


def test_what_is_no_run_in_the_trash_stays_there(obowlab: Obowlab) -> None:
    (ROOT / TRASH / "notes").mkdir(parents=True)
    (ROOT / TRASH / "file.txt").write_text("mine")
    put_aside(run("demo"), deleted=True)
    (trashed,) = trashed_runs(ROOT)
    (trashed.path / "run.json").unlink()
    code, _, err = obowlab("runs", "restore", "demo")
    assert (code, "no run.json" in err) == (2, True)
    assert obowlab("runs", "trash", "--empty", "--yes")[0] == 0
    assert sorted(path.name for path in (ROOT / TRASH).iterdir()) == ["file.txt", "notes"]


def test_sync_finishes_what_a_killed_delete_left(obowlab: Obowlab) -> None:
    from obowlab.tracking.mirror import Mirror
    from obowlab.tracking.outbox import Sent

    folder = run("demo")
    Mirror(folder).outbox.save(Sent(run_id="1234"))
    path = put_aside(folder, deleted=True)  # killed here
    assert f"Would send 1 values, results, files and facts of run '{folder.run_id}'" in obowlab("runs", "sync", "--dry-run")[1]
    assert obowlab("runs", "sync")[:2] == (0, f"{folder.run_id}: 1 sent\n")  # there is no store: nothing to take away
    assert Mirror(RunFolder.open(path)).pending() == 0
    assert "Would send" not in obowlab("runs", "sync", "--dry-run")[1]


def test_emptying_keeps_what_mlflow_could_not_be_told(obowlab: Obowlab, monkeypatch: pytest.MonkeyPatch) -> None:
    from obowlab.tracking.mirror import Mirror, SyncReport
    from obowlab.tracking.outbox import Sent

    Mirror(run("demo")).outbox.save(Sent(run_id="1234"))
    put_aside(RunFolder.find("demo", runs_root=ROOT), deleted=True)
    put_aside(run("demo-full"), deleted=True)
    with monkeypatch.context() as patch:
        patch.setattr(Mirror, "sync", lambda self, timeout_s: SyncReport(sent=0, pending=1, error="no answer"))
        code, out, err = obowlab("runs", "trash", "--empty", "--yes")
    assert code == 1
    assert out.startswith("Removed 1 run(s) for good")
    assert "Kept 1 that MLflow still shows" in out
    assert "no answer" in err
    assert [each.run_id[:6] for each in trashed_runs(ROOT)] == ["demo-s"]
    assert obowlab("runs", "trash", "--empty", "--yes")[0] == 0
    assert trashed_runs(ROOT) == []


def test_machine_of_a_deleted_run_names_the_store_it_came_from() -> None:
    from obowlab.tracking.mirror import Mirror

    folder = run("demo")
    before = Mirror(folder, tracking_uri=Machine().tracking_uri).uri
    path = put_aside(folder, deleted=True)
    assert Mirror(RunFolder.open(path)).uri == before
    with pytest.raises(UserError):
        RunFolder.find("demo", runs_root=ROOT)
