"""Number formats by name, and decisions that a GPU's host reads one step late; both on the CPU, where the same code runs."""

from __future__ import annotations

import functools
import math
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from obowlab.config import Machine
from obowlab.evaluation import evaluators
from obowlab.evaluation.knn import nearest_neighbours
from obowlab.launch.compute_command import environment_of
from obowlab.methods.obow import OBoW
from obowlab.precision import autocast, full_precision, loss_scaler, set_float32_mode
from obowlab.runs.folder import RunFolder
from obowlab.training import loop
from obowlab.training.__main__ import main
from obowlab.training.distributed import World
from obowlab.training.loop import Trainer
from obowlab.training.votes import Decision, Votes
from tests.runs import ask_to_stop_at, differing_weights, points, small_recipe, weights

CPU = torch.device("cpu")
ALONE = World(rank=0, world_size=1, device=CPU)


@pytest.fixture
def flags() -> Iterator[None]:
    """Put the process's flags back."""
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    yield
    torch.backends.cudnn.allow_tf32 = before[0]
    torch.set_float32_matmul_precision(before[1])


def prepared(root: Path, *, data_root: Path, overrides: tuple[str, ...] = ()) -> RunFolder:
    root.mkdir(exist_ok=True)
    machine = Machine(
        data_root=data_root, runs_root=root / "runs", device="cpu", loader="torch", workers=0, checkpoint_every_s=3600.0
    )
    loaded = small_recipe(root, dataset="small", epochs=2, overrides=("evaluation.protocols=[]", *overrides))
    folder = RunFolder.create(loaded, seed=0, runs_root=machine.runs_root)
    folder.write_machine(machine)
    return folder


@pytest.mark.parametrize(
    ("precision", "tf32", "products"),
    [
        ("float32", False, "highest"),
        ("tf32", True, "high"),
        ("bfloat16", False, "highest"),
        ("float16", False, "highest"),
    ],
)
def test_a_gpus_float32_is_what_the_recipe_says(precision: str, tf32: bool, products: str, flags: None) -> None:
    torch.backends.cudnn.allow_tf32 = not tf32
    set_float32_mode(precision)
    assert torch.backends.cudnn.allow_tf32 is tf32
    assert torch.get_float32_matmul_precision() == products
    with full_precision(CPU):
        assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == products


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("float32", torch.float32), ("tf32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)],
)
def test_layers_compute_in_the_precision_and_distances_do_not(precision: str, dtype: torch.dtype) -> None:
    layer = torch.nn.Linear(3, 2)
    with autocast(precision, device=CPU):
        assert layer(torch.ones(1, 3)).dtype == dtype
        with full_precision(CPU):
            assert layer(torch.ones(1, 3)).dtype == torch.float32
    assert loss_scaler(precision, device=CPU).is_enabled() == (precision == "float16")


def test_float16_learns_as_float32_does_and_continues_to_the_bit(
    tmp_path: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    single = prepared(tmp_path / "single", data_root=data_root)
    whole = prepared(tmp_path / "whole", data_root=data_root, overrides=("training.precision=float16",))
    assert main([str(single.path)]) == main([str(whole.path)]) == 0
    (_, expected), (_, found) = points(single)[0], points(whole)[0]
    assert found["loss"] == pytest.approx(expected["loss"], rel=0.02)
    norms = {run: [values["grad_norm"] for _, values in points(run)] for run in (single, whole)}
    usable = [norm for norm in norms[whole] if math.isfinite(norm)]
    assert 5 < len(usable) < len(norms[whole]), "steps whose gradients overflow are left out, and the scale falls"
    assert max(usable) == pytest.approx(max(norms[single]), rel=0.2), "the scale, 65536 at first, is taken out of what is logged"
    stopped = prepared(tmp_path / "stopped", data_root=data_root, overrides=("training.precision=float16",))
    ask_to_stop_at(7, monkeypatch)
    assert main([str(stopped.path)]) == 128 + signal.SIGTERM
    monkeypatch.undo()
    scaler = torch.load(stopped.path / "checkpoint.pt", weights_only=True)["scaler"]
    assert 1.0 < scaler["scale"] < 65536.0
    assert main([str(stopped.path)]) == 0
    assert [values["loss"] for _, values in points(stopped)] == [values["loss"] for _, values in points(whole)]
    assert not differing_weights(stopped, whole)


def test_evaluation_is_in_float32_whatever_training_ran_in(
    tmp_path: Path, data_root: Path, flags: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []

    def watched(*arguments: Any, **options: Any) -> Any:
        found.append(torch.get_float32_matmul_precision())
        return nearest_neighbours(*arguments, **options)

    monkeypatch.setattr(evaluators, "nearest_neighbours", watched)
    folder = prepared(
        tmp_path, data_root=data_root, overrides=('evaluation.protocols=["knn"]', "evaluation.knn.num_neighbours=3")
    )
    set_float32_mode("tf32")
    assert main([str(folder.path)]) == 0
    assert found == ["highest", "highest"], "the student's and the random network's"
    assert torch.get_float32_matmul_precision() == "high"


def test_deterministic_work_on_a_gpu_needs_a_setting_of_cublas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    assert environment_of(Machine(deterministic=True), token="", progress=False)["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert "CUBLAS_WORKSPACE_CONFIG" not in environment_of(Machine(), token="", progress=False)


# ----------------------------------------------------------------------------------------------------------------- votes


def cast(votes: Votes[int], step: int, *, loss: float = 1.0, save_due: bool = False, stopping: bool = False) -> Decision[int]:
    return votes.cast(torch.tensor(loss), save_due=save_due, stopping=stopping, place=step)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_cpu_decides_on_the_step_itself(bad: float) -> None:
    votes: Votes[int] = Votes(ALONE)
    assert cast(votes, 0) == Decision(False, False, False, 0)
    assert cast(votes, 1, save_due=True) == Decision(False, True, False, 1)
    assert cast(votes, 2, loss=bad, stopping=True) == Decision(True, False, True, 2)
    assert votes.settle() == Decision(), "nothing is on its way"


def test_a_gpu_decides_on_the_step_before() -> None:
    votes: Votes[int] = Votes(ALONE, late=True)
    assert cast(votes, 0, save_due=True) == Decision()
    assert cast(votes, 1, loss=float("nan")) == Decision(False, True, False, 0)
    assert cast(votes, 2) == Decision(True, False, False, 1)
    assert votes.settle() == Decision(False, False, False, 2)
    assert votes.settle() == Decision()


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "Votes", functools.partial(Votes, late=True))


def with_broken_step(monkeypatch: pytest.MonkeyPatch, *, number: int) -> None:
    forward = OBoW.forward

    def broken(self: OBoW, batch: object) -> object:
        output = forward(self, batch)  # type: ignore[arg-type]
        if batch.step == number:  # type: ignore[attr-defined]
            output.loss = output.loss * float("nan")
        return output

    monkeypatch.setattr(OBoW, "forward", broken)


@pytest.mark.parametrize("number", [0, 5, 13])
def test_a_broken_loss_that_is_noticed_late_is_in_no_checkpoint(
    number: int, tmp_path: Path, data_root: Path, late: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = prepared(tmp_path, data_root=data_root)
    with_broken_step(monkeypatch, number=number)
    assert main([str(folder.path)]) == 2
    assert folder.state.message.startswith(f"The loss is not finite at step {number} (epoch {number // 7}, training images ")
    assert not (folder.path / "checkpoint.pt").exists()
    monkeypatch.undo()
    assert main([str(folder.path)]) == 0
    assert all(torch.isfinite(value).all() for value in weights(folder).values())


def test_a_checkpoint_after_a_broken_step_is_refused(
    tmp_path: Path, data_root: Path, late: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = prepared(tmp_path, data_root=data_root)
    with_broken_step(monkeypatch, number=6)  # the vote for the checkpoint is counted at the broken step
    train_step = Trainer.train_step

    def saving_at_five(self: Trainer, *arguments: object, **keywords: object) -> tuple[bool, bool]:
        self.timer._saved = -1e9 if self.step == 5 else 1e9
        return train_step(self, *arguments, **keywords)  # type: ignore[arg-type]

    monkeypatch.setattr(Trainer, "train_step", saving_at_five)
    assert main([str(folder.path)]) == 2
    assert "not finite at step 6" in folder.state.message
    assert not (folder.path / "checkpoint.pt").exists()


def test_weights_that_are_not_finite_are_in_no_checkpoint_and_no_encoder(
    tmp_path: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gradient may be broken where the loss is not: at the last step no other loss tells."""
    folder = prepared(tmp_path, data_root=data_root)
    backward = Trainer.backward

    def broken(self: Trainer, loss: torch.Tensor) -> None:
        backward(self, loss)
        if self.step == self.total_steps - 1:
            next(iter(self.method.parameters())).grad.fill_(float("nan"))  # type: ignore[union-attr]

    monkeypatch.setattr(Trainer, "backward", broken)
    assert main([str(folder.path)]) == 2
    assert folder.state.message.startswith("The weights are not finite after step 14; there is no checkpoint yet.")
    assert not (folder.path / "checkpoint.pt").exists()
    assert not (folder.path / "encoder.safetensors").exists()


def test_a_run_that_stops_a_step_late_continues_to_the_bit(
    tmp_path: Path, data_root: Path, late: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, stopped = (prepared(tmp_path / name, data_root=data_root) for name in ("whole", "stopped"))
    assert main([str(whole.path)]) == 0
    ask_to_stop_at(7, monkeypatch)
    assert main([str(stopped.path)]) == 128 + signal.SIGTERM
    assert torch.load(stopped.path / "checkpoint.pt", weights_only=True)["step"] == 9
    monkeypatch.undo()
    assert main([str(stopped.path)]) == 0
    assert not differing_weights(stopped, whole)
