"""After the last training step: save the encoder, make the model that MLflow registers, evaluate it."""

from __future__ import annotations

from itertools import groupby
from operator import itemgetter

import torch

from obowlab.data.datasets import open_split
from obowlab.data.protocol_needs import left_out_lines
from obowlab.errors import UserError
from obowlab.evaluation import evaluate
from obowlab.methods import ResNet
from obowlab.runs.info import ENCODER_FILE
from obowlab.runs.results import not_measured
from obowlab.tracking.model import save_encoder_model
from obowlab.training.context import RunContext
from obowlab.training.loop import build, set_up_device, train
from obowlab.weights.encoder_file import read_encoder, save_encoder
from obowlab.weights.export import plain_network

MODEL_FOLDER = "model"
EXAMPLE_SIZE = 64
"""The side of the images that the model keeps as an example, in pixels."""


def encoder_of(run: RunContext) -> ResNet | None:
    """Train a run to its end and return its encoder; of one that is trained already, the encoder that was kept, on rank 0 alone.

    Raises:
        Interrupted, OtherRankFailed, UserError: as `train`.
    """
    kept = run.world.on_main(lambda: kept_encoder(run))
    is_kept = run.world.all_gather(torch.tensor([int(kept is not None)], device=run.world.device)).any()
    return kept if is_kept else train(run).encoder


def kept_encoder(run: RunContext) -> ResNet | None:
    """Return the encoder that an earlier start kept, as training leaves it; None while there is none that can be read."""
    path = run.folder.path / ENCODER_FILE
    if not path.is_file():
        return None
    try:
        encoder = read_encoder(path).model
    except UserError as error:
        run.reporter.say(f"Warning: {error} It is made again from the checkpoint.")
        return None
    set_up_device(run)
    run.reporter.say(f"{run.folder.run_id} is trained; measuring what is missing.")
    layout = torch.channels_last if run.machine.channels_last else torch.contiguous_format
    return encoder.to(run.world.device).to(memory_format=layout)


def keep(run: RunContext, *, encoder: ResNet) -> None:
    """Save the encoder of a trained run, and the model that MLflow registers, if an earlier start did not.

    From the first of them on, the run is trained, whatever becomes of its evaluation.
    """
    run.stop.act_at_once()
    folder, recipe = run.folder, run.recipe
    info = save_encoder(
        encoder, path=folder.path / ENCODER_FILE, recipe=recipe, fingerprint=folder.info.fingerprint, source=folder.run_id
    )
    model_path = folder.path / MODEL_FOLDER
    if recipe.backbone.padding != "torchvision":
        run.reporter.say(
            f"No model version in MLflow: torchvision has no ResNet with padding '{recipe.backbone.padding}'; "
            f"obowlab weights export {folder.run_id} --out FOLDER writes one with its own module."
        )
    elif not model_path.exists():
        shown = {"resize": info.original_resize, "size": info.original_size, "mean": list(info.mean), "std": list(info.std)}
        about = {"obowlab.run_id": folder.run_id, "obowlab.fingerprint": folder.info.fingerprint, "obowlab.preprocessing": shown}
        side = min(info.original_size, EXAMPLE_SIZE)
        save_encoder_model(
            plain_network(encoder, info=info), path=model_path, example=torch.zeros(2, 3, side, side), metadata=about
        )


def measure(run: RunContext, *, encoder: ResNet) -> None:
    """Run the recipe's protocols that are missing, one by one, and save each result at once.

    Those that the images cannot carry are left out, with a line that says so.

    Raises:
        Interrupted: a signal came.
        UserError: some could not be measured; the others were.
    """
    recipe, machine = run.recipe, run.machine
    missing = not_measured(recipe, results=run.folder.results())
    problems = []
    if missing:
        for line in left_out_lines({name: why for name, why in run.left_out.items() if name in recipe.evaluation.protocols}):
            run.reporter.say(line)
    for subject, names in groupby(missing, key=itemgetter(0)):
        measured = encoder
        if subject == "random":
            split = open_split(recipe.data.dataset, "train", data_root=machine.data_root, runs_root=machine.runs_root)
            measured = build(run, split=split, total_steps=1).encoder
        for _, protocol in names:
            if protocol in run.left_out:
                continue
            try:
                measure_one(run, encoder=measured, subject=subject, protocol=protocol)
            except UserError as error:
                problems.append(f"{subject}, {protocol}: {error}")
    if problems:
        rest = "The run is trained: the same command measures what is missing, also with other evaluation settings."
        raise UserError(" ".join([*problems, rest]))


def measure_one(run: RunContext, *, encoder: ResNet, subject: str, protocol: str) -> None:
    """Run a protocol on an encoder and save its result."""
    results = evaluate(
        encoder,
        recipe=run.recipe,
        machine=run.machine,
        subject=subject,
        cache_dir=run.machine.runs_root / ".features",
        protocols=(protocol,),
        device=run.world.device,
        report=run.reporter.say,
    )
    for result in results:
        run.folder.add_result(result.to_json())
