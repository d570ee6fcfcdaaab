"""The finished encoder as an MLflow model: a folder that loads without this package."""

from __future__ import annotations

import copy
import importlib.metadata
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

from obowlab.tracking.server import fail_fast

EXAMPLE_SIZE = 64


def save_encoder_model(encoder: Any, *, path: Path, example: Any) -> None:
    """Write an encoder as an MLflow model directory for `mlflow.pytorch.load_model` and `mlflow.pyfunc.load_model`.

    The format is torch.export's: a graph without pickled code, frozen in evaluation mode, for any number of images and any
    size the encoder can take. (A pickled module would need this very package wherever it is loaded.) The folder appears
    complete or not at all. This module imports no torch itself.

    Args:
        encoder: a torch module that maps [N, 3, H, W] to features [N, c]; left as it is.
        path: the folder to write; an existing one is replaced.
        example: float32 tensor [N, 3, H, W] with N >= 2; only its shape counts.
    """
    import mlflow.pytorch
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    assert example.ndim == 4
    assert example.shape[0] >= 2, "a batch of one would be frozen into the graph"
    # A small example: MLflow keeps it as text beside the model.
    example = example[:2, :, :EXAMPLE_SIZE, :EXAMPLE_SIZE].detach().cpu().float().contiguous()
    frozen = copy.deepcopy(encoder).cpu().float().eval().requires_grad_(False)  # loads on any machine
    any_image = TensorSpec(np.dtype("float32"), (-1, example.shape[1], -1, -1))
    features = TensorSpec(np.dtype("float32"), (-1, frozen(example).shape[1]))
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        fail_fast()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.export on how it copies channels-last weights
            mlflow.pytorch.save_model(
                frozen,
                str(beside / "model"),
                serialization_format="pt2",
                input_example=example.numpy(),
                signature=ModelSignature(inputs=Schema([any_image]), outputs=Schema([features])),
                pip_requirements=[f"{name}=={importlib.metadata.version(name)}" for name in ("torch", "mlflow", "numpy")],
            )
        if path.exists():
            shutil.rmtree(path)
        (beside / "model").replace(path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
