"""After the last training step: save the encoder, evaluate it, make the model that MLflow registers."""

from __future__ import annotations

from typing import Any

import torch

from obowlab.data.datasets import open_split
from obowlab.evaluation import evaluate
from obowlab.methods import Method, ResNet
from obowlab.tracking.mirror import save_encoder_model
from obowlab.training.context import RunContext
from obowlab.training.loop import build
from obowlab.weights.encoder_file import save_encoder

ENCODER_FILE = "encoder.safetensors"
MODEL_FOLDER = "model"


def finish(run: RunContext, *, method: Method[Any]) -> None:
    """Save and evaluate the encoder of a trained method; what an earlier start did is not repeated."""
    run.stop.act_at_once()
    folder, recipe = run.folder, run.recipe
    encoder = method.encoder
    save_encoder(
        encoder, path=folder.path / ENCODER_FILE, recipe=recipe, fingerprint=folder.info.fingerprint, source=folder.run_id
    )
    measure(run, encoder=encoder, subject="student")
    if recipe.evaluation.random_baseline:
        machine = run.machine
        split = open_split(recipe.data.dataset, "train", data_root=machine.data_root, runs_root=machine.runs_root)
        measure(run, encoder=build(run, split=split, total_steps=1).encoder, subject="random")
    model_path = folder.path / MODEL_FOLDER
    if not model_path.exists():
        size = recipe.views.original_size
        save_encoder_model(encoder, path=model_path, example=torch.zeros(2, 3, size, size))


def measure(run: RunContext, *, encoder: ResNet, subject: str) -> None:
    """Run the recipe's protocols on an encoder, one by one, and save each result at once."""
    done = {(result["subject"], result["protocol"]) for result in run.folder.results()}
    for protocol in run.recipe.evaluation.protocols:
        if (subject, protocol) in done:
            continue
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
