"""Recipe and Machine: everything that changes a result, and everything that must not.

A `Recipe` is read from TOML (`experiments/NAME.toml`, with `extends`) and sparse `--set key=value` overrides. An unknown
key is an error that names the nearest known one, and every value remembers the file that set it. A `Machine` says where
and with what a run is carried out; no field of it may change a result beyond the order of float sums.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from obowlab.errors import UserError

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]
Range = tuple[Annotated[float, Field(ge=0.0)], Annotated[float, Field(ge=0.0)]]
Level = Literal["conv4", "conv5"]

FINGERPRINT_VERSION = 2
"""Raise it when the same recipe would no longer give the same weights, or a default changes (see CHANGELOG, *Numerics*)."""


class Section(BaseModel):
    """A frozen group of settings; unknown keys and values of the wrong type are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


SectionT = TypeVar("SectionT", bound=Section)


class Data(Section):
    """Which images are trained on."""

    dataset: str = Field("imagenet", pattern=r"^[a-z0-9][a-z0-9_-]*$")
    images_per_class: Count | None = Field(None, description="first n of every class in sorted order; all if absent or 'all'")

    @field_validator("images_per_class", mode="before")
    @classmethod
    def _all(cls, value: object) -> object:
        return None if value == "all" else value  # TOML has no null, and `extends` must be able to undo a number


class Views(Section):
    """Sizes in pixels and probabilities of the views cut from one image (SPEC section 2, paper appendix G)."""

    original_size: Count = 224
    original_resize: Count = 256
    num_crops: Annotated[int, Field(ge=0)] = 1
    crop_size: Count = 160
    crop_scale: Range = (0.08, 0.6)
    num_patches: Annotated[int, Field(ge=0, le=9)] = 0
    patch_size: Count = 96
    patch_source_size: Count = 256
    patch_scale: Range = (0.6, 1.0)
    patch_jitter: Annotated[int, Field(ge=0)] = 24
    flip_probability: Fraction = 0.5
    jitter_probability: Fraction = 0.8
    brightness: Fraction = 0.4
    contrast: Fraction = 0.4
    saturation: Fraction = 0.4
    hue: Annotated[float, Field(ge=0.0, le=0.5)] = 0.1
    grayscale_probability: Fraction = 0.2
    blur_probability: Fraction = 0.5
    blur_sigma: Range = (0.1, 2.0)

    @model_validator(mode="after")
    def _fits(self) -> Views:
        if self.num_crops + self.num_patches == 0:
            raise ValueError("num_crops and num_patches are both 0: the student would see nothing")
        if self.original_resize < self.original_size:
            raise ValueError("original_resize must be at least original_size")
        if self.num_patches and self.patch_size + self.patch_jitter > self.patch_source_size:
            raise ValueError("patch_size + patch_jitter must fit into patch_source_size")
        for name in ("crop_scale", "patch_scale", "blur_sigma"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} must be [low, high] with low <= high")
        for name in ("crop_scale", "patch_scale"):
            low, high = getattr(self, name)
            if low <= 0 or high > 1:
                raise ValueError(f"{name} are fractions of the image's area, in (0, 1]")
        return self


class Backbone(Section):
    """The ResNet that student and teacher share."""

    arch: Literal["resnet18", "resnet34", "resnet50"] = "resnet18"
    stem: Literal["imagenet", "small"] = Field("imagenet", description="small: one 3x3 convolution and no max-pooling")
    width: Count = Field(64, description="channels of the first stage; torchvision's is 64")


class Obow(Section):
    """The method of the paper (SPEC section 1)."""

    name: Literal["obow"] = "obow"
    levels: tuple[Level, ...] = ("conv5",)
    num_words: Annotated[int, Field(ge=2)] = 8192
    border: Annotated[int, Field(ge=0)] = Field(1, description="pixels dropped around the teacher's feature maps")
    codes: Literal["soft", "hard"] = "soft"
    pooling: Literal["max", "mean"] = "max"
    delta_base: Positive = 0.1
    msd_start: Literal["authors", "first_batch"] = Field("authors", description="authors: mean squared distance starts at 0.5")
    msd_momentum: Fraction = 0.99
    vocabulary: Literal["queue", "kmeans_replace", "kmeans_sinkhorn"] = "queue"
    queue_vector: Literal["local", "global_average", "local_average"] = "local_average"
    kmeans_momentum: Fraction = 0.99
    kmeans_patience: Count = Field(1000, description="steps without use after which a word is replaced")
    sinkhorn_epsilon: Positive = Field(0.05, description="in units of the mean distance of the batch")
    sinkhorn_iterations: Count = 3
    head: Literal["dynamic", "fixed"] = "dynamic"
    head_batchnorm: bool = Field(True, description="the authors' code has it, the paper does not mention it")
    kappa: Positive = 5.0
    learn_kappa: bool = False
    teacher_momentum: Fraction = 0.99
    teacher_momentum_schedule: Literal["cosine", "constant"] = "cosine"

    @model_validator(mode="after")
    def _levels_known_once(self) -> Obow:
        if not self.levels or len(set(self.levels)) != len(self.levels):
            raise ValueError("levels must name conv4, conv5 or both, each once")
        return self


class Optimizer(Section):
    """SGD and its learning rate (SPEC section 3)."""

    learning_rate: Positive = 0.05
    end_learning_rate: Annotated[float, Field(ge=0.0)] = 0.0
    warmup_epochs: Annotated[float, Field(ge=0.0)] = 0.0
    cosine_per: Literal["step", "epoch"] = Field("step", description="epoch: the authors' stepwise cosine")
    momentum: Fraction = 0.9
    weight_decay: Annotated[float, Field(ge=0.0)] = 5e-4


class Training(Section):
    """How long and in what precision."""

    epochs: Count = 80
    batch_size: Annotated[int, Field(ge=2)] = Field(128, description="images per step over all processes")
    precision: Literal["float32", "bfloat16"] = "float32"
    monitor: bool = Field(False, description="online linear classifier on detached teacher features")


class FewShot(Section):
    """Prototype classification of frozen features (SPEC section 4)."""

    classes: str = Field("all", description="all, or a key of DATA_ROOT/DATASET/lowshot_classes.json, or a file of class names")
    num_ways: Annotated[int, Field(ge=2)] = 50
    shots: tuple[Count, ...] = (1, 5)
    num_queries: Count = 1
    num_episodes: Annotated[int, Field(ge=2)] = 200
    sampler: Literal["authors", "counter"] = Field("authors", description="authors: Python's random.Random(0), as their code")


class Linear(Section):
    """Linear classifier on cached features of the centre crop and its flip (SPEC section 4)."""

    epochs: Count = 50
    batch_size: Count = 256
    learning_rate: Positive = 10.0
    schedule: Literal["steps", "cosine"] = Field("steps", description="steps: divided by 10 at intervals; cosine: to 0, per step")
    decay_every: Count = Field(15, description="epochs between divisions of the learning rate by 10; unused by cosine")
    momentum: Fraction = 0.9
    weight_decay: Annotated[float, Field(ge=0.0)] = 2e-6


class Knn(Section):
    """Cosine-weighted vote of the nearest training images."""

    num_neighbours: Count = 20
    temperature: Positive = 0.07


class Evaluation(Section):
    """What is measured, during training and once it is over; not part of a run's identity."""

    protocols: tuple[Literal["fewshot", "linear", "knn"], ...] = ("fewshot", "linear", "knn")
    random_baseline: bool = Field(False, description="measure the untrained weights of the same seed as well")
    every_epochs: Annotated[int, Field(ge=0)] = Field(0, description="few-shot during training, every n epochs; 0: never")
    fewshot: FewShot = FewShot()
    linear: Linear = Linear()
    knn: Knn = Knn()


class Recipe(Section):
    """Everything that changes a result."""

    title: str = ""
    data: Data = Data()
    views: Views = Views()
    backbone: Backbone = Backbone()
    method: Obow = Obow()
    optimizer: Optimizer = Optimizer()
    training: Training = Training()
    evaluation: Evaluation = Evaluation()

    def fingerprint(self, *, seed: int) -> str:
        """Return the SHA-256 (hex) that identifies a run: the resolved recipe and the seed.

        Title and evaluation are left out: they do not change the weights, and measuring again must not train again. So are
        settings at their default: a run keeps its identity when a later version knows one more setting.
        """
        distinct = self.model_dump(mode="json", exclude={"title", "evaluation"}, exclude_defaults=True)
        distinct["method"] = {"name": self.method.name, **distinct.get("method", {})}
        return canonical_hash({"version": FINGERPRINT_VERSION, "recipe": distinct, "seed": seed})


class Machine(Section):
    """Where and with what a run is carried out; nothing here changes a result."""

    data_root: Path = Field(Path("data"), strict=False)
    runs_root: Path = Field(Path("runs"), strict=False)
    tracking_uri: str | None = Field(None, description="MLflow store; sqlite in the run store if absent")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    procs: Count = Field(1, description="processes, one per GPU on a GPU machine")
    workers: Annotated[int, Field(ge=0)] | None = Field(None, description="loader threads or processes per training process")
    threads: Count | None = Field(None, description="of one process; on the CPU 1 if absent, else a share of the cores")
    loader: Literal["auto", "ffcv", "torch"] = "auto"
    channels_last: bool = True
    compile: bool = False
    checkpoint_every_s: Positive = 120.0
    log_points: Count = Field(2000, description="at most so many points per training metric")


def canonical_hash(value: Any) -> str:
    """Return the SHA-256 (hex) of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------------------- files


def project_root() -> Path:
    """Return the folder that holds `experiments/` and `ablations/`: the checkout, or the copy inside an installed wheel."""
    package = Path(__file__).resolve().parent
    bundled = package / "_project"
    return bundled if bundled.is_dir() else package.parent


def recipe_files() -> dict[str, Path]:
    """Return every shipped recipe by name."""
    return {path.stem: path for path in sorted((project_root() / "experiments").glob("*.toml"))}


@dataclass(frozen=True)
class Loaded:
    """A recipe with its name and, for every dotted key, the file or option that set it."""

    name: str
    recipe: Recipe
    sources: Mapping[str, str]


def load_recipe(name: str, *, overrides: Sequence[str] = ()) -> Loaded:
    """Read a shipped recipe by name, or a TOML file by path, and apply `key=value` overrides.

    Raises:
        UserError: unknown recipe or key, a value out of range, a file that is not TOML, an `extends` that goes in circles.
    """
    path = _find(name)
    values, sources = _read_chain(path, ())
    for text in overrides:
        key, value = parse_override(text)
        values[key] = value
        sources[key] = f"--set {text}"
    recipe = recipe_from_values(values, sources=sources)
    return Loaded(name=path.stem, recipe=recipe, sources=sources)


def recipe_from_values(values: Mapping[str, Any], *, sources: Mapping[str, str]) -> Recipe:
    """Validate flat dotted keys into a Recipe; each complaint names the key and who set it."""
    _refuse_unknown(values, Recipe, sources)
    return _validate(Recipe, _nest(values), sources)


def load_machine(*, file: Path | None = None, overrides: Mapping[str, Any] | None = None) -> Machine:
    """Read the machine file (`--machine`, `$OBOWLAB_MACHINE` or ~/.config/obowlab/machine.toml) under the given overrides.

    `$OBOWLAB_DATA_ROOT`, `$OBOWLAB_RUNS_ROOT` and `$MLFLOW_TRACKING_URI` stand between the file and the overrides.
    """
    named = file or (Path(os.environ["OBOWLAB_MACHINE"]) if os.environ.get("OBOWLAB_MACHINE") else None)
    path = named or Path("~/.config/obowlab/machine.toml").expanduser()
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    if named is not None or path.is_file():
        values = dict(_flatten(_read_toml(path)))
        sources = dict.fromkeys(values, str(path))
    variables = {"data_root": "OBOWLAB_DATA_ROOT", "runs_root": "OBOWLAB_RUNS_ROOT", "tracking_uri": "MLFLOW_TRACKING_URI"}
    for key, variable in variables.items():
        if os.environ.get(variable):
            values[key] = os.environ[variable]
            sources[key] = f"${variable}"
    for key, value in (overrides or {}).items():
        if value is not None:
            values[key] = str(value) if isinstance(value, Path) else value
            sources[key] = f"--{key.replace('_', '-')}"
    _refuse_unknown(values, Machine, sources)
    machine = _validate(Machine, values, sources)
    roots = {"data_root": machine.data_root, "runs_root": machine.runs_root}
    return machine.model_copy(update={name: path.expanduser().absolute() for name, path in roots.items()})


def flatten(section: Section) -> dict[str, Any]:
    """Return every setting under its dotted key, as JSON values."""
    return dict(_flatten(section.model_dump(mode="json")))


def nearest(word: str, known: Sequence[str]) -> str:
    """Return ` Did you mean 'x'?` for the closest known word; else a list of all if it is short, or nothing."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if not close:  # 'kapa' should find 'method.kappa'
        tails = {name.rsplit(".", 1)[-1]: name for name in known}
        close = [tails[tail] for tail in difflib.get_close_matches(word.rsplit(".", 1)[-1], list(tails), n=1, cutoff=0.5)]
    if close:
        return f" Did you mean '{close[0]}'?"
    return f" Known: {', '.join(known)}." if 0 < len(known) <= 20 else ""


# -------------------------------------------------------------------------------------------------------------- helpers


def _find(name: str) -> Path:
    shipped = recipe_files()
    if name in shipped:
        return shipped[name]
    path = Path(name)
    if path.suffix == ".toml":
        if path.is_file():
            return path
        raise UserError(f"There is no recipe file '{name}'.")
    raise UserError(f"There is no recipe '{name}'.{nearest(name, list(shipped))}")


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid TOML: {error}.") from None


def _read_chain(path: Path, below: tuple[Path, ...]) -> tuple[dict[str, Any], dict[str, str]]:
    """Read a recipe file on top of the ones it extends; return flat values and the file of each."""
    if path.resolve() in below:
        raise UserError(f"{path} extends itself through {' -> '.join(p.name for p in (*below, path))}.")
    document = _read_toml(path)
    parent = document.pop("extends", None)
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    if parent is not None:
        if not isinstance(parent, str):
            raise UserError(f"'extends' in {path} must be the name of one recipe.")
        sibling = path.parent / f"{parent}.toml"
        values, sources = _read_chain(sibling if sibling.is_file() else _find(parent), (*below, path.resolve()))
        values.pop("title", None)
    own = dict(_flatten(document))
    method = values.get("method.name", Obow.model_fields["name"].default)
    if own.get("method.name", method) != method:  # another method, other keys
        values = {key: value for key, value in values.items() if not key.startswith("method.")}
    values.update(own)
    sources.update(dict.fromkeys(own, path.name))
    return values, {key: sources[key] for key in values}


def parse_override(text: str) -> tuple[str, Any]:
    """Split `key=value` into the key and its TOML value; a bare word is a string."""
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not key:
        raise UserError(f"--set needs key=value, not '{text}'.")
    value = value.strip()
    if "\n" in value:
        raise UserError(f"--set {key} needs a value on one line.")
    try:
        return key, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        if value[:1] in tuple("[{\"'"):
            raise UserError(f"--set {text} is not a TOML value: .1 is written 0.1, and words in lists need quotes.") from None
    try:
        return key, float(value)  # .05 is a number to everybody but TOML
    except ValueError:
        return key, value  # a bare word is a string


def _flatten(document: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in document.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _nest(values: Mapping[str, Any]) -> dict[str, Any]:
    document: dict[str, Any] = {}
    for key, value in values.items():
        *groups, leaf = key.split(".")
        place = document
        for group in groups:
            place = place.setdefault(group, {})
        place[leaf] = value
    return document


def _known_keys(model: type[Section], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from _known_keys(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _refuse_unknown(values: Mapping[str, Any], model: type[Section], sources: Mapping[str, str]) -> None:
    known = list(_known_keys(model))
    for key in values:
        if key not in known:
            hint = nearest(key, known) or " `obowlab config show full` lists every key."
            raise UserError(f"Unknown key '{key}' ({sources[key]}).{hint}")


def _validate(model: type[SectionT], document: Mapping[str, Any], sources: Mapping[str, str]) -> SectionT:
    # JSON mode: strict about types, yet a TOML array may fill a tuple.
    try:
        return model.model_validate_json(json.dumps(document, default=str))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"] if not isinstance(part, int))
        reason = re.sub(r"^Value error, ", "", first["msg"])
        if isinstance(first["input"], Mapping):  # settings that do not fit together: find who set those the reason names
            words = set(re.findall(r"\w+", reason))
            named = [name for name in sources if name.startswith(f"{key}.") and name.rsplit(".", 1)[-1] in words]
            named.sort(key=lambda name: not sources[name].startswith("--"))  # an option before a file
            given = ""
        else:
            named = [key] if key in sources else []
            given = f", not {first['input']!r:.60}"
        source = sources[named[0]] if named else "default"
        raise UserError(f"'{key}' ({source}): {reason}{given}.") from None
