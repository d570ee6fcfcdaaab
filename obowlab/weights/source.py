"""Encoders by the names that a user has for them: a run, a weights file, a model version. Found without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from obowlab.config import Backbone
from obowlab.errors import UserError
from obowlab.runs.folder import RunFolder
from obowlab.runs.info import ENCODER_FILE
from obowlab.tracking.model import ModelVersion, find_model_version, is_model_version
from obowlab.weights import WEIGHTS_SUFFIXES
from obowlab.weights.info import EncoderInfo, beginning, peek

FOLDER = ".weights"
"""Folder of the run store that keeps encoders, see `weights.kept`."""


@dataclass(frozen=True)
class Source:
    """An encoder that is there and has not been read yet.

    Attributes:
        name: the run id, the file's path, or the address of the model version.
        folder: of the run; None for the others.
        path: of the weights file, a run's own one too; None for a model version.
        version: the model version; None for the others.
        info: what obowlab wrote into the file; None for a file of others, and for a model version.
    """

    name: str
    folder: RunFolder | None = None
    path: Path | None = None
    version: ModelVersion | None = None
    info: EncoderInfo | None = None

    @property
    def backbone(self) -> Backbone | None:
        """The network; None when only the weights themselves tell."""
        if self.version is not None:
            return self.version.recipe.backbone
        return self.info.backbone if self.info is not None else None


def find_source(ref: str, *, runs_root: Path, tracking_uri: str | None = None) -> Source:
    """Find the encoder of a run, a weights file or a model version.

    Args:
        ref: a run (its id, the beginning of one, or its folder), a weights file (obowlab's own, torchvision's or the authors'),
            or a model version of a run in MLflow, `models:/NAME/VERSION`.
        runs_root: the run store.
        tracking_uri: the MLflow store; that of the run store if absent.

    Raises:
        UserError: there is no such run, file or version, the run has no encoder yet, or the file cannot be one.
    """
    if is_model_version(ref):
        return Source(ref, version=find_model_version(ref, tracking_uri=tracking_uri, runs_root=runs_root))
    path = Path(ref)
    if path.is_file():
        return Source(ref, path=path, info=peek(path))
    if path.suffix in WEIGHTS_SUFFIXES and not path.is_dir():
        raise UserError(f"There is no weights file '{ref}'.")
    try:
        folder = RunFolder.find(ref, runs_root=runs_root)
    except UserError:
        if path.is_dir() and not (path / "run.json").exists():
            beginning(path)  # says what is in it
        raise
    file = folder.path / ENCODER_FILE
    if not file.is_file():
        raise UserError(f"Run '{folder.run_id}' has no encoder yet (it is {folder.state.status}); finish it with 'obowlab run'.")
    return Source(folder.run_id, folder=folder, path=file, info=peek(file))


def kept_path(identity: str, *, runs_root: Path) -> Path:
    """Return where an encoder of this identity is kept, or would be."""
    return runs_root / FOLDER / f"{identity}.safetensors"
