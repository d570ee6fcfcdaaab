"""What `obowlab eval` measures: the encoder of a run, a weights file or a model version. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from obowlab.config import Backbone, Recipe, Views, flatten, load_recipe, parse_override, recipe_from_values
from obowlab.errors import UserError
from obowlab.runs.folder import RunFolder
from obowlab.weights.source import Source, find_source


@dataclass(frozen=True)
class Subject:
    """What is measured.

    Attributes:
        recipe: with the evaluation settings; that of the run or model version, or the one named for a file.
        source: where the encoder is.
        recipe_name: of a recipe that was named for a file.
    """

    recipe: Recipe
    source: Source
    recipe_name: str | None = None

    @property
    def folder(self) -> RunFolder | None:
        """The run's folder; None for a file and a model version."""
        return self.source.folder

    @property
    def name(self) -> str:
        """The run id, the file's path, or the model version's address."""
        return self.source.name

    def check(self, backbone: Backbone) -> None:
        """Refuse a network that is not the one of the recipe that was named for it.

        Raises:
            UserError: asks for another recipe.
        """
        trained = self.recipe.backbone.model_copy(update={"padding": backbone.padding})
        if self.recipe_name is not None and trained != backbone:
            raise UserError(
                f"{self.name} holds a {backbone.arch} of another shape than recipe '{self.recipe_name}' trains; "
                "choose another --recipe."
            )


def find_subject(
    ref: str, *, recipe_name: str | None, overrides: Sequence[str], runs_root: Path, tracking_uri: str | None = None
) -> Subject:
    """Find an encoder, and the settings with which it is measured.

    Args:
        ref: as for `find_source`.
        recipe_name: for a weights file, the recipe whose evaluation settings apply.
        overrides: texts `evaluation.KEY=VALUE`.
        runs_root: where runs are.
        tracking_uri: the MLflow store; that of the run store if absent.

    Raises:
        UserError: there is no such encoder, or the settings do not fit it.
    """
    source = find_source(ref, runs_root=runs_root, tracking_uri=tracking_uri)
    own = source.folder.info if source.folder is not None else source.version
    if own is not None:
        if recipe_name is not None:
            raise UserError("--recipe is for weights files; a run has its own (change it with --set).")
        return Subject(recipe=_override(own.recipe, overrides), source=source)
    if recipe_name is not None:
        recipe = load_recipe(recipe_name).recipe
    elif source.info is not None:
        recipe = Recipe(views=Views(original_size=source.info.original_size, original_resize=source.info.original_resize))
    else:
        recipe = Recipe()
    subject = Subject(recipe=_override(recipe, overrides), source=source, recipe_name=recipe_name)
    if source.backbone is not None:
        subject.check(source.backbone)
    return subject


def _override(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """Change evaluation settings of a recipe; every other key is refused, as it would be another training."""
    values, sources = flatten(recipe), dict.fromkeys(flatten(recipe), "the run")
    for text in overrides:
        key, value = parse_override(text)
        if key in values and not key.startswith("evaluation."):
            raise UserError(f"--set {key} cannot be changed after training; `obowlab eval` takes evaluation.* keys.")
        values[key], sources[key] = value, f"--set {text}"
    return recipe_from_values(values, sources=sources)
