"""What a study is: a TOML file that names a base recipe, what to search, and what decides. Knows nothing of Optuna."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from obowlab import text
from obowlab.config import (
    Count,
    Loaded,
    Section,
    find_file,
    flatten,
    load_recipe,
    nearest,
    parse_section,
    project_root,
    read_toml,
)
from obowlab.config.scales import recipe_for
from obowlab.config.validation import flat_pairs
from obowlab.errors import UserError
from obowlab.runs.metrics import lookup

Scalar = bool | int | float | str
Choice = Scalar | tuple[Scalar, ...]

PROTOCOL_OF = {"fewshot": "fewshot", "linear_top1": "linear", "knn_top1": "knn"}
"""Entry of the metric list -> the evaluation protocol that measures it."""


class FloatParameter(Section):
    """A number between two others, evenly or by its logarithm."""

    kind: Literal["float"]
    low: float
    high: float
    log: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> FloatParameter:
        _check_range(self.low, self.high, log=self.log)
        return self


class IntParameter(Section):
    """A whole number between two others, both included."""

    kind: Literal["int"]
    low: int
    high: int
    log: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> IntParameter:
        _check_range(self.low, self.high, log=self.log)
        return self


class CategoricalParameter(Section):
    """One of several values without an order; a value may be a list, as `method.levels` is."""

    kind: Literal["categorical"]
    choices: Annotated[tuple[Choice, ...], Field(min_length=2)]

    @model_validator(mode="after")
    def _distinct(self) -> CategoricalParameter:
        labels = [choice_label(choice) for choice in self.choices]
        if len({json.dumps(label) for label in labels}) != len(labels):
            raise ValueError("choices must differ")
        return self


Parameter = FloatParameter | IntParameter | CategoricalParameter
PARAMETERS: dict[str, type[FloatParameter] | type[IntParameter] | type[CategoricalParameter]] = {
    "float": FloatParameter,
    "int": IntParameter,
    "categorical": CategoricalParameter,
}
"""`kind` of a parameter -> its settings."""


class Sampler(Section):
    """The options of the TPE sampler that a study relies on."""

    seed: Annotated[int, Field(ge=0)] = 0
    startup_trials: Annotated[int, Field(ge=0)] = Field(10, description="random points before the model is trusted")
    multivariate: bool = Field(True, description="model the parameters together")
    constant_liar: bool = Field(True, description="keep away from points that other workers are trying")


class Pruner(Section):
    """When a trial is given up, by the few-shot results of its first seed during training."""

    kind: Literal["median", "none"] = "none"
    metric: str | None = Field(None, description="a few-shot metric; the objective if absent")
    points: Annotated[int, Field(ge=1)] = Field(5, description="results during training, at even distances")
    startup_trials: Annotated[int, Field(ge=0)] = Field(5, description="completed trials before any is pruned")
    warmup_points: Annotated[int, Field(ge=0)] = Field(1, description="results of a trial that are not acted on")
    min_trials: Count = Field(1, description="results of others at the same epoch that a median needs")


class StudySpec(Section):
    """A study file."""

    title: str = ""
    base: str
    objective: str
    trials: Count = 30
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, le=2**31 - 1)], ...], Field(min_length=1)] = (0,)
    overrides: Annotated[dict[str, Any], Field(default_factory=dict)]
    parameters: Annotated[dict[str, Parameter], Field(min_length=1)]
    paper: Annotated[dict[str, Any], Field(default_factory=dict)]
    points: tuple[dict[str, Any], ...] = Field((), description="others to begin with, after the paper's and the recipe's")
    sampler: Sampler = Sampler()
    pruner: Pruner = Pruner()

    @model_validator(mode="after")
    def _distinct(self) -> StudySpec:
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError("seeds must differ")
        return self


@dataclass(frozen=True)
class Tuning:
    """A study at a scale, checked against its base recipe.

    Attributes:
        name: of the study in its storage and of its folder.
        file: where it was read from.
        spec: its settings.
        scale: `paper`, `tiny` or `demo`.
        base: the base recipe with what all trials change of it.
        overrides: these changes, as `key=value`.
        fixed: those of them that are not the file's: `--set`.
    """

    name: str
    file: Path
    spec: StudySpec
    scale: str
    base: Loaded
    overrides: tuple[str, ...]
    fixed: tuple[str, ...] = ()

    @property
    def maximize(self) -> bool:
        """Whether more of the objective is better."""
        return lookup(self.spec.objective).direction == "max"

    @property
    def protocol(self) -> str:
        """The evaluation protocol that measures the objective."""
        return PROTOCOL_OF[lookup(self.spec.objective).name]

    @property
    def online_metric(self) -> str | None:
        """The few-shot metric that trials are judged by during training; None without pruning."""
        return None if self.spec.pruner.kind == "none" else self.spec.pruner.metric or self.spec.objective

    def every_epochs(self, epochs: int) -> int:
        """Return the epochs between two measurements of a training of `epochs` epochs; 0: none."""
        return 0 if self.online_metric is None else max(1, epochs // (self.spec.pruner.points + 1))

    def recipe(self, params: Mapping[str, Any]) -> Loaded:
        """Return the recipe of a point.

        Args:
            params: parameter to value, or to the label of a choice.

        Raises:
            UserError: the values do not go together.
        """
        point = [f"{key}={text.toml(self.value_of(key, value))}" for key, value in params.items()]
        name = recipe_for(self.spec.base, self.scale, folder=self.file.parent)
        loaded = load_recipe(name, overrides=(*self.overrides, *point))
        every = self.every_epochs(loaded.recipe.training.epochs)
        if every == 0:
            return loaded
        return load_recipe(name, overrides=(*self.overrides, *point, f"evaluation.every_epochs={every}"))

    def value_of(self, key: str, value: Any) -> Any:
        """Return a parameter's value as the recipe takes it: the choice behind a label, or the value itself."""
        parameter = self.spec.parameters[key]
        if isinstance(parameter, CategoricalParameter):
            return next(choice for choice in parameter.choices if choice_label(choice) == value)
        return value

    def paper_point(self) -> dict[str, Any] | None:
        """Return the paper's values as Optuna takes them; None when the study names none."""
        return {key: choice_label(value) for key, value in self.spec.paper.items()} or None

    def given_points(self) -> list[dict[str, Any]]:
        """Return the file's own points as Optuna takes them."""
        return [{key: choice_label(value) for key, value in point.items()} for point in self.spec.points]

    def recipe_point(self) -> dict[str, Any] | None:
        """Return the base recipe's own values as Optuna takes them; None when they are not in the search space."""
        values = flatten(self.base.recipe)
        point = {key: choice_label(values[key]) for key in self.spec.parameters}
        return point if all(_is_in(p, point[key]) for key, p in self.spec.parameters.items()) else None

    def definition(self) -> dict[str, Any]:
        """Return what must stay the same for the trials of a study to be comparable: dotted key to value.

        The number of trials, the sampler's and the pruner's settings may change from one command to the next. Recipe settings
        at their default are left out, so that a later version which knows one more continues the same study.
        """
        distinct = self.base.recipe.model_dump(mode="json", exclude_defaults=True)
        distinct["method"] = {"name": self.base.recipe.method.name, **distinct.get("method", {})}
        recipe = {key: value for key, value in flat_pairs(distinct) if key not in self.spec.parameters and _moves_weights(key)}
        settings = {f"evaluation.{self.protocol}.{k}": v for k, v in flatten(self._protocol_settings()).items()}
        space = {f"parameters.{key}": json.loads(p.model_dump_json()) for key, p in self.spec.parameters.items()}
        return {**recipe, **settings, **space, "objective": self.spec.objective, "seeds": list(self.spec.seeds)}

    def _protocol_settings(self) -> Section:
        settings = getattr(self.base.recipe.evaluation, self.protocol)
        assert isinstance(settings, Section)
        return settings


def study_files() -> dict[str, Path]:
    """Return every shipped study by name."""
    return {path.stem: path for path in sorted((project_root() / "experiments" / "studies").glob("*.toml"))}


def load_study(name: str) -> tuple[Path, StudySpec]:
    """Read a shipped study by name, or a TOML file by path.

    Raises:
        UserError: no such study, a key that is not known (names the nearest), a value out of range.
    """
    path = find_file(name, shipped=study_files(), kind="study")
    document = read_toml(path)
    place = path.name
    for key in ("parameters", "overrides", "paper", "sampler", "pruner"):
        if not isinstance(document.get(key, {}), dict):
            raise UserError(f"'{key}' in {place} must be a table, [{key}].")
    points = document.get("points", [])
    if not isinstance(points, list) or not all(isinstance(point, dict) for point in points):
        raise UserError(f"'points' in {place} must be tables, [[points]].")
    parameters = {key: _parameter(key, value, place=place) for key, value in document.get("parameters", {}).items()}
    sections = {
        "sampler": parse_section(Sampler, document.get("sampler", {}), place=f"[sampler] of {place}"),
        "pruner": parse_section(Pruner, document.get("pruner", {}), place=f"[pruner] of {place}"),
    }
    plain = {key: value for key, value in document.items() if key not in ("parameters", *sections)}
    dumped = {key: json.loads(value.model_dump_json()) for key, value in {**parameters, **sections}.items()}
    whole = {**plain, **{key: dumped[key] for key in sections}, "parameters": {key: dumped[key] for key in parameters}}
    return path, parse_section(StudySpec, whole, place=place)


def plan_study(name: str, *, scale: str, overrides: Sequence[str] = (), study_name: str | None = None) -> Tuning:
    """Read a study and check every part of it against its base recipe, so that no trial fails for a typing mistake.

    Args:
        name: of a shipped study, or the path of a study file.
        scale: `paper`, `tiny` or `demo`.
        overrides: `key=value` changes of the base recipe, after the study's own.
        study_name: in the storage; `STUDY-SCALE` if absent.

    Raises:
        UserError: names the key and what to change.
    """
    path, spec = load_study(name)
    chosen = study_name or f"{path.stem}-{scale}"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", chosen):
        raise UserError(f"Study name '{chosen}' (--name, or the file's): only letters, digits and '._-' will do for a folder.")
    changes = (*(f"{key}={text.toml(value)}" for key, value in spec.overrides.items()), *overrides)
    base = load_recipe(recipe_for(spec.base, scale, folder=path.parent), overrides=changes)
    tuning = Tuning(name=chosen, file=path, spec=spec, scale=scale, base=base, overrides=changes, fixed=tuple(overrides))
    _check_objective(tuning)
    _check_keys(tuning)
    _check_points(tuning)
    return tuning


def choice_label(choice: Any) -> Any:
    """Return how Optuna keeps a choice: a list as its JSON text."""
    return json.dumps(choice) if isinstance(choice, list | tuple) else choice


# -------------------------------------------------------------------------------------------------------------- helpers


def _parameter(key: str, values: Any, *, place: str) -> Section:
    where = f'[parameters."{key}"] of {place}'
    if not isinstance(values, dict) or any(isinstance(value, dict) for value in values.values()):
        raise UserError(
            f"{where} must be a table with a 'kind'; the key of a recipe needs quotes: [parameters.\"method.kappa\"]."
        )
    kind = values.get("kind")
    if not isinstance(kind, str) or kind not in PARAMETERS:
        raise UserError(f"{where}: 'kind' must be one of {', '.join(PARAMETERS)}{f', not {kind!r}' if kind is not None else ''}.")
    return parse_section(PARAMETERS[kind], values, place=where)


def _is_in(parameter: Parameter, value: Any) -> bool:
    """Return whether a value, or the label of a choice, is one that a parameter may take."""
    if isinstance(parameter, CategoricalParameter):
        return value in [choice_label(choice) for choice in parameter.choices]
    return isinstance(value, int | float) and not isinstance(value, bool) and parameter.low <= value <= parameter.high


def _moves_weights(key: str) -> bool:
    return key.rpartition(".")[2] != "title" and "evaluation" not in key.split(".")


def _check_range(low: float, high: float, *, log: bool) -> None:
    if low >= high:
        raise ValueError(f"low = {low} must be below high = {high}")
    if log and low <= 0:
        raise ValueError(f"low = {low} has no logarithm; choose a positive one or log = false")


def _check_objective(tuning: Tuning) -> None:
    spec, place = tuning.spec, tuning.file.name
    measurable = "fewshot_NUMBERshot, linear_top1 or knn_top1"
    try:
        metric = lookup(spec.objective)
    except KeyError:
        raise UserError(f"'objective' in {place} must be {measurable}, not '{spec.objective}'.") from None
    if metric.name not in PROTOCOL_OF:
        raise UserError(
            f"'objective' in {place} must be a metric of the finished encoder ({measurable}), not '{spec.objective}'."
        )
    evaluation = tuning.base.recipe.evaluation
    if tuning.protocol not in evaluation.protocols:
        raise UserError(
            f"'{spec.objective}' of {place} needs evaluation.protocols with '{tuning.protocol}'; "
            f"{tuning.base.name} has {list(evaluation.protocols)}."
        )
    shots = [f"fewshot_{number}shot" for number in evaluation.fewshot.shots]
    for name in {spec.objective, tuning.online_metric}:
        if name is not None and name.startswith("fewshot") and name not in shots:
            raise UserError(f"{place} asks for '{name}', but {tuning.base.name} measures {', '.join(shots)}.")
    if tuning.online_metric is not None and not tuning.online_metric.startswith("fewshot"):
        raise UserError(
            f"[pruner] of {place} needs a few-shot 'metric', for example \"{shots[-1]}\": that is measured in training."
        )


def _check_keys(tuning: Tuning) -> None:
    spec, place = tuning.spec, tuning.file.name
    known = list(flatten(tuning.base.recipe))
    for key in spec.parameters:
        if key not in known:
            raise UserError(f"Unknown key '{key}' in [parameters] of {place}.{nearest(key, known)}")
        if not _moves_weights(key):
            raise UserError(f"'{key}' in [parameters] of {place} does not change the weights, so there is nothing to search.")
        if any(text.partition("=")[0].strip() == key for text in tuning.overrides):
            raise UserError(f"'{key}' is a parameter of {place}: it cannot be fixed with --set or in [overrides] too.")
    named = [("[paper]", spec.paper)] if spec.paper else []
    for name, point in [*named, *((f"[[points]], number {number},", point) for number, point in enumerate(spec.points, start=1))]:
        _check_values(point, spec=spec, where=f"{name} of {place}")


def _check_values(point: Mapping[str, Any], *, spec: StudySpec, where: str) -> None:
    if set(point) != set(spec.parameters):
        odd = sorted(set(point) ^ set(spec.parameters))[0]
        raise UserError(f"{where} must give a value to every parameter and to nothing else; look at '{odd}'.")
    for key, value in point.items():
        parameter = spec.parameters[key]
        if _is_in(parameter, choice_label(value)):
            continue
        if isinstance(parameter, CategoricalParameter):
            raise UserError(f"'{key}' in {where} is not one of its choices.")
        raise UserError(f"'{key}' in {where} must lie between {parameter.low} and {parameter.high}, not at {value!r}.")


def _check_points(tuning: Tuning) -> None:
    """Build the recipes at the ends of every range, the others at the base recipe's values."""
    base = flatten(tuning.base.recipe)
    for key, parameter in tuning.spec.parameters.items():
        if isinstance(parameter, CategoricalParameter):
            ends: list[Any] = list(parameter.choices)
        else:
            ends = [parameter.low, parameter.high]
            if isinstance(parameter, FloatParameter) and not isinstance(base[key], float):
                raise UserError(f"'{key}' in [parameters] of {tuning.file.name} is no float in the recipe; it is {base[key]!r}.")
        for end in ends:
            try:
                tuning.recipe({key: choice_label(end)})
            except UserError as error:
                raise UserError(f'[parameters."{key}"] of {tuning.file.name} goes where no recipe can be: {error}') from None
