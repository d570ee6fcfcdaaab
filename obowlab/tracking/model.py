"""The finished encoder as an MLflow model: a folder that loads without this package."""

from __future__ import annotations

import copy
import importlib.metadata
import json
import re
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from obowlab.errors import UserError
from obowlab.tracking.server import complaint, connect, fail_fast, refusal, store_uri

EXAMPLE_SIZE = 64
_SCHEME = "models:/"


@dataclass(frozen=True)
class ModelVersion:
    """An encoder that a run left in MLflow.

    Attributes:
        run_id: obowlab's id of the run.
        fingerprint: of the run.
        recipe_values: its recipe, JSON values.
        state: the weights by torchvision's names, tensors on the CPU.
    """

    run_id: str
    fingerprint: str
    recipe_values: Mapping[str, Any]
    state: Mapping[str, Any]


def is_model_version(ref: str) -> bool:
    """Return whether a text is meant as the address of a model version."""
    return ref.startswith(_SCHEME)


def read_model_version(ref: str, *, tracking_uri: str | None, runs_root: Path) -> ModelVersion:
    """Read the encoder of a model version back, with what its run says about it.

    Args:
        ref: `models:/NAME/VERSION`.
        tracking_uri: the MLflow store; that of the run store if absent.
        runs_root: the run store.

    Raises:
        UserError: the store does not answer, has no such version, or another program made it.
    """
    parts = re.fullmatch(r"models:/([^/@]+)/([0-9]+)", ref)
    if parts is None:
        raise UserError(f"'{ref}' is no model version: write models:/NAME/VERSION, as in models:/obowlab-demo/1.")
    uri = store_uri(tracking_uri, runs_root=runs_root)
    refused = refusal(uri)
    if refused is not None:
        raise UserError(refused)
    fail_fast()
    from mlflow.exceptions import MlflowException

    try:
        client = connect(uri)
        version = client.get_model_version(parts[1], parts[2])
        run_id, fingerprint = version.tags.get("obowlab.run_id"), version.tags.get("obowlab.fingerprint")
        if run_id is None or fingerprint is None or version.run_id is None:
            raise UserError(f"{ref} was not made by obowlab: load it with mlflow.pytorch.load_model.")
        with tempfile.TemporaryDirectory() as folder:
            recipe = Path(client.download_artifacts(version.run_id, "recipe.json", folder)).read_bytes()
            state = _state(Path(client.download_artifacts(version.run_id, "model", folder)))
    except (MlflowException, OSError) as error:
        raise UserError(f"Cannot load {ref} from {complaint(error, uri=uri)}.") from None
    return ModelVersion(run_id, fingerprint, recipe_values=json.loads(recipe), state=state)


def _state(folder: Path) -> dict[str, Any]:
    """Return the weights of a model folder, in memory of their own."""
    import mlflow.pytorch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = mlflow.pytorch.load_model(str(folder))
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


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
