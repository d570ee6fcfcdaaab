"""How representations are learned: one file per method, over pure mathematics (`bow`) and its state (`vocabulary`)."""

from typing import Any

from obowlab.methods.backbones import ResNet, build_backbone, compile_encoders
from obowlab.methods.base import (
    Batch,
    Comm,
    LevelWords,
    Method,
    OneProcess,
    Preparation,
    StepOutput,
    VisualWords,
    build_student,
)
from obowlab.methods.bownet import BoWNet
from obowlab.methods.byol import BYOL
from obowlab.methods.detection.objects import Objects
from obowlab.methods.detector import DetectorTraining
from obowlab.methods.moco import MoCo
from obowlab.methods.obow import OBoW
from obowlab.methods.rotnet import RotNet
from obowlab.methods.simclr import SimCLR
from obowlab.methods.simsiam import SimSiam
from obowlab.methods.supervised import SupervisedTraining
from obowlab.methods.swav import SwAV

METHODS: dict[str, type[Method[Any]]] = {
    "obow": OBoW,
    "bownet": BoWNet,
    "rotnet": RotNet,
    "moco": MoCo,
    "supervised": SupervisedTraining,
    "detector": DetectorTraining,
    "simsiam": SimSiam,
    "byol": BYOL,
    "simclr": SimCLR,
    "swav": SwAV,
}
"""Every method by the name in `method.name`."""

__all__ = [
    "BYOL",
    "METHODS",
    "Batch",
    "BoWNet",
    "Comm",
    "DetectorTraining",
    "LevelWords",
    "Method",
    "MoCo",
    "OBoW",
    "Objects",
    "OneProcess",
    "Preparation",
    "ResNet",
    "RotNet",
    "SimCLR",
    "SimSiam",
    "StepOutput",
    "SupervisedTraining",
    "SwAV",
    "VisualWords",
    "build_backbone",
    "build_student",
    "compile_encoders",
]
