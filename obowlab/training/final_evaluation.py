"""What follows the last training step: keep the encoder, measure it, make the model that the tracker registers."""

from __future__ import annotations

from typing import Any

import torch

from obowlab.data.datasets import open_split
from obowlab.evaluation import evaluate
from obowlab.methods import Method, ResNet
from obowlab.tracking.mirror import save_encoder_model
from obowlab.training.context import Work
from obowlab.training.loop import build
from obowlab.weights.encoder_file import save_encoder

ENCODER_FILE = "encoder.safetensors"
MODEL_FOLDER = "model"


def finish(work: Work, *, method: Method[Any]) -> None:
    """Save and measure the encoder of a trained method; what is already there is not done again."""
    work.stop.act_at_once()
    folder, recipe = work.folder, work.recipe
    encoder = method.encoder
    save_encoder(
        encoder, path=folder.path / ENCODER_FILE, recipe=recipe, fingerprint=folder.info.fingerprint, source=folder.run_id
    )
    measure(work, encoder=encoder, subject="student")
    if recipe.evaluation.random_baseline:
        split = open_split(recipe.data.dataset, "train", data_root=work.machine.data_root)
        measure(work, encoder=build(work, split=split, total_steps=1).encoder, subject="random")
    model_path = folder.path / MODEL_FOLDER
    if not model_path.exists():
        size = recipe.views.original_size
        save_encoder_model(encoder, path=model_path, example=torch.zeros(2, 3, size, size))


def measure(work: Work, *, encoder: ResNet, subject: str) -> None:
    """Run the recipe's protocols on an encoder, one by one, and file every result as soon as it is there."""
    done = {(result["subject"], result["protocol"]) for result in work.folder.results()}
    for protocol in work.recipe.evaluation.protocols:
        if (subject, protocol) in done:
            continue
        results = evaluate(
            encoder,
            recipe=work.recipe,
            machine=work.machine,
            subject=subject,
            cache_dir=work.machine.runs_root / ".features",
            protocols=(protocol,),
            device=work.world.device,
            report=work.reporter.say,
        )
        for result in results:
            work.folder.add_result(result.to_json())
