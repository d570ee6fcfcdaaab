"""How representations are learned: one file per method, over pure mathematics (`bow`) and its state (`vocabulary`)."""

from typing import Any

from obowlab.methods.backbones import ResNet, build_backbone
from obowlab.methods.obow import OBoW
from obowlab.methods.protocol import Comm, Method, OneProcess, StepOutput

METHODS: dict[str, type[Method[Any]]] = {"obow": OBoW}
"""Every method by the name in `method.name`."""

__all__ = ["METHODS", "Comm", "Method", "OBoW", "OneProcess", "ResNet", "StepOutput", "build_backbone"]
