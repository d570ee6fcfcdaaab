"""Recipe and Machine: everything that changes a result, and everything that must not.

A `Recipe` (`recipe`, `methods`) is read from TOML (`experiments/NAME.toml`, with `extends`) and sparse overrides (`files`). A
`Machine` (`machine`) says where and with what a run is computed; no field of it may change a result beyond the order of float
sums.
"""

from obowlab.config.base import Count, Fraction, Level, Padding, Positive, Range, Section, canonical_hash
from obowlab.config.loading import (
    Loaded,
    find_file,
    find_recipe,
    flatten,
    layer,
    load_recipe,
    parse_override,
    project_root,
    recipe_files,
    recipe_from_values,
)
from obowlab.config.machine import Machine, Slurm, load_machine
from obowlab.config.methods import METHOD_SECTIONS, Bownet, MethodSection, Moco, Obow, Rotnet, Simsiam, Supervised, Swav
from obowlab.config.recipe import (
    FINGERPRINT_VERSION,
    Backbone,
    CropView,
    Data,
    Evaluation,
    FewShot,
    Knn,
    Linear,
    Optimizer,
    Recipe,
    Training,
    Views,
)
from obowlab.config.validation import known_keys, nearest, parse_section, read_toml, set_by

__all__ = [
    "FINGERPRINT_VERSION",
    "METHOD_SECTIONS",
    "Backbone",
    "Bownet",
    "Count",
    "CropView",
    "Data",
    "Evaluation",
    "FewShot",
    "Fraction",
    "Knn",
    "Level",
    "Linear",
    "Loaded",
    "Machine",
    "MethodSection",
    "Moco",
    "Obow",
    "Optimizer",
    "Padding",
    "Positive",
    "Range",
    "Recipe",
    "Rotnet",
    "Section",
    "Simsiam",
    "Slurm",
    "Supervised",
    "Swav",
    "Training",
    "Views",
    "canonical_hash",
    "find_file",
    "find_recipe",
    "flatten",
    "known_keys",
    "layer",
    "load_machine",
    "load_recipe",
    "nearest",
    "parse_override",
    "parse_section",
    "project_root",
    "read_toml",
    "recipe_files",
    "recipe_from_values",
    "set_by",
]
