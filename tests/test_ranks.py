"""Nothing hangs: whatever goes wrong on one of two ranks ends both within seconds, with one sentence."""

from __future__ import annotations

import copy
import errno
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from obowlab.config import Backbone, Bownet, Machine, Recipe, Rotnet
from obowlab.errors import UserError
from obowlab.methods import BoWNet
from obowlab.methods.split_batchnorm import SplitBatchNorm2d
from obowlab.runs.folder import RunFolder
from obowlab.runs.locks import RunTakenError
from obowlab.runs.metric_log import MetricLog
from obowlab.training import checkpoint as checkpoints
from obowlab.training import distributed, loop
from obowlab.training import final_evaluation as final
from obowlab.training import online_evaluation as online
from obowlab.training.__main__ import main
from obowlab.training.context import RunContext
from obowlab.training.distributed import OtherRankFailed, World
from obowlab.training.signals import Interrupted
from obowlab.views.loaders import TrainLoader
from tests.contracts import small_preparation
from tests.fork_server import Fork, fork_all
from tests.processes import wait_until
from tests.runs import create, quiet, small_recipe

ENDS_WITHIN_S = 240.0
"""The shortest timeout of a collective that waits for a lost rank is longer: `patient` sees to that."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def two_ranks(folder: RunFolder, play: Callable[[str, str], int], fault: str) -> list[Fork]:
    """Start `play(folder, fault)` in two processes, as torchrun would."""
    variables = {
        **quiet(),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    variables["TORCH_CPP_LOG_LEVEL"] = "FATAL"
    return [
        Fork(patient, play, str(folder.path), fault, environment={**variables, "RANK": rank, "LOCAL_RANK": rank})
        for rank in ("0", "1")
    ]


def patient(play: Callable[[str, str], int], path: str, fault: str) -> int:
    """Be a rank that waits longer for the others at its end than a test does for it."""
    distributed.LEAVE_TIMEOUT = timedelta(minutes=10)
    return play(path, fault)


def end(ranks: list[Fork]) -> tuple[list[int | None], str]:
    """Wait for the end of both; return their exit codes and what they wrote."""
    try:
        said = "".join(rank.communicate(timeout=ENDS_WITHIN_S)[1].decode() for rank in ranks)
    finally:
        for rank in ranks:
            rank.kill()
    return [rank.returncode for rank in ranks], said


def raising(error: Exception) -> Callable[..., Any]:
    def fails(*_: Any, **__: Any) -> Any:
        raise error

    return fails


def full_disk(name: str = "some.file") -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)


def at_step(step: int, act: Callable[[loop.Trainer], object]) -> None:
    """Let something happen before a training step of this process."""
    original = loop.Trainer.train_step

    def train_step(self: loop.Trainer, *arguments: Any, **keywords: Any) -> tuple[bool, bool]:
        if self.step == step:
            act(self)
        return original(self, *arguments, **keywords)

    loop.Trainer.train_step = train_step  # type: ignore[method-assign]


def ends_early(self: TrainLoader, *, start_step: int = 0, **options: Any) -> Iterator[Any]:
    yield from batches(self, start_step=start_step + 5, **options)
    raise UserError("A loader process was killed.")


batches = TrainLoader.batches


def block_the_checkpoint(trainer: loop.Trainer) -> None:
    (trainer.run.folder.path / "checkpoint.pt.tmp").mkdir()


def touch_the_data(trainer: loop.Trainer) -> None:
    os.utime(trainer.split.path, (1, 1))


def damage_the_state(trainer: loop.Trainer) -> None:
    (trainer.run.folder.path / "state.json").write_text("{")


def patch(target: Any, name: str, replacement: Any) -> Callable[[], None]:
    return lambda: setattr(target, name, replacement)


NO_SPACE = "No space left on device"
FAULTS: dict[str, tuple[Callable[[], None], str]] = {
    "data set cannot be opened": (
        patch(loop, "open_split", raising(UserError("small.beton is damaged."))),
        "small.beton is damaged.",
    ),
    "no teacher": (patch(loop, "find_teacher", raising(UserError("No teacher."))), "No teacher."),
    "checkpoint cannot be read": (patch(checkpoints, "newest", raising(full_disk("checkpoint.pt"))), NO_SPACE),
    "checkpoint of another run": (patch(loop, "newest_checkpoint", raising(UserError("Not these images."))), "Not these images."),
    "checkpoint that others have not": (patch(loop, "newest_checkpoint", lambda run, **_: None), "found different checkpoints"),
    "weights do not fit": (patch(checkpoints, "restore", raising(UserError("They do not fit."))), "They do not fit."),
    "log cannot be opened": (
        patch(MetricLog, "__init__", raising(UserError("metrics.jsonl is damaged."))),
        "metrics.jsonl is damaged.",
    ),
    "attempt cannot be written": (patch(RunFolder, "append_attempt", raising(full_disk("attempts.jsonl"))), NO_SPACE),
    "loader dies": (patch(TrainLoader, "batches", ends_early), "A loader process was killed."),
    "metrics cannot be written": (patch(MetricLog, "append", raising(full_disk("metrics.jsonl"))), NO_SPACE),
    "disk is full": (patch(os, "fsync", raising(full_disk())), NO_SPACE),
    "checkpoint cannot be written": (lambda: at_step(9, block_the_checkpoint), "Cannot write the checkpoint"),
    "data changes": (lambda: at_step(9, touch_the_data), "was changed or replaced"),
    "state is damaged": (lambda: at_step(9, damage_the_state), "state.json is damaged"),
    "evaluation fails": (patch(final, "save_encoder", raising(full_disk("encoder.safetensors"))), NO_SPACE),
}
ON_RANK_1 = ("data set cannot be opened", "no teacher", "checkpoint cannot be read", "checkpoint of another run")
ON_RANK_1 += ("checkpoint that others have not", "weights do not fit", "loader dies")
"""What a rank that writes no files can meet."""

ALL = (*(f"0 {name}" for name in FAULTS), *(f"1 {name}" for name in ON_RANK_1))
ALWAYS = ("0 data set cannot be opened", "0 data changes", "0 checkpoint cannot be written", "0 evaluation fails")
ALWAYS += ("1 weights do not fit", "1 loader dies")
"""One of a kind, before the first step, in the steps, in saving and after them; `make test-all` plays the others too."""


def play(path: str, fault: str) -> int:
    """Be one rank of a run in which a fault happens on rank RANK: `RANK FAULT`."""
    torch.set_num_threads(1)
    rank, _, name = fault.partition(" ")
    if os.environ["RANK"] == rank:
        FAULTS[name][0]()
    return main([path])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, data_root: Path) -> RunFolder:
    """A run stopped after its first epoch."""
    folder = tmp_path_factory.mktemp("ranks")
    shutil.copytree(data_root, folder / "data")
    machine = Machine(data_root=folder / "data", runs_root=folder / "runs", device="cpu", loader="torch", workers=0, procs=2)
    overrides = ("evaluation.protocols=[]", "evaluation.random_baseline=false", "evaluation.every_epochs=1")
    run = create(small_recipe(folder, dataset="small", epochs=2, overrides=overrides), machine=machine, seed=3)
    ranks = two_ranks(run, stop_after_an_epoch, "")
    codes, said = end(ranks)
    assert (codes, run.state.status) == ([0, 0], "interrupted"), said
    return run


def stop_after_an_epoch(path: str, fault: str) -> int:
    """The signal reaches one rank, and both stop."""
    torch.set_num_threads(1)
    if os.environ["RANK"] == "1":
        at_step(6, lambda trainer: signal.raise_signal(signal.SIGTERM))
    return main([path])


def copy_of(run: RunFolder, place: Path) -> RunFolder:
    data_root = place / "data"
    shutil.copytree(run.machine.data_root, data_root)
    folder = RunFolder.open(Path(shutil.copytree(run.path, place / "runs" / run.run_id)))
    folder.write_machine(run.machine.model_copy(update={"data_root": data_root, "runs_root": place / "runs"}))
    folder.set_state(status="running")  # as the launcher does
    return folder


@pytest.mark.parametrize("fault", [pytest.param(each, marks=[] if each in ALWAYS else pytest.mark.long) for each in ALL])
def test_a_failure_of_one_rank_ends_both_with_one_sentence(fault: str, tmp_path: Path, trained: RunFolder) -> None:
    folder = copy_of(trained, tmp_path)
    codes, said = end(two_ranks(folder, play, fault))
    sentence = FAULTS[fault.partition(" ")[2]][1]
    (line,) = (line for line in said.splitlines() if "Error" in line)
    assert line.startswith("Error: ")
    assert sentence in line
    assert "Traceback" not in said
    assert codes == [0, 0], "torchrun would take it for a death, and the launcher start the group again"
    if fault not in ("0 state is damaged", "0 disk is full"):
        assert folder.state.status == "failed"  # of which the launcher makes exit code 2
        assert sentence in folder.state.message


# ----------------------------------------------------------------------------------------------------- what nobody expects


def crash(path: str, fault: str) -> int:
    """Meet, on rank 1, an error that nobody expects: while the others vote, or while they compute."""
    torch.set_num_threads(1)
    if os.environ["RANK"] == "1" and fault == "voting":
        loop.open_split = raising(ZeroDivisionError("unexpected"))
    elif os.environ["RANK"] == "1":
        at_step(9, raising(ZeroDivisionError("unexpected")))
    return main([path])


@pytest.mark.parametrize("others", ["voting", "computing"])
def test_an_error_that_nobody_expects_is_a_death_of_its_rank(others: str, tmp_path: Path, trained: RunFolder) -> None:
    """torchrun ends the others where gloo does not, and the launcher starts the group again."""
    folder = copy_of(trained, tmp_path)
    codes, said = end(two_ranks(folder, crash, others))
    assert codes == [1, 1]
    assert said.count("ZeroDivisionError: unexpected") == 1
    if others == "voting":
        assert said.count("Traceback") == 1
    assert "Error: " not in [line[:7] for line in said.splitlines()]
    assert folder.state.status == "running"


@pytest.mark.parametrize("name", ["machine.json", "state.json"])
def test_a_damaged_file_is_told_once_before_anything_begins(name: str, tmp_path: Path, trained: RunFolder) -> None:
    folder = copy_of(trained, tmp_path)
    (folder.path / name).write_text("{")
    codes, said = end(two_ranks(folder, play, ""))
    (line,) = said.splitlines()
    assert line.startswith(f"Error: {folder.path / name} is damaged")
    if name == "machine.json":
        assert codes == [0, 0]
        assert folder.state.status == "failed"


def test_a_run_that_is_taken_is_left_alone(tmp_path: Path, trained: RunFolder) -> None:
    folder = copy_of(trained, tmp_path)
    before = (folder.path / "state.json").read_bytes()
    with folder.lock():
        codes, said = end(two_ranks(folder, play, ""))
    (line,) = said.splitlines()
    assert "is being trained by process" in line
    assert codes == [2, 0]
    assert (folder.path / "state.json").read_bytes() == before


# ---------------------------------------------------------------------------------------------------------- long waiting


def wait_in(path: str, where: str) -> int:
    """Be a rank of a run whose rank 0 stays in `where` until a file `go` appears; waiting ranks lose patience after a second."""
    torch.set_num_threads(1)
    folder = Path(path)

    def stays(*_: Any, **__: Any) -> dict[str, float]:
        (folder / where).touch()
        wait_until((folder / "go").exists)
        return {"fewshot_1shot": 50.0}

    distributed.STEP_TIMEOUT = timedelta(seconds=1)
    if where == "measuring":
        online.few_shot = acting_at_once(stays)  # type: ignore[assignment]
    else:
        save_encoder = final.save_encoder

        def stays_and_saves(*arguments: Any, **keywords: Any) -> Any:
            stays()
            return save_encoder(*arguments, **keywords)

        final.save_encoder = stays_and_saves
        final.save_encoder_model = lambda *_, **__: None
    return main([path])


def acting_at_once(stays: Callable[..., dict[str, float]]) -> Callable[..., dict[str, float]]:
    def few_shot(run: RunContext, **_: Any) -> dict[str, float]:
        with run.stop.acting_at_once():
            return stays()

    return few_shot


def measuring_fails(path: str, _: str) -> int:
    torch.set_num_threads(1)
    if os.environ["RANK"] == "0":
        online.few_shot = raising(UserError("No images to measure on."))
    return main([path])


def test_a_measurement_that_fails_on_rank_0_costs_its_point_alone(tmp_path: Path, trained: RunFolder) -> None:
    folder = copy_of(trained, tmp_path)
    codes, said = end(two_ranks(folder, measuring_fails, ""))
    assert codes == [0, 0], said
    assert "Warning: epoch 1 is not measured, and training continues. No images to measure on." in " ".join(said.split())
    assert (folder.state.status, folder.metrics("online")) == ("finished", [])


def test_ranks_wait_for_a_measurement_longer_than_for_a_tensor(tmp_path: Path, trained: RunFolder) -> None:
    folder = copy_of(trained, tmp_path)
    ranks = two_ranks(folder, wait_in, "measuring")
    wait_until((folder.path / "measuring").exists)
    time.sleep(2.0)
    assert [rank.poll() for rank in ranks] == [None, None]
    for rank in ranks:
        rank.send_signal(signal.SIGTERM)
    codes, said = end(ranks)
    assert codes == [0, 0], said
    assert folder.state.status == "interrupted"
    assert "Traceback" not in said


def test_rank_0_evaluates_when_the_others_have_gone_and_a_signal_ends_that(tmp_path: Path, trained: RunFolder) -> None:
    folder = copy_of(trained, tmp_path)
    ranks = two_ranks(folder, wait_in, "evaluating")
    wait_until((folder.path / "evaluating").exists)
    wait_until(lambda: ranks[1].poll() is not None, timeout_s=240)
    assert ranks[0].poll() is None
    with pytest.raises(RunTakenError), folder.lock():
        pass
    ranks[0].send_signal(signal.SIGTERM)
    codes, said = end(ranks)
    assert codes == [0, 0], said
    assert folder.state.status == "interrupted"
    (folder.path / "go").touch()
    codes, said = end(two_ranks(folder, wait_in, "evaluating"))
    assert codes == [0, 0], said
    assert folder.state.status == "finished"


# ----------------------------------------------------------------------------------------------------- preparing a vocabulary


def prepares(rank: int, file: str) -> None:
    """Prepare a BoWNet whose images cannot be read on rank 1, or whose clustering stops there; write how each ended."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    world = World(rank=rank, world_size=2, device=torch.device("cpu"))
    backbone = Backbone(stem="small", width=4)
    settings = Bownet(num_words=20, border=0, kmeans_points=3)
    recipe = Recipe(method=settings, backbone=backbone, teacher=Recipe(method=Rotnet(), backbone=backbone))
    good = small_preparation(recipe, size=24)
    ends = []
    for fault in ("originals", "report"):
        broken = {fault: raising(Interrupted(15) if fault == "report" else full_disk("small.beton"))} if rank == 1 else {}
        method = BoWNet(settings, backbone=backbone, total_steps=10, seed=0, num_classes=None, comm=world)
        try:
            method.prepare(replace(good, **broken))
        except (Interrupted, OSError, OtherRankFailed) as error:
            ends.append(type(error).__name__)
    Path(f"{file}.{rank}").write_text(" ".join(ends))
    dist.destroy_process_group()


def test_a_failure_while_one_rank_prepares_ends_both(tmp_path: Path) -> None:
    fork_all(prepares, ranks=2, arguments=(str(tmp_path / "rendezvous"),))
    for rank in range(2):
        assert (tmp_path / f"rendezvous.{rank}").read_text() == "OSError Interrupted"


def test_a_network_that_knows_its_ranks_can_be_copied() -> None:
    """The model for MLflow is a copy; MoCo's batch norm holds the world, whose group can be neither copied nor pickled."""
    world = World(rank=0, world_size=2, device=torch.device("cpu"), votes=threading.Lock())  # type: ignore[arg-type]
    norm = SplitBatchNorm2d.like(torch.nn.BatchNorm2d(4), num_groups=2, comm=world)
    copied = copy.deepcopy(torch.nn.Sequential(norm))
    assert copied[0].comm is world
    assert copied[0].weight is not norm.weight
