"""Settings of the methods: one model each, chosen by `method.name`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from obowlab.config.base import Count, Fraction, Level, Positive, Section, conflict


class Obow(Section):
    """The method of the paper (docs/method.md)."""

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
            raise conflict("levels must name conv4, conv5 or both, each once", keys=["levels"])
        return self


class Bownet(Section):
    """BoWNet: the bag of visual words of a frozen teacher, over a vocabulary made once by k-means (paper, Table 5).

    The teacher is the encoder of the stage before (the recipe's `teacher`). What the paper leaves open (points and iterations
    of k-means) is noted beside each value.
    """

    name: Literal["bownet"] = "bownet"
    level: Level = Field("conv5", description="of the teacher's map that the words are made of")
    num_words: Annotated[int, Field(ge=2)] = 8192
    border: Annotated[int, Field(ge=0)] = Field(1, description="pixels dropped around the teacher's feature maps")
    pooling: Literal["max", "mean"] = "max"
    kmeans_points: Count = Field(64, description="local features per word that k-means is given; the paper does not say")
    kmeans_iterations: Count = Field(25, description="the paper does not say")


class Rotnet(Section):
    """RotNet: by how many quarter turns is a view rotated? Nothing to set."""

    name: Literal["rotnet"] = "rotnet"


class Moco(Section):
    """MoCo v2 (paper, Table 7): the last crop of an image is the key, every other view a query."""

    name: Literal["moco"] = "moco"
    queue_size: Annotated[int, Field(ge=2)] = Field(65536, description="keys of earlier images, the negatives")
    projection_size: Count = Field(128, description="length of queries and keys")
    temperature: Positive = 0.2
    teacher_momentum: Fraction = Field(0.999, description="of the encoder of the keys; constant")
    batchnorm_splits: Count = Field(8, description="equal parts of the global batch that are normalised apart, as on 8 GPUs")


class Supervised(Section):
    """Cross-entropy with the images' classes, from the seed's weights or from an encoder's (paper, Tables 6 and 8)."""

    name: Literal["supervised"] = "supervised"
    weights: str = Field(
        "", pattern=r"^([0-9a-f]{64})?$", description="SHA-256 of the encoder weights to begin with; empty: the seed's own"
    )
    trunk: Literal["trained", "frozen"] = Field(
        "trained", description="frozen: the classifier alone learns, on features of a network in evaluation mode"
    )
    trunk_rate: Positive = Field(1.0, description="times the learning rate, for everything below the classifier")
    head_start: Literal["uniform", "normal"] = Field(
        "uniform", description="of the classifier: PyTorch's initial values, or N(0, 0.01²) and a bias of 0"
    )
    head_batchnorm: bool = Field(False, description="normalise features before the classifier, without scale and shift")


class Detector(Section):
    """A detector that is fine-tuned from an encoder, for images of any size (paper, Tables 6 and 9; docs/detection.md).

    Faster R-CNN's head is the encoder's last stage (`c4`); Mask R-CNN stands on a feature pyramid and learns masks too (`fpn`).
    """

    name: Literal["detector"] = "detector"
    weights: str = Field(
        "", pattern=r"^([0-9a-f]{64})?$", description="SHA-256 of the encoder weights to begin with; empty: the seed's own"
    )
    architecture: Literal["c4", "fpn"] = Field("c4", description="c4: Faster R-CNN; fpn: Mask R-CNN, with masks")
    steps_per_epoch: Count = Field(1000, description="updates that count as an epoch: images come in an endless stream")
    sides: tuple[Count, ...] = Field(
        tuple(range(480, 801, 32)), min_length=1, description="one is drawn for the shorter side of a training image, pixels"
    )
    test_side: Count = Field(800, description="shorter side in the test, pixels")
    longest: Count = Field(1333, description="the longer side is at most this, pixels")
    anchors: tuple[Positive, ...] = Field(
        (32.0, 64.0, 128.0, 256.0, 512.0), min_length=1, description="sizes of anchors, pixels; fpn: one for each map"
    )
    pooled: Annotated[int, Field(ge=2)] = Field(14, description="c4: places on a side of a region before the last stage")
    head: Literal["moco", "infomin"] = Field(
        "moco", description="fpn: moco has two linear layers, infomin four convolutions, one linear layer and batch norms"
    )
    standard_side: Positive = Field(224.0, description="fpn: side of a region that is pooled from the third map, pixels")
    width: Count = Field(256, description="fpn: channels of the maps and of the heads' convolutions")
    head_width: Count = Field(1024, description="fpn: of the head's linear layers")
    regions: Annotated[int, Field(ge=4)] = Field(512, description="regions of an image that a step learns from")
    precise_batches: Annotated[int, Field(ge=0)] = Field(
        200, description="batches that give batch norms their statistics after the last step"
    )

    @model_validator(mode="after")
    def _one_size_a_map(self) -> Detector:
        if self.architecture == "fpn" and len(self.anchors) != 5:
            raise conflict(f"anchors has {len(self.anchors)} sizes, but a feature pyramid has five maps", keys=["anchors"])
        return self


class Simsiam(Section):
    """SimSiam: each crop of an image predicts the other; the values are those for ImageNet."""

    name: Literal["simsiam"] = "simsiam"
    projection_size: Count = Field(2048, description="length of projections and width of the hidden layers before them")
    projection_layers: Literal[2, 3] = Field(3, description="linear layers; 2 for CIFAR")
    prediction_size: Count = Field(512, description="width of the predictor's hidden layer")
    fixed_prediction_rate: bool = Field(True, description="the predictor keeps optimizer.learning_rate at every step")
    zero_residual: bool = Field(True, description="the scale of the last batch norm of every residual block starts at 0")


class Byol(Section):
    """BYOL: the student predicts the teacher's projection of the other crop; the values are those for ImageNet."""

    name: Literal["byol"] = "byol"
    projection_size: Count = Field(256, description="length of projections and predictions")
    hidden_size: Count = Field(4096, description="width of the hidden layer of projection and prediction")
    teacher_momentum: Fraction = Field(0.99, description="at the start; from there to 1 by a cosine")


class Simclr(Section):
    """SimCLR: each crop is told from all others of the batch by the other crop of its image; the values are for ImageNet."""

    name: Literal["simclr"] = "simclr"
    projection_size: Count = Field(128, description="length of projections")
    projection_layers: Literal[2, 3] = Field(2, description="linear layers; 3 in the second version of SimCLR")
    temperature: Positive = Field(0.1, description="0.5 for CIFAR")
    zero_residual: bool = Field(True, description="the scale of the last batch norm of every residual block starts at 0")


class Swav(Section):
    """SwAV: views of an image predict the balanced codes of its large crops; the values are those for ImageNet."""

    name: Literal["swav"] = "swav"
    hidden_size: Count = Field(2048, description="width of the projection's hidden layer")
    projection_size: Count = Field(128, description="length of projections and prototypes")
    num_prototypes: Annotated[int, Field(ge=2)] = 3000
    temperature: Positive = Field(0.1, description="of predictions")
    sinkhorn_epsilon: Positive = Field(0.05, description="temperature of codes")
    sinkhorn_iterations: Count = 3
    queue_size: Annotated[int, Field(ge=0)] = Field(
        0, description="earlier images that codes are balanced over too: for small batches, a multiple of them; 0: none"
    )
    queue_start_step: Annotated[int, Field(ge=0)] = Field(0, description="from which images are put into the queue")
    frozen_steps: Annotated[int, Field(ge=0)] = Field(0, description="steps in which prototypes stay as they began")


MethodSection = Obow | Bownet | Rotnet | Moco | Supervised | Detector | Simsiam | Byol | Simclr | Swav

METHOD_SECTIONS: dict[str, type[MethodSection]] = {
    "obow": Obow,
    "bownet": Bownet,
    "rotnet": Rotnet,
    "moco": Moco,
    "supervised": Supervised,
    "detector": Detector,
    "simsiam": Simsiam,
    "byol": Byol,
    "simclr": Simclr,
    "swav": Swav,
}
"""Settings of every method by the name in `method.name`."""

DEFAULT_METHOD = "obow"


def word_levels(method: MethodSection) -> tuple[Level, ...]:
    """Return the levels at which a method has visual words, in its order; none for one that learns without them."""
    if isinstance(method, Obow):
        return method.levels
    return (method.level,) if isinstance(method, Bownet) else ()


def learns_from_labels(method: MethodSection) -> bool:
    """Return whether a method needs the classes of the images."""
    return isinstance(method, Supervised)


def needs_classes(method: MethodSection) -> bool:
    """Return whether a method needs to know how many classes there are."""
    return isinstance(method, Supervised | Detector)


def _name_of(value: object) -> str:
    name = value.get("name", DEFAULT_METHOD) if isinstance(value, dict) else getattr(value, "name", "")
    return str(name)


AnyMethod = Annotated[
    Annotated[Obow, Tag("obow")]
    | Annotated[Bownet, Tag("bownet")]
    | Annotated[Rotnet, Tag("rotnet")]
    | Annotated[Moco, Tag("moco")]
    | Annotated[Supervised, Tag("supervised")]
    | Annotated[Detector, Tag("detector")]
    | Annotated[Simsiam, Tag("simsiam")]
    | Annotated[Byol, Tag("byol")]
    | Annotated[Simclr, Tag("simclr")]
    | Annotated[Swav, Tag("swav")],
    Discriminator(_name_of),
]
"""One of them; without a name it is OBoW."""
