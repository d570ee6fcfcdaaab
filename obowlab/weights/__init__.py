"""Encoders as files: our own, and those others released."""
