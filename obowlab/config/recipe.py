"""The recipe: everything that changes a result.

Every model here is a section of a TOML file (`files`); the settings of the methods are in `methods`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from obowlab.config.base import Count, Fraction, Padding, Positive, Range, Section, canonical_hash, conflict
from obowlab.config.methods import AnyMethod, Obow

FINGERPRINT_VERSION = 2
"""Raise it when the same recipe would no longer give the same weights, or a default changes (see CHANGELOG, *Numerics*)."""


class Data(Section):
    """Which images are trained on."""

    dataset: str = Field("imagenet", pattern=r"^[a-z0-9][a-z0-9_-]*$")
    images_per_class: Count | None = Field(None, description="first n of every class in sorted order; all if absent or 'all'")
    image_list: str = Field(
        "", pattern=r"^([0-9a-f]{64})?$", description="SHA-256 of a list of file names that are trained on; empty: no list"
    )

    @field_validator("images_per_class", mode="before")
    @classmethod
    def _all(cls, value: object) -> object:
        return None if value == "all" else value  # TOML has no null, and `extends` must be able to undo a number

    @model_validator(mode="after")
    def _one_choice(self) -> Data:
        if self.image_list and self.images_per_class is not None:
            raise conflict("image_list and images_per_class both choose images: set one of them", keys=["image_list"])
        return self


Interpolation = Literal["bilinear", "bicubic"]
"""How a box of an image becomes a view of another size, both as PIL does it, with antialiasing."""


class CropView(Section):
    """What one crop of an image has of its own; what is absent is as in `[views]`."""

    scale: Range | None = None
    interpolation: Interpolation | None = None
    jitter_probability: Fraction | None = None
    brightness: Fraction | None = None
    contrast: Fraction | None = None
    saturation: Fraction | None = None
    hue: Annotated[float, Field(ge=0.0, le=0.5)] | None = None
    grayscale_probability: Fraction | None = None
    blur_probability: Fraction | None = None
    blur_sigma: Range | None = None
    solarise_probability: Fraction | None = None

    @model_serializer(mode="wrap")
    def _without_absent(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in dump(self).items() if value is not None}  # TOML has no null


class Views(Section):
    """Sizes in pixels and probabilities of the views cut from one image (docs/method.md, section 1; paper, appendix G)."""

    original_size: Count = 224
    original_resize: Count = 256
    num_crops: Annotated[int, Field(ge=0)] = 1
    crop_extent: Literal["part", "whole", "resized"] = Field(
        "part",
        description="part: crops of crop_size and crop_scale; whole: of original_size and whole_scale (Table 4's 1x224); "
        "resized: original_size, anywhere in the image of original_resize",
    )
    crop_size: Count = 160
    crop_scale: Range = (0.08, 0.6)
    whole_scale: Range = Field((0.08, 1.0), description="torchvision's default; the paper does not say")
    num_small_crops: Annotated[int, Field(ge=0)] = Field(0, description="crops of a second size: SwAV's six beside two")
    small_crop_size: Count = 96
    small_crop_scale: Range = Field((0.05, 0.14), description="SwAV's")
    num_patches: Annotated[int, Field(ge=0, le=9)] = 0
    patch_size: Count = 96
    patch_source_size: Count = 256
    patch_scale: Range = (0.6, 1.0)
    patch_jitter: Annotated[int, Field(ge=0)] = 24
    interpolation: Interpolation = Field("bilinear", description="of the student's views; BYOL's and SimCLR's are bicubic")
    flip_probability: Fraction = 0.5
    jitter_probability: Fraction = 0.8
    brightness: Fraction = 0.4
    contrast: Fraction = 0.4
    saturation: Fraction = 0.4
    hue: Annotated[float, Field(ge=0.0, le=0.5)] = 0.1
    grayscale_probability: Fraction = 0.2
    blur_probability: Fraction = 0.5
    blur_sigma: Range = (0.1, 2.0)
    solarise_probability: Fraction = Field(0.0, description="that a crop's bright pixels are inverted; BYOL's second crop")
    solarise_threshold: Fraction = Field(0.5, description="brightness from which a solarised pixel is inverted")
    per_crop: tuple[CropView, ...] = Field((), description="what each crop, small ones last, has of its own; none: all alike")
    cutmix_probability: Fraction = Field(0.0, description="that a crop has a rectangle of its batch neighbour's pasted in")
    cutmix_alpha: Positive = Field(1.0, description="of Beta(alpha, alpha), the crop's own share; the paper does not say")

    @property
    def cut_size(self) -> int:
        """Side of a crop in pixels."""
        return self.crop_size if self.crop_extent == "part" else self.original_size

    @property
    def cut_scale(self) -> tuple[float, float]:
        """Smallest and largest area of a crop as a fraction of the image's."""
        return self.crop_scale if self.crop_extent == "part" else self.whole_scale

    def crop(self, number: int) -> Views:
        """Return these settings with what the crop of that number has of its own; from 0, small crops after the others."""
        if not self.per_crop:
            return self
        own = {name: value for name, value in vars(self.per_crop[number]).items() if value is not None}
        if scale := own.pop("scale", None):
            large = "crop_scale" if self.crop_extent == "part" else "whole_scale"
            own[large if number < self.num_crops else "small_crop_scale"] = scale
        return self.model_copy(update=own)

    @model_validator(mode="after")
    def _fits(self) -> Views:
        if self.per_crop and len(self.per_crop) != self.num_crops + self.num_small_crops:
            small = f" and num_small_crops {self.num_small_crops}" if self.num_small_crops else ""
            raise conflict(
                f"per_crop describes {len(self.per_crop)} crops, but num_crops is {self.num_crops}{small}",
                keys=("per_crop", "num_crops", "num_small_crops"),
            )
        if self.num_crops + self.num_patches + self.num_small_crops == 0:
            raise conflict(
                "num_crops and num_patches are both 0: the student would see nothing", keys=("num_crops", "num_patches")
            )
        if self.original_resize < self.original_size:
            raise conflict("original_resize must be at least original_size", keys=("original_resize", "original_size"))
        if self.num_patches and self.patch_size + self.patch_jitter > self.patch_source_size:
            raise conflict(
                "patch_size + patch_jitter must fit into patch_source_size",
                keys=("patch_size", "patch_jitter", "patch_source_size"),
            )
        if self.cutmix_probability and not self.num_crops:
            raise conflict(
                "cutmix_probability is above 0, but num_crops is 0 and patches are never mixed",
                keys=("cutmix_probability", "num_crops"),
            )
        for name in ("crop_scale", "whole_scale", "small_crop_scale", "patch_scale", "blur_sigma"):
            _check_range(getattr(self, name), name=name)
        for crop in self.per_crop:
            _check_range(crop.scale, name="scale", key="per_crop")
            _check_range(crop.blur_sigma, name="blur_sigma", key="per_crop")
        return self


def _check_range(ends: tuple[float, float] | None, *, name: str, key: str | None = None) -> None:
    """Refuse a range whose ends are in the wrong order, or that are no fractions of an area; it stands in the setting `key`."""
    if ends is None:
        return
    low, high = ends
    if low > high:
        raise conflict(f"{name} must be [low, high] with low <= high", keys=[key or name])
    if name.endswith("scale") and (low <= 0 or high > 1):
        raise conflict(f"{name} are fractions of the image's area, in (0, 1]", keys=[key or name])


class Backbone(Section):
    """The ResNet that student and teacher share."""

    arch: Literal["resnet10", "resnet18", "resnet34", "resnet50"] = "resnet18"
    stem: Literal["imagenet", "small"] = Field("imagenet", description="small: one 3x3 convolution and no max-pooling")
    width: Count = Field(64, description="channels of the first stage; torchvision's is 64")
    padding: Padding = Field("torchvision", description="same: TensorFlow's, as BYOL's authors trained")


class Optimizer(Section):
    """SGD, as it is or with a step for every layer's size, and its learning rate (docs/method.md, sections 6.5 and 8.1)."""

    name: Literal["sgd", "lars_byol", "lars_simclr", "larc"] = Field(
        "sgd", description="LARS in BYOL's or SimCLR's form and SwAV's LARC scale the step of each tensor by its norm"
    )
    trust: Positive = Field(0.001, description="of LARS and LARC: norm of a step at a learning rate of 1 over the tensor's")
    learning_rate: Positive = 0.05
    end_learning_rate: Annotated[float, Field(ge=0.0)] = 0.0
    warmup_epochs: Annotated[float, Field(ge=0.0)] = 0.0
    warmup_start: Annotated[float, Field(ge=0.0)] = Field(0.0, description="learning rate that a warm-up begins with")
    schedule: Literal["cosine", "steps"] = Field("cosine", description="steps: divided by 10 at intervals")
    decay_every: Count = Field(30, description="epochs between divisions of the learning rate by 10; unused by cosine")
    decay_after: tuple[Count, ...] = Field((), description="epochs after which it is multiplied by decay_factor, instead")
    decay_factor: Annotated[float, Field(gt=0.0, le=1.0)] = Field(0.1, description="of decay_after")
    cosine_per: Literal["step", "epoch"] = Field("step", description="epoch: the authors' stepwise cosine")
    momentum: Fraction = 0.9
    weight_decay: Annotated[float, Field(ge=0.0)] = 5e-4


class Training(Section):
    """How long and in what precision."""

    epochs: Count = 80
    batch_size: Annotated[int, Field(ge=2)] = Field(128, description="images per step over all processes")
    precision: Literal["float32", "tf32", "bfloat16", "float16"] = Field(
        "float32", description="number format of encoders and heads; float16 scales the loss"
    )
    monitor: bool = Field(False, description="online linear classifier on detached features (OBoW and MoCo: the teacher's)")


class FewShot(Section):
    """Prototype classification of frozen features (docs/method.md, section 11.2)."""

    classes: str = Field("all", description="all, or a key of DATA_ROOT/DATASET/lowshot_classes.json, or a file of class names")
    num_ways: Annotated[int, Field(ge=2)] = 50
    shots: tuple[Count, ...] = (1, 5)
    num_queries: Count = 1
    num_episodes: Annotated[int, Field(ge=2)] = 200
    sampler: Literal["authors", "counter"] = Field("authors", description="authors: Python's random.Random(0), as their code")


class Linear(Section):
    """Linear classifier on cached features of the centre crop and its flip (docs/method.md, section 11.3)."""

    epochs: Count = 50
    batch_size: Count = 256
    learning_rate: Positive = 10.0
    schedule: Literal["steps", "cosine"] = Field("steps", description="steps: divided by 10 at intervals; cosine: to 0")
    decay_every: Count = Field(15, description="epochs between divisions of the learning rate by 10; unused by cosine")
    cosine_per: Literal["step", "epoch"] = Field("step", description="epoch: the authors' stepwise cosine")
    momentum: Fraction = 0.9
    weight_decay: Annotated[float, Field(ge=0.0)] = 2e-6


class Knn(Section):
    """Cosine-weighted vote of the nearest training images."""

    num_neighbours: Count = 20
    temperature: Positive = 0.07


class Voc07Svm(Section):
    """Linear SVMs on features of images with several classes, as PASCAL VOC's (docs/transfer.md)."""

    features: Literal["pool5", "pool5_bn"] = Field(
        "pool5", description="pool5_bn: standardised by mean and variance of the training images"
    )
    view: Literal["stretched", "centre"] = Field("stretched", description="stretched: the whole image, made square")
    costs: tuple[Positive, ...] = Field(
        (0.05, 0.1, 0.3, 0.5, 1.0, 3.0, 5.0, *(2.0**-power for power in range(4, 20))),
        min_length=1,
        description="values of C that are tried; the first of equally good ones is taken",
    )
    num_folds: Annotated[int, Field(ge=2)] = Field(3, description="parts of the cross-validation that chooses C")
    positive_weight: Positive = Field(2.0, description="how much more an error on an image of the class costs")
    max_iterations: Count = Field(2000, description="of LIBLINEAR; a fit that reaches them is counted")


class Classes(Section):
    """The classifier that a supervised training has learned itself (docs/transfer.md)."""

    name: Literal["classes", "imagenet", "places205", "semi1", "semi10"] = Field(
        "classes", description="of the measurements: NAME_top1, ...; what the training is a protocol of"
    )
    ranks: tuple[Count, ...] = Field((1, 5), min_length=1, description="how many guesses an image has")


Protocol = Literal["fewshot", "linear", "knn", "voc07-svm", "classes", "voc-detection", "coco-detection"]


class Evaluation(Section):
    """What is measured, during training and once it is over; not part of a run's identity."""

    protocols: tuple[Protocol, ...] = ("fewshot", "linear", "knn")
    random_baseline: bool = Field(False, description="measure the untrained weights of the same seed as well")
    every_epochs: Annotated[int, Field(ge=0)] = Field(0, description="few-shot during training, every n epochs; 0: never")
    fewshot: FewShot = FewShot()
    linear: Linear = Linear()
    knn: Knn = Knn()
    voc07_svm: Voc07Svm = Voc07Svm()
    classes: Classes = Classes()


class Recipe(Section):
    """Everything that changes a result.

    Attributes:
        teacher: the recipe of the stage before, whose encoder the method starts from; None for a method that needs none.
    """

    title: str = ""
    data: Data = Data()
    views: Views = Views()
    backbone: Backbone = Backbone()
    method: AnyMethod = Obow()
    optimizer: Optimizer = Optimizer()
    training: Training = Training()
    evaluation: Evaluation = Evaluation()
    teacher: Recipe | None = None

    @model_validator(mode="after")
    def _stages_fit(self) -> Recipe:
        needs_teacher = self.method.name == "bownet"
        if needs_teacher and self.teacher is None:
            raise conflict(
                "method.name is bownet, which needs a stage before it: describe its training under [teacher]",
                keys=["method.name"],
            )
        if self.teacher is not None and not needs_teacher:
            raise conflict(
                f"[teacher] describes a stage before this one, but method.name {self.method.name} uses none", keys=["method.name"]
            )
        if self.teacher is not None and self.teacher.backbone != self.backbone:
            keys = [f"teacher.backbone.{name}" for name in Backbone.model_fields]
            raise conflict("teacher.backbone must be the same as backbone", keys=keys)
        return self

    def fingerprint(self, *, seed: int) -> str:
        """Return the SHA-256 (hex) that identifies a run: the resolved recipe and the seed.

        Title and evaluation are left out: they do not change the weights, and measuring again must not train again. So are
        settings at their default: a run keeps its identity when a later version knows one more setting.
        """
        return self.fingerprints(seeds=[seed])[seed]

    def fingerprints(self, *, seeds: Iterable[int]) -> dict[int, str]:
        """Return `fingerprint` for several seeds, by seed."""
        distinct = self._distinct()
        return {seed: canonical_hash({"version": FINGERPRINT_VERSION, "recipe": distinct, "seed": seed}) for seed in seeds}

    def training_settings(self) -> dict[str, Any]:
        """Return how the recipe trains, whatever it begins with and on whichever images: for the protocols that are trainings."""
        settings = self._distinct()
        settings["method"].pop("weights", None)
        return {name: settings.get(name, {}) for name in ("views", "method", "optimizer", "training")}

    def _distinct(self) -> dict[str, Any]:
        """Return what identifies the recipe, the stages before it included."""
        distinct = self.model_dump(mode="json", exclude={"title", "evaluation", "teacher"}, exclude_defaults=True)
        distinct["method"] = {"name": self.method.name, **distinct.get("method", {})}
        if self.teacher is not None:
            distinct["teacher"] = self.teacher._distinct()
        return distinct
