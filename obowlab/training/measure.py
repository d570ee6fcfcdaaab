"""Measure an encoder outside of its training, for `obowlab eval`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from obowlab.config import Machine
from obowlab.evaluation import Result, evaluate
from obowlab.methods import build_backbone
from obowlab.runs.store import FEATURES
from obowlab.training.distributed import join
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
) -> list[Result]:
    """Measure the encoder of a run, a file or a model version.

    Args:
        subject: what is measured, and how.
        protocols: keys of `EVALUATORS`.
        dataset: another prepared data set than the recipe's.
        with_random: measure the untrained weights of the run's seed too.
        machine: where and with what.
        report: called with one line at a time.

    Raises:
        UserError: the encoder cannot be read, or does not fit the recipe named for it; as `evaluate`.
    """
    if machine.threads is not None:
        torch.set_num_threads(machine.threads)
    student = read_source(subject.source)
    subject.check(student.info.backbone)
    encoders = {"student": student.model}
    if with_random:
        assert subject.folder is not None
        encoders["random"] = build_backbone(subject.recipe.backbone, seed=subject.folder.info.seed)
    results = []
    with join(machine.model_copy(update={"procs": 1})) as world:
        for name, encoder in encoders.items():
            results += evaluate(
                encoder,
                recipe=subject.recipe,
                machine=machine,
                subject=name,
                cache_dir=machine.runs_root / FEATURES,
                protocols=protocols,
                dataset=dataset,
                device=world.device,
                report=report,
            )
    return results
