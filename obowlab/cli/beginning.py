"""Trainings that begin with an encoder: what a command changes in their recipes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from obowlab.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from obowlab.config import Recipe
    from obowlab.weights.info import EncoderInfo
    from obowlab.weights.source import Source


def keep_encoder(of: Source | Recipe, *, runs_root: Path, dry_run: bool) -> EncoderInfo:
    """Keep an encoder in the run store, or a recipe's network as it is before training, and return what is known of it.

    Args:
        of: the encoder, or the recipe.
        runs_root: the run store.
        dry_run: keep nothing.

    Raises:
        UserError: the encoder cannot be read, or the run store not written to.
    """
    from obowlab.config import Recipe

    if dry_run and not isinstance(of, Recipe) and of.info is not None:
        return of.info
    from obowlab.weights.encoder_file import read_source
    from obowlab.weights.kept import keep_weights, untrained

    encoder = untrained(of) if isinstance(of, Recipe) else read_source(of)
    if not dry_run:
        keep_weights(encoder, runs_root=runs_root)
    return encoder.info


def beginning_with(source: Source, *, runs_root: Path, dry_run: bool) -> tuple[str, ...]:
    """Return what makes a recipe begin with an encoder, as `--set` takes it, and keep its weights in the run store.

    Arguments and errors are those of `keep_encoder`.
    """
    info = keep_encoder(source, runs_root=runs_root, dry_run=dry_run)
    network = (f"backbone.{key}={json.dumps(value)}" for key, value in info.backbone.model_dump(mode="json").items())
    return (f'method.weights="{info.identity}"', *network)


def refuse_weights(recipe: str, *, overrides: Sequence[str]) -> None:
    """Refuse a recipe that cannot begin with an encoder.

    Raises:
        UserError: says which can.
    """
    from obowlab.config import Detector, Supervised, load_recipe

    method = load_recipe(recipe, overrides=overrides).recipe.method
    if not isinstance(method, Supervised | Detector):
        raise UserError(
            f"--weights begins a training by labels, but recipe '{recipe}' has method.name {method.name}: choose one with "
            "method.name supervised, such as tiny-supervised."
        )
