"""Encoders as files: our own, and those others released."""

WEIGHTS_SUFFIXES = (".safetensors", ".pth", ".pt", ".tar")
"""How the names of weights files end."""
