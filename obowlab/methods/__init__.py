"""How representations are learned: one file per method, over pure mathematics (`bow`) and its state (`vocabulary`)."""

from obowlab.methods.backbones import ResNet, build_backbone
from obowlab.methods.obow import OBoW, check_views
from obowlab.methods.protocol import Comm, OneProcess, StepOutput

METHODS: dict[str, type[OBoW]] = {"obow": OBoW}
"""Every method by the name in `method.name`."""

__all__ = ["METHODS", "Comm", "OBoW", "OneProcess", "ResNet", "StepOutput", "build_backbone", "check_views"]
