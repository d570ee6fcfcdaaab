"""obowlab: self-supervised learning by predicting online bags of visual words (Gidaris et al., CVPR 2021).

`load`, `embed`, `recipe` and `trainer` are what other code needs (docs/python.md). They are imported when they are first used:
`import obowlab` imports neither torch nor anything else.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from obowlab.config.loading import recipe
    from obowlab.training.stepwise import Steps, trainer
    from obowlab.weights.embedding import embed
    from obowlab.weights.encoder_file import Encoder, load

__version__ = "0.1.0"
__all__ = ["Encoder", "Steps", "embed", "load", "recipe", "trainer"]

_PLACES = {
    "Encoder": "obowlab.weights.encoder_file",
    "Steps": "obowlab.training.stepwise",
    "embed": "obowlab.weights.embedding",
    "load": "obowlab.weights.encoder_file",
    "recipe": "obowlab.config.loading",
    "trainer": "obowlab.training.stepwise",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'obowlab' has no attribute '{name}'")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
