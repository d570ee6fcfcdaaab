"""Encoders that trainings begin with: kept in the run store, `RUNS_ROOT/.weights/IDENTITY.safetensors`, by their identity.

A recipe names them by that hash, so that it means the same encoder on every machine, and a run can be continued when the file it
was begun from is gone.
"""

from __future__ import annotations

from pathlib import Path

from obowlab.config import Backbone, Recipe
from obowlab.errors import UserError
from obowlab.evaluation.features import weights_hash as hash_of
from obowlab.files.sharing import share, shared_folder
from obowlab.methods import build_student
from obowlab.weights.encoder_file import Encoder, read_encoder, write_encoder
from obowlab.weights.info import EncoderInfo
from obowlab.weights.source import kept_path


def keep_weights(encoder: Encoder, *, runs_root: Path) -> str:
    """Keep an encoder for trainings that begin with it, unless it is kept already, and return its identity.

    Raises:
        UserError: the run store cannot be written to.
    """
    path = kept_path(encoder.info.identity, runs_root=runs_root)
    if not path.exists():
        try:
            shared_folder(runs_root)
            shared_folder(path.parent)
            write_encoder(encoder.model, path=path, info=encoder.info)
            share(path)
        except OSError as error:
            raise UserError(f"Cannot keep the weights of {encoder.path} in {path.parent}: {error.strerror}.") from None
    return encoder.info.identity


def kept_weights(identity: str, *, backbone: Backbone, runs_root: Path) -> Encoder:
    """Return a kept encoder, in evaluation mode on the CPU; it is checked against its identity.

    Args:
        identity: see `EncoderInfo.identity`.
        backbone: of the recipe that names it.
        runs_root: the run store.

    Raises:
        UserError: it is not there, it is damaged, or its network is not the recipe's.
    """
    path = kept_path(identity, runs_root=runs_root)
    if not path.is_file():
        raise UserError(
            f"method.weights names an encoder ({identity[:12]}) that is not in {path.parent}: begin the run with --weights "
            "RUN or FILE, which puts it there."
        )
    encoder = read_encoder(path)
    if encoder.info.identity != identity:
        raise UserError(
            f"{path} holds another encoder than its name says; remove it, and begin the run with --weights RUN or FILE."
        )
    if encoder.info.backbone != backbone:
        raise UserError(
            f"method.weights ({identity[:12]}, {encoder.info.source}) is a {encoder.info.backbone.arch} of another shape "
            "than the recipe's [backbone]: begin the run with --weights RUN or FILE, which sets both."
        )
    return encoder


def untrained(recipe: Recipe) -> Encoder:
    """Return the network of a recipe with the weights that seed 0 begins it with, in evaluation mode on the CPU."""
    model = build_student(recipe.method, backbone=recipe.backbone, seed=0).eval()
    info = EncoderInfo(
        backbone=recipe.backbone,
        original_resize=recipe.views.original_resize,
        original_size=recipe.views.original_size,
        source="random initialisation, seed 0",
        weights_hash=hash_of(model),
    )
    return Encoder(model=model, info=info, path=Path(info.source))
