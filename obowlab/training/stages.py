"""Before the first step of a stage: find the encoder it begins with, let the method prepare."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from obowlab.config import Detector, Supervised
from obowlab.data.datasets import Split, trained_on
from obowlab.errors import UserError
from obowlab.methods import Method, Preparation, ResNet
from obowlab.randomness import Stream, uniforms
from obowlab.runs.info import ENCODER_FILE
from obowlab.runs.lineage import find_run
from obowlab.training.context import RunContext
from obowlab.views.loaders import centre_loader, num_workers
from obowlab.views.photometric import normalise
from obowlab.weights.encoder_file import read_encoder
from obowlab.weights.kept import kept_weights

BATCH_SIZE = 128


@dataclass(frozen=True)
class Teacher:
    """The encoder of the stage before, or the one that the method's settings name.

    Attributes:
        run_id: of the run that trained it, or what is known of where its weights are from.
        encoder: in evaluation mode, on the CPU.
        weights_hash: of the encoder.
    """

    run_id: str
    encoder: ResNet
    weights_hash: str


def find_teacher(run: RunContext, *, runs_root: Path) -> Teacher | None:
    """Load the encoder that a run begins with; None for one that begins with the weights of its seed.

    It is that of the stage before, from the run with its fingerprint in a run store, or the one whose hash the settings have.

    Raises:
        UserError: there is no such run, it has no encoder yet, or not the one that this run began with.
    """
    recipe, folder = run.recipe.teacher, run.folder
    if isinstance(run.recipe.method, Supervised | Detector) and run.recipe.method.weights:
        encoder = kept_weights(run.recipe.method.weights, backbone=run.recipe.backbone, runs_root=runs_root)
        return Teacher(run_id=encoder.info.source, encoder=encoder.model, weights_hash=encoder.info.weights_hash)
    if recipe is None:
        return None
    fingerprint = recipe.fingerprint(seed=run.seed)
    found = find_run(fingerprint, runs_root=runs_root)
    if found is None or not (found.path / ENCODER_FILE).is_file():
        lack = "is not there" if found is None else f"({found.run_id}) has no encoder yet"
        raise UserError(
            f"{folder.run_id} learns from the stage before it (fingerprint {fingerprint[:8]}), whose run {lack}: "
            f"train it with 'obowlab run', which does one stage after the other, or copy its folder into {runs_root}."
        )
    encoder = read_encoder(found.path / ENCODER_FILE)
    before = folder.facts().get("teacher_weights")
    if before not in (None, encoder.info.weights_hash):
        raise UserError(
            f"The encoder in {found.path} is not the one that {folder.run_id} began with (hash {encoder.info.weights_hash[:12]}, "
            f"was {str(before)[:12]}): put that one back, or start over with --fresh."
        )
    return Teacher(run_id=found.run_id, encoder=encoder.model, weights_hash=encoder.info.weights_hash)


def prepare(run: RunContext, *, method: Method[Any], teacher: Teacher | None, split: Split) -> bool:
    """Let the method prepare, and return whether there was anything to do.

    Raises:
        Interrupted: SIGINT or SIGTERM came; nothing is saved, the next start prepares again.
        UserError: as `Method.prepare`.
    """
    recipe, machine = run.recipe, run.machine
    chosen = trained_on(split, recipe.data)

    def originals(numbers: Tensor) -> Iterator[Tensor]:
        loader = centre_loader(
            split,
            indices=chosen[numbers.numpy()],
            views=recipe.views,
            batch_size=BATCH_SIZE,
            backend=machine.loader,
            workers=num_workers(machine),
            pin=run.world.device.type == "cuda",
        )
        for _, images in loader:
            run.stop.check()
            yield normalise(images, device=run.world.device)

    def draw(numbers: Tensor, count: int, lane: int) -> Tensor:
        indices = chosen[numbers.numpy()]
        return torch.from_numpy(
            uniforms(seed=run.seed, epoch=0, indices=indices, stream=Stream.VOCABULARY, count=count, lane=lane)
        )

    def report(line: str) -> None:
        run.stop.check()
        run.reporter.say(line)

    # Several processes look for a signal where none waits for another in a collective.
    with run.stop.acting_at_once() if run.world.world_size == 1 else nullcontext():
        return method.prepare(
            Preparation(
                teacher=None if teacher is None else teacher.encoder,
                num_images=len(chosen),
                originals=originals,
                uniforms=draw,
                seed=run.seed,
                report=report,
            )
        )
