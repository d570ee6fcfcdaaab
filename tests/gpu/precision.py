"""Number formats by the names of the recipes, for tests and benchmarks."""

from obowlab.precision import AUTOCAST
from obowlab.precision import computing_in as precision

__all__ = ["HALVES", "PRECISIONS", "precision"]

PRECISIONS = ("float32", "tf32", "bfloat16", "float16")
HALVES = tuple(AUTOCAST)
