"""Linear SVMs on frozen features of images that show several classes (docs/transfer.md; paper, appendix C.4: VOC07).

As in Facebook's benchmark: features divided by their length, one LIBLINEAR classifier a class, its cost chosen by the mean
average precision of three folds, difficult images absent in training and left out of their class's test. The score is the mean
over classes of the average precision: the area under the precision that is made non-increasing, over the recall.
"""

from __future__ import annotations

import contextlib
import json
import math
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from obowlab import text
from obowlab.config import Voc07Svm, canonical_hash
from obowlab.evaluation.jackknife import all_but_one, measurement
from obowlab.evaluation.result import Measurement
from obowlab.files.opening import UnusableFileError
from obowlab.files.records import read_checked, with_checksum
from obowlab.files.replacing import write_atomic
from obowlab.files.sharing import shared_folder
from obowlab.randomness import Bools, Floats

Marks = npt.NDArray[np.int8]
Signs = npt.NDArray[np.int64]

LENGTH_EPSILON = 1e-5
"""Added to the length of a feature before it is divided by it."""

NORM_EPSILON = 1e-5
"""Added to the variance of a feature, for `pool5_bn`."""


@dataclass(frozen=True)
class ClassFit:
    """What was found for one class.

    Attributes:
        name: of the class.
        cost: the C with the best mean average precision of the folds, the first of equals.
        scores: of the test images.
        unconverged: how many of the fits reached the limit of iterations.
    """

    name: str
    cost: float
    scores: tuple[float, ...]
    unconverged: int


def normalised(features: Floats, *, mean: Floats | None = None, variance: Floats | None = None) -> Floats:
    """Return rows divided by their length, float64 [N, c]; standardised before it when mean and variance [c] are given."""
    features = np.asarray(features, dtype=np.float64)
    if mean is not None and variance is not None:
        features = (features - mean) / np.sqrt(variance + NORM_EPSILON)
    rows: Floats = features / (np.linalg.norm(features, axis=1, keepdims=True) + LENGTH_EPSILON)
    return rows


def average_precision(hits: Bools, *, weights: Floats) -> Floats:
    """Return the area under the precision, made non-increasing from the right, over the recall, in [0, 1]; 0 without a positive.

    Args:
        hits: whether each image shows the class, the surest first, [N].
        weights: how often each of them counts, [..., N]; one average precision, [...], for each row.
    """
    places = np.flatnonzero(hits)
    if not len(places):
        return np.zeros(weights.shape[:-1])
    # From a hit to the next one precision only falls, so its largest values are at hits.
    gained, seen = weights[..., places], np.cumsum(weights, axis=-1)[..., places]
    found = np.cumsum(gained, axis=-1)
    precision = np.divide(found, seen, out=np.zeros_like(found), where=seen > 0)
    envelope = np.maximum.accumulate(precision[..., ::-1], axis=-1)[..., ::-1]
    total = found[..., -1]
    area: Floats = np.divide((gained * envelope).sum(axis=-1), total, out=np.zeros_like(total), where=total > 0)
    return area


def fit_class(name: str, signs: Signs, *, features: Floats, test_features: Floats, config: Voc07Svm) -> ClassFit:
    """Choose the cost of a class by cross-validation, fit it on all training images and score the test images.

    Args:
        name: of the class.
        signs: 1 for images that show it, -1 for all others, [N].
        features: of the training images, as `normalised` returns them, [N, c].
        test_features: of the test images, likewise.
        config: costs, folds and iterations.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.metrics import average_precision_score
    from sklearn.model_selection import StratifiedKFold

    folds = list(StratifiedKFold(config.num_folds).split(features, signs))

    def scores_of(cost: float, *, train: Any, test: Floats) -> Floats:
        scores: Floats = _svm(cost, config=config).fit(features[train], signs[train]).decision_function(test)
        return scores

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", ConvergenceWarning)
        means = [
            np.mean(
                [average_precision_score(signs[test], scores_of(cost, train=train, test=features[test])) for train, test in folds]
            )
            for cost in config.costs
        ]
        best = int(np.argmax(means))
        scores = scores_of(config.costs[best], train=slice(None), test=test_features)
    unconverged = sum(issubclass(each.category, ConvergenceWarning) for each in said)
    return ClassFit(name, config.costs[best], tuple(scores.tolist()), unconverged)


def _svm(cost: float, *, config: Voc07Svm) -> Any:
    from sklearn.svm import LinearSVC

    return LinearSVC(
        C=cost,
        class_weight={1: config.positive_weight, -1: 1},
        penalty="l2",
        loss="squared_hinge",
        dual=True,
        tol=1e-4,
        max_iter=config.max_iterations,
        intercept_scaling=1.0,
        random_state=0,
    )


def fit_classes(
    features: Floats,
    *,
    targets: Marks,
    test_features: Floats,
    class_names: Sequence[str],
    config: Voc07Svm,
    processes: int,
    kept: Path,
    report: Callable[[str], None],
) -> tuple[ClassFit, ...]:
    """Fit all classes, several at a time; each is kept as soon as it is done, so that a call that was killed continues.

    Args:
        features: of the training images, as `normalised` returns them, [N, c].
        targets: 1, 0 or -1, [N, classes].
        test_features: of the test images.
        class_names: one a column of `targets`.
        config: the settings.
        processes: how many work at the same time.
        kept: folder of the fits to this encoder, these images and these settings.
        report: called with a line for every class.
    """
    fits = {name: fit for name in class_names if (fit := _read_fit(kept, name, count=len(test_features))) is not None}
    signs = {name: np.where(targets[:, column] == 1, 1, -1) for column, name in enumerate(class_names) if name not in fits}
    processes = min(processes, max(1, len(signs)))
    began, taken = 0.0, list[float]()
    for fit, seconds in _fitted(signs, features=features, test_features=test_features, config=config, processes=processes):
        fits[fit.name] = fit
        began = began or time.monotonic() - seconds  # processes take a while to start
        taken.append(seconds)
        _keep(kept, fit)
        left_s = math.ceil(len(signs) / processes) * sum(taken) / len(taken) - (time.monotonic() - began)
        left = f", about {text.duration(max(left_s, 1.0))} left" if len(taken) < len(signs) else ""
        report(f"voc07-svm: {len(fits)}/{len(class_names)} classes, {fit.name} with C = {fit.cost:g}{left}")
    return tuple(fits[name] for name in class_names)


def _fitted(
    signs: Mapping[str, Signs], *, features: Floats, test_features: Floats, config: Voc07Svm, processes: int
) -> Iterator[tuple[ClassFit, float]]:
    """Yield the fit of every class as soon as it is there, and the seconds that it took."""
    work = partial(_timed_fit, features=features, test_features=test_features, config=config)
    if processes == 1:
        yield from (work(name, each) for name, each in signs.items())
        return
    # Every process gets the features once, when it starts; processes of their own, as a fork would copy CUDA's state.
    with ProcessPoolExecutor(processes, get_context("spawn"), _take, (work,)) as pool:
        try:
            for done in as_completed([pool.submit(_fit_taken, name, each) for name, each in signs.items()]):
                yield done.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _timed_fit(name: str, signs: Signs, *, features: Floats, test_features: Floats, config: Voc07Svm) -> tuple[ClassFit, float]:
    from sklearn import metrics, model_selection, svm  # noqa: F401  loading them takes longer than a small class

    began = time.monotonic()
    fit = fit_class(name, signs, features=features, test_features=test_features, config=config)
    return fit, time.monotonic() - began


_TAKEN: list[Callable[[str, Signs], tuple[ClassFit, float]]] = []
"""In a process of `_fitted`: what fits a class to the features that it was started with."""


def _take(work: Callable[[str, Signs], tuple[ClassFit, float]]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one answers Ctrl-C
    _TAKEN.append(work)


def _fit_taken(name: str, signs: Signs) -> tuple[ClassFit, float]:
    return _TAKEN[0](name, signs)


def _file_of(kept: Path, name: str) -> Path:
    return kept / f"{canonical_hash(name)[:16]}.json"


def _keep(kept: Path, fit: ClassFit) -> None:
    """File a fit where that can be done: it only saves time."""
    with contextlib.suppress(OSError, UnusableFileError):
        write_atomic(_file_of(shared_folder(kept), fit.name), with_checksum(json.dumps(asdict(fit))))


def _read_fit(kept: Path, name: str, *, count: int) -> ClassFit | None:
    try:
        values = read_checked(_file_of(kept, name))
        fit = ClassFit(**{field.name: values[field.name] for field in fields(ClassFit)} | {"scores": tuple(values["scores"])})
    except (OSError, UnusableFileError, ValueError, TypeError, KeyError):
        return None
    return fit if fit.name == name and len(fit.scores) == count else None


def mean_average_precision(fits: Sequence[ClassFit], *, targets: Marks) -> tuple[Measurement, dict[str, float]]:
    """Return the mean over classes with interval and shares as `jackknife` has them, and every class's value, in percent.

    What the choice of C adds to the spread is not in the interval.

    Args:
        fits: one a class, with the scores of N test images, at least two.
        targets: 1, 0 or -1, [N, classes]; images of -1 do not count in that class.
    """
    ranked = []
    for column, fit in enumerate(fits):
        counted = np.flatnonzero(targets[:, column] >= 0)
        order = counted[np.argsort(-np.asarray(fit.scores)[counted], kind="stable")]
        ranked.append((order, targets[order, column] == 1))

    def mean_of(weights: Floats) -> Floats:
        """Return the mean in percent over the classes that are shown, [R], with images that count as R rows say, [R, N]."""
        shown = np.stack([weights[:, order] @ hits > 0 for order, hits in ranked])
        values = np.stack([average_precision(hits, weights=weights[:, order]) for order, hits in ranked])
        mean: Floats = 100.0 * (values * shown).sum(axis=0) / np.maximum(shown.sum(axis=0), 1)
        return mean

    num_images = len(targets)
    each = [100.0 * float(average_precision(hits, weights=np.ones(len(order)))) for order, hits in ranked]
    value = float(np.mean(each))
    without = np.concatenate([mean_of(rows) for _, rows in all_but_one(np.arange(num_images), num_images=num_images)])
    return measurement("svm_map", value, without=without), {
        fit.name: precision for fit, precision in zip(fits, each, strict=True)
    }
