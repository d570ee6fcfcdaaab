"""The finished encoder as an MLflow model: a folder that loads without this package."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from obowlab.config import Recipe
from obowlab.errors import UserError
from obowlab.tracking.server import complaint, connect, fail_fast, refusal, store_uri

WEIGHTS = "model/data/model.pth"
"""The artifact of a run that holds the module and its weights."""

NEEDED = ("torch", "torchvision", "mlflow", "numpy")
"""The packages that a model needs where it is loaded."""

_SCHEME = "models:/"


@dataclass(frozen=True)
class ModelVersion:
    """An encoder that a run left in MLflow.

    Attributes:
        ref: its address, `models:/NAME/VERSION`.
        uri: of the store.
        mlflow_run_id: MLflow's id of the run.
        run_id: obowlab's id of the run.
        fingerprint: of the run.
        recipe: of the run.
    """

    ref: str
    uri: str
    mlflow_run_id: str
    run_id: str
    fingerprint: str
    recipe: Recipe


def is_model_version(ref: str) -> bool:
    """Return whether a text is meant as the address of a model version."""
    return ref.startswith(_SCHEME)


def find_model_version(ref: str, *, tracking_uri: str | None, runs_root: Path) -> ModelVersion:
    """Find a model version, with what its run says about it.

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
    with _answers(ref, uri=uri):
        client = connect(uri)
        version = client.get_model_version(parts[1], parts[2])
        run_id, fingerprint = version.tags.get("obowlab.run_id"), version.tags.get("obowlab.fingerprint")
        if run_id is None or fingerprint is None or version.run_id is None:
            raise UserError(f"{ref} was not made by obowlab: load it with mlflow.pytorch.load_model.")
        with tempfile.TemporaryDirectory() as folder:
            text = Path(client.download_artifacts(version.run_id, "recipe.json", folder)).read_text(encoding="utf-8")
    try:
        recipe = Recipe.model_validate_json(text)
    except ValueError:
        raise UserError(f"{ref} has a recipe of another version of obowlab; load it with mlflow.pytorch.load_model.") from None
    return ModelVersion(ref, uri, mlflow_run_id=version.run_id, run_id=run_id, fingerprint=fingerprint, recipe=recipe)


@contextmanager
def downloaded_weights(version: ModelVersion) -> Iterator[Path]:
    """Yield the torch file of a model version, which holds a pickled module (`save_encoder_model`).

    Raises:
        UserError: the store does not answer, or has no such file any more.
    """
    with tempfile.TemporaryDirectory() as folder:
        with _answers(version.ref, uri=version.uri, instead=f"; its run may still have the file: '{version.run_id}'"):
            path = Path(connect(version.uri).download_artifacts(version.mlflow_run_id, WEIGHTS, folder))
        yield path


@contextmanager
def _answers(ref: str, *, uri: str, instead: str = "") -> Iterator[None]:
    """Turn what a store raises into one sentence."""
    fail_fast()
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError) as error:
        raise UserError(f"Cannot load {ref} from {complaint(error, uri=uri)}{instead}.") from None


def save_encoder_model(encoder: Any, *, path: Path, example: Any, metadata: Mapping[str, Any] | None = None) -> None:
    """Write an encoder as an MLflow model directory for `mlflow.pytorch.load_model` and `mlflow.pyfunc.load_model`.

    The module is pickled whole: what is loaded can be trained, which a graph of torch.export cannot. So it must be made of
    classes that are there wherever it is loaded, those of torch and torchvision. The folder appears complete or not at all.
    This module imports no torch itself.

    Args:
        encoder: a torch module on the CPU that maps float32 [N, 3, H, W] to features [N, c], in evaluation mode.
        path: the folder to write, in one that is there; an existing one is replaced.
        example: float32 tensor [N, 3, H, W] to keep as the input example; MLflow writes it as text.
        metadata: JSON values to keep in the model's description.
    """
    import mlflow.pytorch
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    any_image = TensorSpec(np.dtype("float32"), (-1, example.shape[1], -1, -1))
    features = TensorSpec(np.dtype("float32"), (-1, encoder(example).shape[1]))
    with tempfile.TemporaryDirectory(prefix="obowlab-model-") as scratch:  # MLflow makes every folder of its path that is away
        whole = Path(scratch) / "model"
        fail_fast()
        mlflow.pytorch.save_model(
            encoder,
            str(whole),
            serialization_format="pickle",
            input_example=example.numpy(),
            signature=ModelSignature(inputs=Schema([any_image]), outputs=Schema([features])),
            pip_requirements=[f"{name}=={importlib.metadata.version(name)}" for name in NEEDED],
            metadata=dict(metadata or {}),
        )
        beside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            shutil.copytree(whole, beside / "model")
            if path.exists():
                shutil.rmtree(path)
            (beside / "model").replace(path)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
