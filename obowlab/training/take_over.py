"""A run that continues where a training of the authors' code stopped: `obowlab weights continue`."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from obowlab.config import Loaded, Machine, Obow
from obowlab.errors import UserError
from obowlab.methods import OBoW
from obowlab.runs import provenance
from obowlab.runs.folder import RunFolder
from obowlab.runs.listing import has_run
from obowlab.runs.names import run_id_of
from obowlab.training import checkpoint as checkpoints
from obowlab.training.context import RunContext
from obowlab.training.distributed import World
from obowlab.training.loop import Trainer
from obowlab.training.reporter import Reporter
from obowlab.training.signals import StopRequest
from obowlab.weights.encoder_file import Imported, import_weights
from obowlab.weights.reading import read_weights
from obowlab.weights.released import authors_name


@dataclass(frozen=True)
class TakenOver:
    """What was made of the authors' checkpoint.

    Attributes:
        folder: the run, which `obowlab run` continues.
        step: updates done.
        total_steps: of the whole training.
        steps_per_epoch: by the recipe's batch and images.
        num_momenta: parameters whose momentum was taken over.
        notes: sentences on what the file does not have, or what is not used.
    """

    folder: RunFolder
    step: int
    total_steps: int
    steps_per_epoch: int
    num_momenta: int
    notes: tuple[str, ...]


def take_over(file: Path, *, loaded: Loaded, seed: int, machine: Machine, optimizer_file: Path | None = None) -> TakenOver:
    """Make a run of the authors' full model, with all that it holds, at the step that it had reached.

    Student, teacher, heads, kappa, vocabularies with their place in the queue, mu_MSD and the online classifier are the file's.
    Learning rate and teacher momentum follow from the step and the recipe. The images' order is that of the recipe's seed.

    Args:
        file: `model_net_checkpoint_*.pth.tar` of the authors' code.
        loaded: the recipe that goes on; delta_base, which the file does not hold, is the recipe's.
        seed: of the images' order and views from here on.
        machine: where images and runs are.
        optimizer_file: `model_optim_checkpoint_*.pth.tar` beside it; without it the momentum begins at 0.

    Raises:
        UserError: the file is no full model, does not fit the recipe, or says no step; the run is there already; the optimiser's
            file is of another model.
    """
    path = machine.runs_root / run_id_of(loaded, seed=seed)
    if has_run(path):
        raise UserError(f"{path} is there already: choose another --seed, or `obowlab runs delete {path.name}`.")
    imported = import_weights(file)
    step = _step(imported, file=file)
    _check_settings(imported, loaded=loaded, file=file)
    with tempfile.TemporaryDirectory(prefix="obowlab-") as scratch:
        trainer = _trainer(loaded, seed=seed, machine=machine, scratch=Path(scratch))
        if step >= trainer.total_steps:
            epochs = math.ceil((step + 1) / trainer.loader.steps_per_epoch)
            raise UserError(
                f"{file} has taken {step} steps, and the recipe ends at {trainer.total_steps}: there is nothing left to train. "
                f"--set training.epochs={epochs} or more continues it."
            )
        notes = _fill(trainer, imported=imported, file=file)
        momenta = {} if optimizer_file is None else read_momenta(optimizer_file, imported=imported)
        for name, parameter in trainer.method.named_parameters():
            if name in momenta:
                trainer.optimizer.state[parameter]["momentum_buffer"] = momenta[name].reshape(parameter.shape).clone()
        if optimizer_file is None:
            notes.append("The optimiser's momentum begins at 0; --optimizer FILE takes it over.")
        if step % trainer.loader.steps_per_epoch:
            notes.append(
                f"Step {step} is not the end of an epoch of {trainer.loader.steps_per_epoch} steps: were images and batch others?"
            )
        origin = imported.info.origin
        facts = {"taken_over_from": file.name, "taken_over_sha256": origin.sha256 if origin is not None else None}
        folder = RunFolder.create(loaded, seed=seed, runs_root=machine.runs_root)
        with folder.lock():
            state = checkpoints.Checkpoint(
                step=step,
                fingerprint=folder.info.fingerprint,
                data_hash=trainer.split.content_hash,
                method=trainer.method.state_dict(),
                optimizer=trainer.optimizer.state_dict(),
            )
            checkpoints.save(folder.path, checkpoint=state)
            attempt = folder.append_attempt({**provenance.environment(), **facts, "step": step})
            folder.set_state(
                status="interrupted",
                attempt=attempt,
                step=step,
                total_steps=trainer.total_steps,
                message=f"continues where {file.name} stopped",
            )
        return TakenOver(folder, step, trainer.total_steps, trainer.loader.steps_per_epoch, len(momenta), tuple(notes))


def read_momenta(path: Path, *, imported: Imported) -> dict[str, Tensor]:
    """Return the momentum of each parameter that the authors' optimiser file has, by our name.

    The file numbers the parameters that were trained, in the order of the model's file: student, then heads, then classifier.

    Args:
        path: of the optimiser's file.
        imported: the full model of the same step.

    Raises:
        UserError: it is no such file, or of another model.
    """
    method = imported.method
    assert method is not None
    content: Any = read_weights(path).content
    content = content.get("optimizer", content)
    groups, state = (content.get(key) if isinstance(content, Mapping) else None for key in ("param_groups", "state"))
    if not isinstance(groups, list) or not isinstance(state, Mapping):
        raise UserError(f"{path} holds no optimiser's state (keys 'optimizer', 'state', 'param_groups').")
    numbers = [number for group in groups for number in group["params"]]
    prefix = imported.found.network.prefix.removesuffix("feature_extractor.")
    order = {name.removeprefix(prefix): place for place, name in enumerate(imported.found.network.names)}
    ours = {authors_name(name, levels=method.method.levels): name for name, _ in method.named_parameters()}
    trained = [name for name in sorted(ours, key=lambda name: order.get(name, -1)) if not _stands_still(name)]
    if len(numbers) == len(trained) + 1 and "bow_predictor.scale" in order:  # kappa was a parameter that is learnt
        scale = order["bow_predictor.scale"]
        trained.insert(sum(order[name] < scale for name in trained), "bow_predictor.scale")
    if len(numbers) != len(trained):
        raise UserError(f"{path} is of {len(numbers)} parameters, and the model has {len(trained)} that are trained.")
    shapes = {name: parameter.shape for name, parameter in method.named_parameters()}
    momenta = {}
    for number, theirs in zip(numbers, trained, strict=True):
        buffer = state.get(number, {}).get("momentum_buffer")
        if buffer is None or theirs == "bow_predictor.scale":
            continue
        name = ours[theirs]
        if buffer.shape != shapes[name]:
            raise UserError(
                f"{path} is of another model: its parameter {number} has the shape {tuple(buffer.shape)}, "
                f"{theirs} has {tuple(shapes[name])}."
            )
        momenta[name] = buffer.float()
    return momenta


# -------------------------------------------------------------------------------------------------------------- helpers


def _stands_still(theirs: str) -> bool:
    return theirs.startswith("feature_extractor_teacher.") or theirs == "bow_predictor.scale"


def _step(imported: Imported, *, file: Path) -> int:
    """Return the steps that the authors' model has taken."""
    if imported.method is None:
        raise UserError(
            f"{file} holds an encoder alone: what can be continued is a full model, with teacher, heads and vocabulary. "
            "`obowlab weights import` makes an encoder file of it."
        )
    level = imported.method.method.levels[0]
    step = int(imported.method.get_buffer(f"vocabularies.{level}.inserted_at")[0])
    if step <= 0:
        raise UserError(f"{file} does not say how many steps it has taken (bow_extractor.bow_extractor.0._track_num_batches).")
    return step


def _check_settings(imported: Imported, *, loaded: Loaded, file: Path) -> None:
    """Refuse a recipe that describes another model than the file, naming what to set.

    Raises:
        UserError: lists every difference.
    """
    recipe, theirs = loaded.recipe, imported.method
    assert theirs is not None
    if not isinstance(recipe.method, Obow):
        raise UserError(f"{file} is a model of OBoW, and {loaded.name} trains {recipe.method.name}: name a recipe of OBoW.")
    pairs: dict[str, tuple[Any, Any]] = {
        "backbone.arch": (recipe.backbone.arch, imported.info.backbone.arch),
        "backbone.stem": (recipe.backbone.stem, imported.info.backbone.stem),
        "backbone.width": (recipe.backbone.width, imported.info.backbone.width),
        "method.levels": (list(recipe.method.levels), list(theirs.method.levels)),
        "backbone.padding": (recipe.backbone.padding, imported.info.backbone.padding),
        "method.num_words": (recipe.method.num_words, theirs.method.num_words),
        "method.vocabulary": (recipe.method.vocabulary, theirs.method.vocabulary),
        "method.head": (recipe.method.head, theirs.method.head),
        "method.head_batchnorm": (recipe.method.head_batchnorm, theirs.method.head_batchnorm),
    }
    different = {key: value for key, (asked, value) in pairs.items() if asked != value}
    kappas = [theirs.get_parameter(f"heads.{level}.kappa").item() for level in theirs.method.levels]
    was_learnt = not all(math.isclose(kappa, kappas[0], rel_tol=1e-6) for kappa in kappas)  # they begin alike
    if was_learnt and not recipe.method.learn_kappa:
        different["method.learn_kappa"] = "true"
    elif not was_learnt and not math.isclose(recipe.method.kappa, kappas[0], rel_tol=1e-6):
        different["method.kappa"] = round(kappas[0], 6)
    if theirs.monitor is None and recipe.training.monitor:
        different["training.monitor"] = "false"
    if different:
        texts = {key: str(value).lower() if isinstance(value, bool) else str(value) for key, value in different.items()}
        settings = " ".join(f"--set {key}={text.replace(' ', '')}" for key, text in texts.items())
        raise UserError(f"{file} is another model than {loaded.name} describes; these settings continue it: {settings}")


def _trainer(loaded: Loaded, *, seed: int, machine: Machine, scratch: Path) -> Trainer:
    """Build what `obowlab run` would train, in a folder that is thrown away."""
    folder = RunFolder.create(loaded, seed=seed, runs_root=scratch)
    machine = machine.model_copy(update={"device": "cpu", "procs": 1, "nodes": 1, "channels_last": False, "compile": False})
    world = World(rank=0, world_size=1, device=torch.device("cpu"))
    return Trainer(RunContext(folder, machine=machine, world=world, reporter=Reporter(None), stop=StopRequest()))


def _fill(trainer: Trainer, *, imported: Imported, file: Path) -> list[str]:
    """Put the file's state into the method, and return sentences on what has no place in it.

    Raises:
        UserError: the online classifier is of another number of classes.
    """
    theirs, ours = imported.method, trainer.method
    assert isinstance(theirs, OBoW)
    state, notes = theirs.state_dict(), []
    if theirs.monitor is not None and ours.monitor is None:
        state = {name: tensor for name, tensor in state.items() if not name.startswith("monitor.")}
        notes.append("Its online classifier is left out, as the recipe has none (training.monitor).")
    elif theirs.monitor is not None and ours.monitor is not None:
        classes, expected = len(state["monitor.fc.bias"]), len(ours.state_dict()["monitor.fc.bias"])
        if classes != expected:
            raise UserError(
                f"{file} has an online classifier of {classes} classes, and '{trainer.split.dataset}' has {expected}: name "
                "the data set that it was trained on (--set data.dataset=NAME), or leave it out: --set training.monitor=false"
            )
    ours.load_state_dict(state, strict=True)
    return notes
