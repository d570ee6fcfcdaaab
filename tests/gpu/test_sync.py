"""The host does not wait for the GPU within a step: torch says where it does.

It is blind to collectives and to copies from ordinary memory that are called non-blocking.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from obowlab.config import Machine, Views
from obowlab.training import loop
from obowlab.training.context import RunContext
from obowlab.training.distributed import join
from obowlab.training.reporter import Reporter
from obowlab.training.signals import StopRequest
from obowlab.views.photometric import render
from tests.gpu import steps
from tests.gpu.precision import precision
from tests.runs import create, small_recipe
from tests.test_photometric import batch_of

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
WARM_UP = 3
"""Steps that may wait: libraries are loaded, kernels chosen, memory is taken."""


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_waiting_is_noticed() -> None:
    with no_waiting(), pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones(1, device=CUDA).item()


@pytest.mark.parametrize("number", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", steps.ROUNDED)  # a detector waits for the numbers of its regions
def test_forward_backward_and_update_do_not_wait(name: str, number: str) -> None:
    method, optimizer = steps.build(name, device=CUDA, dtype=torch.float32)
    batches = [steps.draw_batch(step, method, device=CUDA, dtype=torch.float32) for step in range(WARM_UP + 2)]

    def step(batch: Any) -> None:
        with precision(number, device=CUDA):
            output = method(batch)
        optimizer.zero_grad(set_to_none=True)
        output.loss.backward()
        optimizer.step()

    for batch in batches[:WARM_UP]:
        step(batch)
    with no_waiting():
        for batch in batches[WARM_UP:]:
            step(batch)
    assert all(torch.isfinite(parameter).all() for parameter in method.parameters())


def test_rendering_does_not_wait() -> None:
    views = Views(
        num_crops=2, num_patches=5, original_size=96, original_resize=104, crop_size=64, patch_size=32, patch_source_size=104
    )
    batch = batch_of(8, views)
    pinned = {name: getattr(batch, name).pin_memory() for name in ("original", "crops", "patch_source", "numbers")}
    batch = type(batch)(**{**vars(batch), **pinned})
    first = render(batch, batch.numbers.on(CUDA)[0], device=CUDA)
    with no_waiting():
        again = render(batch, batch.numbers.on(CUDA)[0], device=CUDA)
    assert torch.equal(first.original, again.original)


def test_a_step_of_the_training_loop_does_not_wait(tmp_path: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole run in this process, with every step but the first ones under torch's eyes; saving and logging may wait."""
    watched = []
    original = loop.Trainer.train_step

    def train_step(self: Any, *arguments: Any, **options: Any) -> Any:
        if self.step < WARM_UP:
            return original(self, *arguments, **options)
        watched.append(self.step)
        with no_waiting():
            return original(self, *arguments, **options)

    render = loop.Trainer.render

    def render_watched(self: Any, pixels: Any) -> Any:
        with no_waiting() if self.step > WARM_UP else nullcontext():
            return render(self, pixels)

    monkeypatch.setattr(loop.Trainer, "train_step", train_step)
    monkeypatch.setattr(loop.Trainer, "render", render_watched)
    machine = Machine(data_root=data_root, runs_root=tmp_path / "runs", device="cuda", loader="torch", workers=0)
    folder = create(small_recipe(tmp_path, dataset="small", epochs=1), machine=machine, seed=3)
    with join(machine) as world:
        loop.train(RunContext(folder, machine=machine, world=world, reporter=Reporter(None), stop=StopRequest()))
    assert len(watched) >= 3
