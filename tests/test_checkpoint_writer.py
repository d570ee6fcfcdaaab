"""Checkpoints that a thread writes while training goes on, as on a GPU."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from obowlab.config import Machine
from obowlab.errors import UserError
from obowlab.training import checkpoint as checkpoints
from obowlab.training.__main__ import main
from tests.fork_server import Fork
from tests.runs import complete, create, differing_weights, quiet, small_recipe

CPU = torch.device("cpu")


def some_checkpoint(weight: torch.Tensor) -> checkpoints.Checkpoint:
    optimizer = {"state": {0: {"momentum_buffer": weight}}, "param_groups": [{"params": [0], "lr": 0.1}]}
    return checkpoints.Checkpoint(step=3, fingerprint="f", data_hash="d", method={"weight": weight}, optimizer=optimizer)


def test_it_is_of_the_moment_it_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save, begin = checkpoints.save, threading.Event()

    def slow(folder: Path, *, checkpoint: checkpoints.Checkpoint) -> None:
        begin.wait(10)
        save(folder, checkpoint=checkpoint)

    monkeypatch.setattr(checkpoints, "save", slow)
    writer = checkpoints.Writer(tmp_path, device=CPU, in_background=True)
    weight = torch.ones(3, 2, 4, 4).contiguous(memory_format=torch.channels_last)
    writer.write(some_checkpoint(weight))
    weight.mul_(7.0)  # training goes on
    assert not (tmp_path / checkpoints.CURRENT).exists()
    writer.check()
    begin.set()
    writer.finish()
    found, complaints = checkpoints.newest(tmp_path, fingerprint="f", map_location=CPU)
    assert found is not None
    assert complaints == []
    kept = found.optimizer["state"][0]["momentum_buffer"]
    for value in (found.method["weight"], kept):
        assert torch.equal(value, torch.ones(3, 2, 4, 4))
        assert value.is_contiguous(memory_format=torch.channels_last)
    assert found.optimizer["param_groups"] == [{"params": [0], "lr": 0.1}]


def poll(writer: checkpoints.Writer) -> None:
    for _ in range(1000):
        writer.check()
        time.sleep(0.01)


@pytest.mark.parametrize("ask", [checkpoints.Writer.finish, poll, lambda writer: writer.write(some_checkpoint(torch.ones(2)))])
def test_a_refusal_is_said_once_at_the_next_point_or_checkpoint(
    tmp_path: Path, ask: Callable[[checkpoints.Writer], object]
) -> None:
    writer = checkpoints.Writer(tmp_path / "gone", device=CPU, in_background=True)
    writer.write(some_checkpoint(torch.ones(2)))
    with pytest.raises(UserError, match="Cannot write the checkpoint"):
        ask(writer)
    writer.finish()


def train_with_a_thread(folder: str) -> int:
    checkpoints.Writer = partial(checkpoints.Writer, in_background=True)  # type: ignore[assignment, misc]
    return main([folder])


def test_a_run_is_killed_and_continues_to_the_bit(tmp_path: Path, data_root: Path) -> None:
    machine = Machine(data_root=data_root, runs_root=tmp_path / "one", device="cpu", loader="torch", workers=0)
    loaded = small_recipe(tmp_path, dataset="small", epochs=4)
    whole = complete(loaded, machine=machine)
    folder = create(
        loaded, machine=machine.model_copy(update={"runs_root": tmp_path / "two", "checkpoint_every_s": 0.001}), seed=3
    )
    for wait_s in (0.0, 0.1, 0.25, None):
        process = Fork(train_with_a_thread, str(folder.path), environment=quiet())
        until = time.monotonic() + 240
        while wait_s is not None and not (folder.path / checkpoints.CURRENT).exists() and time.monotonic() < until:
            time.sleep(0.005)
        if wait_s is not None:
            time.sleep(wait_s)
            process.kill()
        process.communicate(timeout=120)
        found, complaints = checkpoints.newest(folder.path, fingerprint=folder.info.fingerprint, map_location=CPU)
        assert found is not None
        assert complaints == []
    assert folder.state.status == "finished"
    assert differing_weights(whole, folder) == []


def test_a_checkpoint_of_another_device_leaves_how_the_optimiser_computes(tmp_path: Path) -> None:
    layer = torch.nn.Linear(2, 2)
    written, here = (torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, fused=fused) for fused in (None, True))
    layer(torch.ones(1, 2)).sum().backward()
    written.step()
    content = checkpoints.Checkpoint(
        step=1, fingerprint="f", data_hash="d", method=dict(layer.state_dict()), optimizer=written.state_dict()
    )
    assert checkpoints.restore(content, method=layer, optimizer=here) == 1
    assert here.param_groups[0]["fused"] is True
    assert len(here.state_dict()["state"]) == 2
