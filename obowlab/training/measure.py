"""Measure an encoder outside of its training, for `obowlab eval`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from obowlab.config import Machine
from obowlab.errors import UserError
from obowlab.evaluation import Result, evaluate
from obowlab.methods import build_student
from obowlab.runs.results import LEARNED
from obowlab.runs.store import FEATURES
from obowlab.training.distributed import join
from obowlab.training.final_evaluation import Trained, read_networks
from obowlab.weights.encoder_file import read_source
from obowlab.weights.subject import Subject


def measure(
    subject: Subject,
    *,
    protocols: Sequence[str],
    dataset: str | None,
    with_random: bool,
    machine: Machine,
    report: Callable[[str], None],
    keep: Callable[[Result], None],
) -> list[Result]:
    """Measure the encoder of a run, a file or a model version.

    Args:
        subject: what is measured, and how.
        protocols: keys of `EVALUATORS`.
        dataset: another prepared data set than the recipe's.
        with_random: measure the untrained weights of the run's seed too.
        machine: where and with what.
        report: called with one line at a time.
        keep: called with every result as soon as there is one.

    Raises:
        UserError: the encoder, or what was learned on it, cannot be read, or does not fit the recipe named for it; as `evaluate`.
    """
    if machine.threads is not None:
        torch.set_num_threads(machine.threads)
    folder = subject.folder
    if set(protocols) & set(LEARNED):
        assert folder is not None, "refused before"
        student = read_networks(folder)
        if student is None:
            raise UserError(f"{folder.run_id} has not kept what it learned: continue it with 'obowlab run'.")
    else:
        encoder = read_source(subject.source)
        subject.check(encoder.info.backbone)
        student = Trained(encoder.model)
    networks = {"student": (student, list(protocols))}
    if with_random:
        assert folder is not None
        untrained = build_student(subject.recipe.method, backbone=subject.recipe.backbone, seed=folder.info.seed)
        networks["random"] = Trained(untrained), [name for name in protocols if name not in LEARNED]
    results = []
    with join(machine.model_copy(update={"procs": 1})) as world:
        for name, (found, wanted) in networks.items():
            results += evaluate(
                found.encoder,
                classifier=found.classifier,
                detector=found.detector,
                folder=folder,
                recipe=subject.recipe,
                machine=machine,
                subject=name,
                cache_dir=machine.runs_root / FEATURES,
                protocols=wanted,
                dataset=dataset,
                device=world.device,
                report=report,
                keep=keep,
            )
    return results
