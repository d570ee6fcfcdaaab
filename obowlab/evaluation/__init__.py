"""Measures of frozen features. `EVALUATORS` lists them; `evaluate` runs them on one encoder.

Every number is a function of the weights, the images and the settings: probes have a fixed seed, and a result names the hash
of each of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from obowlab import text
from obowlab.config import Evaluation, Machine, Recipe, canonical_hash, nearest
from obowlab.errors import UserError
from obowlab.evaluation.evaluators import EVALUATORS, PROBE_SEED, Evaluator, Learned, Outcome
from obowlab.evaluation.features import FeatureStore, View
from obowlab.evaluation.result import Measurement, Result
from obowlab.methods.detection.two_stage import TwoStageDetector
from obowlab.precision import full_precision
from obowlab.runs.folder import RunFolder
from obowlab.views.loaders import num_workers
from obowlab.views.views import MEAN, STD

__all__ = ["EVALUATORS", "PROBE_SEED", "Evaluator", "Measurement", "Outcome", "Result", "evaluate", "views_needed"]


def evaluate(
    encoder: nn.Module,
    *,
    recipe: Recipe,
    machine: Machine,
    subject: str,
    cache_dir: Path,
    protocols: Sequence[str] | None = None,
    dataset: str | None = None,
    classifier: nn.Module | None = None,
    detector: TwoStageDetector | None = None,
    folder: RunFolder | None = None,
    device: torch.device,
    report: Callable[[str], None],
    keep: Callable[[Result], None] = lambda _: None,
) -> list[Result]:
    """Measure an encoder and return one result per protocol.

    The encoder is used in evaluation mode, in float32 and without gradients, and keeps the modes it came with.

    Args:
        encoder: maps float32 [B, 3, S, S] to pooled features [B, c]; moved to `device`.
        recipe: its `evaluation` holds the settings, its `views` and `data` say what is seen.
        machine: data root, loader backend, workers and memory layout.
        subject: whose weights these are, `student` or `random`.
        cache_dir: where features are kept.
        protocols: keys of `EVALUATORS`; the recipe's if absent.
        dataset: another prepared data set than the recipe's.
        classifier: that a supervised training has learned on the encoder's features, for `classes`; moved to `device`.
        detector: that a training has learned, for `voc-detection` and `coco-detection`; moved to `device`.
        folder: of the run that learned it, for pictures of its test; none are made if absent.
        device: where to compute.
        report: called with one line at a time.
        keep: called with every result as soon as there is one.

    Raises:
        UserError: an unknown protocol, or data and settings that do not go together.
    """
    names = recipe.evaluation.protocols if protocols is None else tuple(protocols)
    for name in names:
        if name not in EVALUATORS:
            raise UserError(f"There is no protocol '{name}'.{nearest(name, list(EVALUATORS))}")
    store = FeatureStore(
        encoder.to(device),
        recipe=recipe,
        dataset=dataset,
        data_root=machine.data_root,
        runs_root=machine.runs_root,
        cache_dir=cache_dir,
        device=device,
        backend=machine.loader,
        workers=num_workers(machine),
        channels_last=machine.channels_last,
        report=report,
    )
    learned = Learned(
        classifier=None if classifier is None else classifier.to(device).eval(),
        detector=None if detector is None else detector.to(device).eval(),
        folder=folder,
    )
    with full_precision(device):  # whatever training ran in
        for split, views in views_needed(names, recipe.evaluation).items():
            if views:
                store.get(split, views=views)  # one pass over the images, however many protocols want them
        results = []
        for name in names:
            results.append(_measure(name, store=store, learned=learned, recipe=recipe, subject=subject, report=report))
            keep(results[-1])
        return results


def views_needed(names: Sequence[str], evaluation: Evaluation) -> dict[str, tuple[View, ...]]:
    """Return which views of every split some protocols look at, each once."""
    union: dict[str, tuple[View, ...]] = {}
    for name in names:
        for split, views in EVALUATORS[name].needs(evaluation).items():
            union[split] = tuple(dict.fromkeys((*union.get(split, ()), *views)))
    return union


def _measure(
    name: str, *, store: FeatureStore, learned: Learned, recipe: Recipe, subject: str, report: Callable[[str], None]
) -> Result:
    evaluator = EVALUATORS[name]
    started = time.monotonic()
    outcome = evaluator.run(store, learned, recipe, report)
    data_hash = store.data_hash(sorted(evaluator.needs(recipe.evaluation)))
    view = {"resize": recipe.views.original_resize, "size": recipe.views.original_size, "mean": list(MEAN), "std": list(STD)}
    # An encoder's own mean and deviation are part of the encoder: its protocol is that of all others.
    shown = {**view, "mean": list(store.mean), "std": list(store.std)}
    facts = {"dataset": store.dataset, "view": shown, **outcome.settings}
    identity = {"protocol": name, "version": evaluator.version, "data": data_hash, "view": view, "settings": outcome.settings}
    result = Result(
        protocol=name,
        version=evaluator.version,
        protocol_hash=canonical_hash(identity),
        subject=subject,
        weights_hash=store.weights_hash,
        data_hash=data_hash,
        measurements=outcome.measurements,
        details={**facts, **outcome.remarks},
        elapsed_s=time.monotonic() - started,
    )
    for measurement in result.measurements:
        report(f"{subject}: {measurement.name} {text.measurement(vars(measurement))} % ({measurement.count})")
    return result
