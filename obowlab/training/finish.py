"""What follows the last training step: keep the encoder, measure it, make the model that the tracker registers."""

from __future__ import annotations

import torch
from torch import nn

from obowlab.config import Machine, Recipe
from obowlab.data.datasets import open_split
from obowlab.evaluation import evaluate
from obowlab.methods import Method
from obowlab.track.folder import RunFolder
from obowlab.track.mirror import save_encoder_model
from obowlab.training.distributed import World
from obowlab.training.loop import StopRequest, build
from obowlab.training.progress import Reporter
from obowlab.training.weights import save_encoder

ENCODER_FILE = "encoder.safetensors"
MODEL_FOLDER = "model"


def finish(
    folder: RunFolder,
    *,
    method: Method,
    recipe: Recipe,
    seed: int,
    machine: Machine,
    world: World,
    reporter: Reporter,
    stop: StopRequest,
) -> None:
    """Save and measure the encoder of a trained method; what is already there is not done again."""
    stop.act_at_once()
    encoder = method.encoder
    save_encoder(encoder, path=folder.path / ENCODER_FILE, recipe=recipe, fingerprint=folder.info.fingerprint, source=folder.run_id)
    measure(folder, encoder=encoder, subject="student", recipe=recipe, machine=machine, world=world, reporter=reporter)
    if recipe.evaluation.random_baseline:
        split = open_split(recipe.data.dataset, "train", data_root=machine.data_root)
        untrained = build(recipe, split=split, seed=seed, total_steps=1, world=world)
        measure(folder, encoder=untrained.encoder, subject="random", recipe=recipe, machine=machine, world=world, reporter=reporter)
    model_path = folder.path / MODEL_FOLDER
    if not model_path.exists():
        size = recipe.views.original_size
        save_encoder_model(encoder, path=model_path, example=torch.zeros(2, 3, size, size))


def measure(folder: RunFolder, *, encoder: nn.Module, subject: str, recipe: Recipe, machine: Machine, world: World, reporter: Reporter) -> None:
    """Run the recipe's protocols on an encoder, one by one, and file every result as soon as it is there."""
    done = {(result["subject"], result["protocol"]) for result in folder.results()}
    for protocol in recipe.evaluation.protocols:
        if (subject, protocol) in done:
            continue
        results = evaluate(
            encoder,
            recipe=recipe,
            machine=machine,
            subject=subject,
            cache_dir=machine.runs_root / "features",
            protocols=(protocol,),
            device=world.device,
            report=reporter.say,
        )
        for result in results:
            folder.add_result(result.to_json())
