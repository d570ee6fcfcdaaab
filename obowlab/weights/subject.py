"""What `obowlab eval` measures: the encoder of a run, or of a weights file. Imports torch for weights files alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from obowlab.config import Recipe, Views, flatten, load_recipe, parse_override, recipe_from_values
from obowlab.errors import UserError
from obowlab.runs.folder import RunFolder
from obowlab.weights import WEIGHTS_SUFFIXES


@dataclass(frozen=True)
class Subject:
    """What is measured.

    Attributes:
        recipe: with the evaluation settings; a run's own, or the one named for a file.
        folder: the run's folder; None for a file.
        file: the weights file; None for a run.
    """

    recipe: Recipe
    folder: RunFolder | None
    file: Path | None

    @property
    def name(self) -> str:
        """The run id or the file's path."""
        return self.folder.run_id if self.folder is not None else str(self.file)


def find_subject(ref: str, *, recipe_name: str | None, overrides: Sequence[str], runs_root: Path) -> Subject:
    """Find a run or a weights file, and the settings with which it is measured.

    Args:
        ref: run id, its beginning, run folder or weights file.
        recipe_name: for a weights file, the recipe whose evaluation settings apply.
        overrides: texts `evaluation.KEY=VALUE`.
        runs_root: where runs are.

    Raises:
        UserError: there is no such run or file, or the settings do not fit it.
    """
    path = Path(ref)
    if not path.is_file():
        if path.suffix in WEIGHTS_SUFFIXES:
            raise UserError(f"There is no weights file '{ref}'.")
        folder = RunFolder.find(ref, runs_root=runs_root)
        if recipe_name is not None:
            raise UserError("--recipe is for weights files; a run has its own (change it with --set).")
        return Subject(recipe=_override(folder.info.recipe, overrides), folder=folder, file=None)
    from obowlab.weights.encoder_file import read_encoder

    info = read_encoder(path).info
    views = Views(original_size=info.original_size, original_resize=info.original_resize)
    recipe = load_recipe(recipe_name).recipe if recipe_name is not None else Recipe(views=views)
    if recipe_name is not None and recipe.backbone != info.backbone:
        raise UserError(
            f"{path} holds a {info.backbone.arch} of another shape than recipe '{recipe_name}' trains; choose another --recipe."
        )
    return Subject(recipe=_override(recipe.model_copy(update={"backbone": info.backbone}), overrides), folder=None, file=path)


def _override(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """Change evaluation settings of a recipe; every other key is refused, as it would be another training."""
    values, sources = flatten(recipe), dict.fromkeys(flatten(recipe), "the run")
    for text in overrides:
        key, value = parse_override(text)
        if key in values and not key.startswith("evaluation."):
            raise UserError(f"--set {key} cannot be changed after training; `obowlab eval` takes evaluation.* keys.")
        values[key], sources[key] = value, f"--set {text}"
    return recipe_from_values(values, sources=sources)
