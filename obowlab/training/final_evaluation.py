"""After the last training step: save the encoder and its classifier, make the model that MLflow registers, evaluate them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TypeVar

import safetensors.torch
import torch
from torch import Tensor, nn

from obowlab.config import Detector
from obowlab.config.methods import learns_from_labels
from obowlab.data.datasets import open_split
from obowlab.data.protocol_needs import left_out_lines
from obowlab.errors import UserError
from obowlab.evaluation import evaluate
from obowlab.files.replacing import write_atomic
from obowlab.methods import ResNet
from obowlab.methods.detection.two_stage import TwoStageDetector
from obowlab.methods.detector import detector_from
from obowlab.methods.supervised import classifier_from
from obowlab.runs.folder import RunFolder
from obowlab.runs.info import CLASSIFIER_FILE, DETECTOR_FILE, ENCODER_FILE, MODEL_FOLDER
from obowlab.runs.results import not_measured
from obowlab.runs.store import FEATURES
from obowlab.tracking.model import save_encoder_model
from obowlab.training.context import RunContext
from obowlab.training.loop import build, set_up_device, train
from obowlab.weights.encoder_file import read_encoder, save_encoder
from obowlab.weights.export import plain_network

EXAMPLE_SIZE = 64
"""The side of the images that the model keeps as an example, in pixels."""

PartT = TypeVar("PartT", bound=nn.Module)


@dataclass(frozen=True)
class Trained:
    """What a training leaves behind.

    Attributes:
        encoder: the network that was learnt.
        classifier: on its features, of a method that learns from labels; None for the others.
        detector: on it, of a method that learns one; None for the others.
    """

    encoder: ResNet
    classifier: nn.Module | None = None
    detector: TwoStageDetector | None = None


def trained(run: RunContext) -> Trained | None:
    """Train a run to its end and return its networks; of one that is trained already, those that were kept, on rank 0 alone.

    Raises:
        Interrupted, OtherRankFailed, UserError: as `train`.
    """
    kept = run.world.on_main(lambda: kept_networks(run))
    is_kept = run.world.all_gather(torch.tensor([int(kept is not None)], device=run.world.device)).any()
    if is_kept:
        return kept
    method = train(run)
    return Trained(method.encoder, method.own_classifier, method.own_detector)


def kept_networks(run: RunContext) -> Trained | None:
    """Return the networks that an earlier start kept, as training leaves them; None while some cannot be read."""
    try:
        found = read_networks(run.folder)
    except UserError as error:
        run.reporter.say(f"Warning: {error} It is made again from the checkpoint.")
        return None
    if found is None:
        return None
    set_up_device(run)
    run.reporter.say(f"{run.folder.run_id} is trained; measuring what is missing.")
    layout = torch.channels_last if run.machine.channels_last else torch.contiguous_format
    return replace(found, encoder=found.encoder.to(run.world.device).to(memory_format=layout))


def read_networks(folder: RunFolder) -> Trained | None:
    """Return the networks that a training left in its folder, on the CPU; None where one of them is not there.

    Raises:
        UserError: one is damaged.
    """
    path, config = folder.path, folder.info.recipe.method
    if not (path / ENCODER_FILE).is_file():
        return None
    encoder = read_encoder(path / ENCODER_FILE).model
    if learns_from_labels(config):
        classifier = _read_part(path / CLASSIFIER_FILE, make=classifier_from)
        return None if classifier is None else Trained(encoder, classifier=classifier)
    if isinstance(config, Detector):
        detector = _read_part(path / DETECTOR_FILE, make=partial(detector_from, encoder=encoder, config=config))
        return None if detector is None else Trained(encoder, detector=detector)
    return Trained(encoder)


def _read_part(path: Path, *, make: Callable[[dict[str, Tensor]], PartT]) -> PartT | None:
    """Return the kept network that `make` makes of its state dict; None where there is none, as in runs of earlier versions.

    Raises:
        UserError: the file is damaged.
    """
    if not path.is_file():
        return None
    try:
        return make(safetensors.torch.load_file(path))
    except (safetensors.SafetensorError, RuntimeError, KeyError):
        raise UserError(f"{path} is damaged.") from None


def keep(run: RunContext, *, networks: Trained) -> None:
    """Save the encoder and the classifier of a trained run, and the model that MLflow registers, if an earlier start did not.

    From the first of them on, the run is trained, whatever becomes of its evaluation.
    """
    run.stop.act_at_once()
    folder, recipe, encoder = run.folder, run.recipe, networks.encoder
    for name, network in ((CLASSIFIER_FILE, networks.classifier), (DETECTOR_FILE, networks.detector)):
        if network is not None:  # before the encoder, which says that the run is trained
            state = {key: tensor.detach().cpu().contiguous() for key, tensor in network.state_dict().items()}
            write_atomic(folder.path / name, safetensors.torch.save(state))
    info = save_encoder(
        encoder, path=folder.path / ENCODER_FILE, recipe=recipe, fingerprint=folder.info.fingerprint, source=folder.run_id
    )
    model_path = folder.path / MODEL_FOLDER
    if recipe.backbone.padding != "torchvision":
        run.reporter.say(
            f"No model version in MLflow: torchvision has no ResNet with padding '{recipe.backbone.padding}'; "
            f"obowlab weights export {folder.run_id} --out FOLDER writes one with its own module."
        )
    elif not model_path.exists():
        shown = {"resize": info.original_resize, "size": info.original_size, "mean": list(info.mean), "std": list(info.std)}
        about = {"obowlab.run_id": folder.run_id, "obowlab.fingerprint": folder.info.fingerprint, "obowlab.preprocessing": shown}
        side = min(info.original_size, EXAMPLE_SIZE)
        save_encoder_model(
            plain_network(encoder, info=info), path=model_path, example=torch.zeros(2, 3, side, side), metadata=about
        )


def measure(run: RunContext, *, networks: Trained) -> None:
    """Run the recipe's protocols that are missing, one by one, and save each result at once.

    Those that the images cannot carry are left out, with a line that says so.

    Raises:
        Interrupted: a signal came.
        UserError: some could not be measured; the others were.
    """
    recipe, machine = run.recipe, run.machine
    missing = not_measured(recipe, results=run.folder.results())
    problems = []
    if missing:
        for line in left_out_lines({name: why for name, why in run.left_out.items() if name in recipe.evaluation.protocols}):
            run.reporter.say(line)
    for subject, names in groupby(missing, key=itemgetter(0)):
        measured = networks
        if subject == "random":
            split = open_split(recipe.data.dataset, "train", data_root=machine.data_root, runs_root=machine.runs_root)
            measured = Trained(build(run, split=split, total_steps=1).encoder)
        for _, protocol in names:
            if protocol in run.left_out:
                continue
            try:
                measure_one(run, networks=measured, subject=subject, protocol=protocol)
            except UserError as error:
                problems.append(f"{subject}, {protocol}: {error}")
    if problems:
        rest = "The run is trained: the same command measures what is missing, also with other evaluation settings."
        raise UserError(" ".join([*problems, rest]))


def measure_one(run: RunContext, *, networks: Trained, subject: str, protocol: str) -> None:
    """Run a protocol on an encoder and save its result."""
    results = evaluate(
        networks.encoder,
        classifier=networks.classifier,
        detector=networks.detector,
        folder=run.folder,
        recipe=run.recipe,
        machine=run.machine,
        subject=subject,
        cache_dir=run.machine.runs_root / FEATURES,
        protocols=(protocol,),
        device=run.world.device,
        report=run.reporter.say,
    )
    for result in results:
        run.folder.add_result(result.to_json())
