"""How released weights files are laid out: one table of formats, as data. Imports no torch.

A file holds mappings of names to tensors, under keys of its own. A *network* is a ResNet found in one of these mappings; it has
the keys that lead to the mapping, a prefix that its names share, and a *naming* (`obowlab.weights.naming`). What stands beside
it is set aside under a known name, or is left over, which is an error.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Mean = tuple[float, float, float]
Scheme = Literal["torchvision", "obow", "detectron2", "simclr-tf", "haiku"]

CONTAINERS: tuple[tuple[str, ...], ...] = (
    ("classy_state_dict", "base_model", "model", "trunk"),
    ("network",),
    ("state_dict",),
    ("teacher",),
    ("model",),
    ("model_state_dict",),
    (),
)
"""Where the state dict of the encoder is, in order of preference; a network elsewhere is read if it is the only one."""

PREFIXES = ("encoder_q", "base_encoder", "backbone", "trunk", "encoder", "feature_extractor")
"""Parts of names that lead to the encoder, in order of preference."""

OTHER_NETWORKS = (
    *("encoder_k", "momentum_encoder", "target_net", "momentum_backbone", "backbone_momentum"),
    *("student_backbone", "feature_extractor_teacher"),
)
"""Parts of names that lead to a second network, which is read only if it is asked for by name."""

SET_ASIDE = {
    r"fc|classifier|online_classifier|linear_classifier|linear": "a classifier or projector",
    r"heads?|head_jig|jigsaw_head": "a head",
    r"neck|projector|projection_head\w*|head_supervised": "a projector",
    r"predictor|prediction_head": "a predictor",
    r"prototypes?": "prototypes",
    r"queue\w*": "a queue of features",
    r"bn": "a batch norm of the loss",
    r"momentum_\w+|student_\w+|teacher_\w+": "a part of another network",
    r"bow_extractor|bow_predictor|_alpha|_iteration": "a part of the authors' method",
}
"""What may stand beside an encoder, by the first part of its name, and what it is."""

TRAPS = {
    r"^(module\.)?net\.0\.|^(module\.)?net\.[1-4]\.blocks\.": "it holds SimCLR v2, whose selective kernels obowlab lacks",
    r"(^|\.)encoder1\.|(^|\.)encoder2\.": "it holds the two half-size networks of CMC, which see the channels of Lab",
    r"\bblock[1-4]-part\d": "it holds a RegNet, not a ResNet",
    r"(^|\.)(patch_embed|cls_token)\b": "it holds a vision transformer, not a ResNet",
    r"\bse\.(conv|fc)\d": "it holds a ResNet with squeeze-and-excitation, which obowlab lacks",
}
"""Networks that are recognised by a name and not read, with what they are."""

WRAPPERS = ("module.", "_orig_mod.")
"""What data parallelism and `torch.compile` put before names."""


@dataclass(frozen=True)
class Release:
    """A format in which weights were released.

    Attributes:
        key: for `--as`.
        title: what it is.
        container: regular expression of the keys that lead to the state dict, joined by `>`.
        prefix: regular expression of what stands before the encoder's names, without `WRAPPERS`.
        scheme: how the encoder's tensors are called.
        beside: regular expressions; each fits at least one of the names beside the encoder, written `NAME SHAPE`.
        top: keys that the file has beside the state dict.
        licence: of the files that their authors released.
        mean: subtracted from pixels in [0, 1]; None is ImageNet's.
        std: divides them; None is ImageNet's.
        padding: that the network was trained with.
        is_asked_for: nothing in the file tells this format from another; only `--as` chooses it.
    """

    key: str
    title: str
    licence: str
    container: str = ""
    prefix: str = ""
    scheme: Scheme = "torchvision"
    beside: tuple[str, ...] = ()
    top: tuple[str, ...] = ()
    mean: Mean | None = None
    std: Mean | None = None
    padding: Literal["torchvision", "same"] = "torchvision"
    is_asked_for: bool = False


NON_COMMERCIAL = "CC BY-NC 4.0"
BARE = "(state_dict|model)?"
SIMCLR_PIXELS: tuple[Mean, Mean] = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
"""SimCLR's pixels are in [0, 1]."""

RELEASES: tuple[Release, ...] = (
    Release("obow", "OBoW, full model", "MIT", "network", r"feature_extractor\.", "obow", beside=(r"bow_predictor\..*",)),
    Release("obow-extractor", "OBoW, feature extractor", "MIT", "network", "", "obow"),
    Release("obow-torchvision", "OBoW, torchvision file", "MIT", "network", ""),
    Release("moco-v3", "MoCo v3", NON_COMMERCIAL, "state_dict", r"base_encoder\."),
    Release("pcl-v1", "PCL v1", "MIT", "state_dict", r"encoder_q\.", beside=(r"queue 128x16384", r"fc\.weight .*")),
    Release("pcl-v2", "PCL v2", "MIT", "state_dict", r"encoder_q\.", beside=(r"queue 128x16384", r"fc\.0\.weight .*")),
    Release("moco-v1", "MoCo v1", NON_COMMERCIAL, "state_dict", r"encoder_q\.", beside=(r"fc\.weight .*",)),
    Release("moco-v2", "MoCo v2", NON_COMMERCIAL, "state_dict", r"encoder_q\.", beside=(r"fc\.0\.weight .*",)),
    Release("simsiam", "SimSiam", NON_COMMERCIAL, "state_dict", r"encoder\.", beside=(r"predictor\.0\..*",)),
    Release("dino", "DINO, full checkpoint", "Apache-2.0", "teacher|student", r"(backbone\.)?", top=("teacher",)),
    Release(
        "barlow-twins",
        "Barlow Twins, checkpoint",
        "MIT",
        "model",
        r"backbone\.",
        beside=(r"projector\..*", r"bn\..*"),
    ),
    Release("vicreg", "VICReg, checkpoint", "MIT", "model", r"backbone\.", beside=(r"projector\..*",)),
    Release("infomin", "PyContrast: InfoMin, MoCo, PIRL, InsDis", "BSD-2-Clause", "model|model_ema", r"encoder\."),
    Release("swav", "SwAV", NON_COMMERCIAL, "", "", beside=(r"(prototypes|projection_head)\..*",), std=(0.228, 0.224, 0.225)),
    Release(
        "vissl",
        "VISSL: PIRL, SimCLR, MoCo v2, supervised",
        "MIT",
        "(classy_state_dict>base_model>model>trunk|model_state_dict|)",
        r"(base_model\.)?_feature_blocks\.",
    ),
    Release("mmpretrain", "mmpretrain, mmselfsup", "Apache-2.0", "state_dict", r"backbone\.", top=("meta",)),
    Release(
        "solo-learn",
        "solo-learn (Lightning)",
        "MIT",
        "state_dict",
        r"backbone\.",
        beside=(r"(projector|predictor|prototypes|momentum_\w+)\..*",),
    ),
    Release(
        "lightly",
        "lightly (Lightning)",
        "MIT",
        "state_dict",
        r"(backbone|student_backbone)\.",
        beside=(r"(projection_head|online_classifier|student_\w+)\..*",),
    ),
    Release("detectron2", "Detectron2's names", "as its source", "(model)?", r"(backbone\.bottom_up\.)?", "detectron2"),
    Release("simclr-tf", "SimCLR v1, TensorFlow's variables", "Apache-2.0", "", "", "simclr-tf", (), (), *SIMCLR_PIXELS),
    Release("byol-haiku", "BYOL, DeepMind's arrays", NON_COMMERCIAL, "", r"(.*/)?", "haiku", padding="same"),
    Release(
        "simclr",
        "SimCLR v1, by simclr-converter",
        "Apache-2.0",
        BARE,
        "",
        "torchvision",
        (),
        (),
        *SIMCLR_PIXELS,
        is_asked_for=True,
    ),
    Release("byol", "BYOL, by byol-convert", NON_COMMERCIAL, BARE, "", padding="same", is_asked_for=True),
    Release("dino-backbone", "DINO, backbone", "Apache-2.0", BARE, "", is_asked_for=True),
    Release("barlow-twins-backbone", "Barlow Twins, backbone", "MIT", BARE, "", is_asked_for=True),
    Release("vicreg-backbone", "VICReg, backbone", "MIT", BARE, "", is_asked_for=True),
    Release("timm", "timm", "per model card", BARE, "", is_asked_for=True),
    Release("torchvision", "torchvision's names", "BSD-3-Clause (of torchvision's own files)", BARE, ""),
)
"""The formats, the particular ones first: a file is of the first that fits."""

RELEASE_KEYS = tuple(release.key for release in RELEASES)


def set_aside_as(name: str) -> str | None:
    """Return what a tensor beside the encoder is; None for what has no place in an import.

    Args:
        name: without what it shares with the encoder's names.
    """
    first = re.split(r"[./]", name, maxsplit=1)[0]
    return next((what for pattern, what in SET_ASIDE.items() if re.fullmatch(pattern, first)), None)
