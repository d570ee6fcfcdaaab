"""Whether sections of a recipe fit each other; no torch.

Asked before anything begins, in a dry run too (`launch.preflight`), and again where a method is built.
"""

from __future__ import annotations

import math

from obowlab.config.base import Level, Section
from obowlab.config.methods import Bownet, Byol, Detector, Moco, Obow, Rotnet, Simclr, Simsiam, Supervised, Swav
from obowlab.config.recipe import Backbone, Recipe, Views
from obowlab.errors import UserError

OF_TWO_CROPS: dict[type[Section], str] = {Simsiam: "SimSiam", Byol: "BYOL", Simclr: "SimCLR"}
"""The methods that compare two crops of an image and look at nothing else, with their names."""


def check_settings(recipe: Recipe, *, num_images: int | None) -> None:
    """Refuse a recipe that could not be trained on any machine; how many processes there are is `check_procs`.

    Args:
        recipe: of one stage.
        num_images: trained on; None when unknown.

    Raises:
        UserError: names the setting to change.
    """
    method, batch_size = recipe.method, recipe.training.batch_size
    check_views(method, backbone=recipe.backbone, views=recipe.views)
    check_batch(method, batch_size=batch_size, world_size=1)
    if num_images is None:
        return
    if num_images < batch_size:
        raise UserError(f"training.batch_size ({batch_size}) is larger than the training set ({num_images} images): lower it.")
    if isinstance(method, Bownet):
        side = map_size(recipe.backbone, level=method.level, image_size=recipe.views.original_size) - 2 * method.border
        refuse_few_features(method, num_features=num_images * side**2, num_images=num_images)


def check_views(method: Section, *, backbone: Backbone, views: Views) -> None:
    """Refuse views that a method cannot work on; settings of a method that is not obowlab's own pass.

    Raises:
        UserError: a map is too small for the vocabulary; cutmix is on without targets to mix; there is no pair of views.
    """
    if isinstance(method, Obow | Bownet):
        for level in method.levels if isinstance(method, Obow) else (method.level,):
            refuse_small_map(method, level=level, size=map_size(backbone, level=level, image_size=views.original_size))
    elif isinstance(method, Rotnet):
        _refuse_cutmix("RotNet", views=views)
    elif isinstance(method, Moco):
        _refuse_cutmix("MoCo", views=views)
        if views.num_crops == 0 or views.num_crops + views.num_patches + views.num_small_crops < 2:
            raise UserError(
                f"MoCo needs one crop as the key and another view as the query, but views.num_crops is {views.num_crops} and "
                f"views.num_patches {views.num_patches}: set views.num_crops to 2."
            )
    elif type(method) in OF_TWO_CROPS:
        _refuse_all_but_two_crops(OF_TWO_CROPS[type(method)], views=views)
    elif isinstance(method, Swav):
        _refuse_cutmix("SwAV", views=views)
        if views.num_crops < 2:
            raise UserError(
                f"SwAV assigns two crops of an image to prototypes, but views.num_crops is {views.num_crops}: set it to 2. "
                "Further views are views.num_small_crops."
            )
        if views.num_patches:
            raise UserError(
                f"SwAV has no use for views.num_patches ({views.num_patches}): set it to 0; its small views are "
                "views.num_small_crops."
            )


def check_batch(method: Section, *, batch_size: int, world_size: int) -> None:
    """Refuse groups of batch-norm that are not equally large, lie across processes, or hold a single image; and uneven queues.

    Raises:
        UserError: names the setting to change.
    """
    if isinstance(method, Swav) and method.queue_size % batch_size:
        raise UserError(
            f"method.queue_size ({method.queue_size}) must be a multiple of training.batch_size ({batch_size}), as whole batches "
            f"enter and leave the queue: set it to {max(1, method.queue_size // batch_size) * batch_size}, or to 0 for none."
        )
    if not isinstance(method, Moco):
        return
    splits = method.batchnorm_splits
    if batch_size % splits or batch_size < 2 * splits:
        raise UserError(
            f"method.batchnorm_splits ({splits}) must divide training.batch_size ({batch_size}) into groups of two images "
            "or more: change either."
        )
    _refuse_uneven("method.batchnorm_splits", splits, procs=world_size)


def check_procs(recipe: Recipe, *, procs: int) -> None:
    """Refuse a number of processes over which a recipe's batches, or its groups of batch-norm, cannot be shared out evenly.

    Raises:
        UserError: names the setting that stands against it.
    """
    check_share(recipe.training.batch_size, procs=procs, in_pairs=recipe.views.cutmix_probability > 0)
    if isinstance(recipe.method, Moco):
        _refuse_uneven("method.batchnorm_splits", recipe.method.batchnorm_splits, procs=procs)
    if recipe.training.monitor and recipe.training.batch_size == procs:
        raise UserError(
            f"training.monitor normalises over a process's images, but training.batch_size ({procs}) over {procs} process(es)"
            " gives each a single one: raise training.batch_size, or set training.monitor to false."
        )


def check_share(batch_size: int, *, procs: int, in_pairs: bool = False) -> None:
    """Refuse a batch that cannot be shared out evenly over the processes.

    Args:
        batch_size: images of a step.
        procs: how many processes share it.
        in_pairs: whether each needs an even number of images, for cutmix.

    Raises:
        UserError: names the setting to change.
    """
    _refuse_uneven("training.batch_size", batch_size, procs=procs)
    if in_pairs and batch_size // procs % 2:
        raise UserError(
            f"cutmix mixes pairs of images, but training.batch_size ({batch_size}) over {procs} process(es) gives each an odd "
            f"share: make training.batch_size a multiple of {2 * procs}, or change --procs or --gpus."
        )


def check_cpu(recipe: Recipe) -> None:
    """Refuse views of which PyTorch 2.14.1 computes wrong gradients on a CPU, or crashes.

    In bfloat16, a 3x3 convolution with a stride on a map of 1x1 gives its outer weights gradients from memory that was never
    written. In float32, a 1x1 convolution with a stride and fewer than 16 channels writes beyond its memory on maps of 56x56 and
    more. Detectors see images of another layout, of which the second is not true, and a frozen trunk has no gradients.

    Raises:
        UserError: names the setting to change.
    """
    views, backbone, precision = recipe.views, recipe.backbone, recipe.training.precision
    if isinstance(recipe.method, Detector) or (isinstance(recipe.method, Supervised) and recipe.method.trunk == "frozen"):
        return
    sides = {
        "views.crop_size" if views.crop_extent == "part" else "views.original_size": views.cut_size if views.num_crops else 0,
        "views.patch_size": views.patch_size if views.num_patches else 0,
        "views.small_crop_size": views.small_crop_size if views.num_small_crops else 0,
    }
    expansion = 4 if backbone.arch == "resnet50" else 1
    for setting, side in sides.items():
        if not side:
            continue
        first = -(-side // 4) if backbone.stem == "imagenet" else side
        inputs = [-(-first // halved) for halved in (1, 2, 4)]  # of the stages that begin with a stride
        if precision == "bfloat16" and 1 in inputs:
            raise UserError(
                f"On a CPU, PyTorch computes wrong gradients in bfloat16 where a stage begins with a map of 1x1, as of {setting} "
                f"{side} with backbone.stem {backbone.stem}: set training.precision to float32, or a larger size."
            )
        narrow = [at for number, at in enumerate(inputs) if backbone.width * expansion * 2**number < 16 and at >= 56]
        if precision in ("float32", "tf32") and narrow:
            raise UserError(
                f"On a CPU, PyTorch crashes in {precision} where a stage of fewer than 16 channels begins with a map of "
                f"{narrow[0]}x{narrow[0]}, as of {setting} {side} with backbone.width {backbone.width}: set backbone.width to 16"
                " or a smaller size."
            )


def _refuse_uneven(name: str, value: int, *, procs: int) -> None:
    if value % procs:
        raise UserError(
            f"{name} ({value}) must be a multiple of the number of processes ({procs}): change --procs or --gpus, or the "
            "setting, which makes another run."
        )


def map_size(backbone: Backbone, *, level: Level, image_size: int) -> int:
    """Return the side of a level's feature map for square images: every halving rounds up."""
    halvings = {"conv4": 2, "conv5": 3}[level] + (2 if backbone.stem == "imagenet" else 0)
    return math.ceil(image_size / (1 << halvings))


def refuse_small_map(method: Obow | Bownet, *, level: Level, size: int) -> None:
    """Refuse a square map [size, size] of which the border leaves less than the vocabulary is made of.

    Raises:
        UserError: names the settings to change.
    """
    averages = isinstance(method, Obow) and method.vocabulary == "queue" and method.queue_vector == "local_average"
    needed, left = 3 if averages else 1, max(0, size - 2 * method.border)
    if left < needed:
        raise UserError(
            f"The {level} map of the original view is {size}x{size}, method.border = {method.border} leaves {left}x{left}, the "
            f"vocabulary needs {needed}x{needed}: lower method.border or raise views.original_size."
        )


def refuse_few_features(method: Bownet, *, num_features: int, num_images: int) -> None:
    """Refuse images that have fewer local features than there are to be words.

    Raises:
        UserError: names the settings to change.
    """
    if num_features < method.num_words:
        raise UserError(
            f"The {num_images} training images have {num_features} local features in all, too few for "
            f"{method.num_words} words: lower method.num_words or method.border, or train on more images."
        )


def _refuse_all_but_two_crops(name: str, *, views: Views) -> None:
    _refuse_cutmix(name, views=views)
    if (views.num_crops, views.num_patches) != (2, 0):
        raise UserError(
            f"{name} compares two crops of an image, but views.num_crops is {views.num_crops} and views.num_patches "
            f"{views.num_patches}: set views.num_crops to 2 and views.num_patches to 0."
        )
    if views.num_small_crops:
        raise UserError(f"{name} has no use for views.num_small_crops ({views.num_small_crops}): set it to 0.")


def _refuse_cutmix(name: str, *, views: Views) -> None:
    if views.cutmix_probability:
        raise UserError(f"{name} has no targets that cutmix could mix: set views.cutmix_probability to 0.0.")
