"""A small run store with everything a report shows, and a table over it; names may be as hostile as one likes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from obowlab.config import canonical_hash, load_recipe
from obowlab.report.words_page import render_words
from obowlab.runs.folder import RunFolder
from obowlab.runs.results import pack
from obowlab.tables.model import Cell, Column, Estimate, Row, RunRef, Table
from obowlab.tables.spec import PlannedTable
from tests.command_line import result

STARTED = 1_795_000_000.0


def add_run(
    runs_root: Path,
    *,
    seed: int = 0,
    overrides: tuple[str, ...] = (),
    status: str = "finished",
    message: str = "",
    points: int = 150,
    alike: bool = False,
) -> RunFolder:
    """Make a run of `demo` with its curves; a finished one with results, one whose images look alike with a warning."""
    folder = RunFolder.create(load_recipe("demo", overrides=overrides), seed=seed, runs_root=runs_root)
    facts = {
        "commit": "c0ffee" * 6 + "c0ff",
        "dirty": seed == 1,
        "data_hash": "da7a" * 16,
        "host": "here",
        "versions": {"torch": "2.14.1"},
    }
    folder.append_attempt(facts)
    epochs = folder.info.recipe.training.epochs
    with folder.metric_log() as log:
        for i in range(1, points + 1):
            epoch, fade = epochs * i / 150, math.exp(-12 * i / 150)
            log.append(
                10 * i,
                {
                    "epoch": epoch,
                    "loss": 4 + 3 * fade + 0.1 * math.sin(i + seed),
                    "perplexity_image_conv5": 20 + 200 * fade,
                    "perplexity_batch_conv5": 30 if alike else 150 + seed,
                    "words_used_conv5": 60 + 5 * math.sin(i),
                    "word_age_conv5": 3.5,
                    "distance_conv5": 30 - 20 * fade + 2 * math.sin(i),
                },
                time_s=STARTED + i,
            )
    with folder.metric_log("online") as log:
        for epoch in range(1, 4):
            log.append(100 * epoch, {"epoch": epoch, "fewshot_5shot": 5.0 + epoch + seed}, time_s=STARTED + 100 * epoch)
    if status == "finished":
        for protocol, value in (("fewshot", 12.5 + seed), ("linear", 30.0)):
            folder.add_result(result(protocol, "student", value))
            folder.add_result(result(protocol, "random", 6.0))
    folder.set_state(status=status, step=10 * points, total_steps=1500, message=message, trained_s=75.0)
    return folder


def own_recipe(folder: Path) -> Path:
    """Write a recipe of a user's own, on top of a shipped one."""
    path = folder / "short.toml"
    path.write_text('extends = "demo-vanilla"\ntitle = "Two epochs"\n\n[training]\nepochs = 2\n')
    return path


OWN_TABLE = """
title = "Size of the queue"
base = "short.toml"
primary = "fewshot_5shot"
footnotes = ["Images drawn by obowlab."]

[columns]
fewshot_5shot = "5-shot"
linear_top1 = "linear"

[[row]]
key = "base"
label = "as in the recipe"

[[row]]
key = "small"
group = "Other sizes"
label = "64 words"
set = { "method.num_words" = 64 }

[[row]]
key = "large"
group = "Other sizes"
label = "1024 words"
set = { "method.num_words" = 1024 }
"""


def own_table(folder: Path, *, name: str = "queue") -> Path:
    """Write a table of a user's own, without values of the paper, and the recipe that it starts from."""
    own_recipe(folder)
    path = folder / f"{name}.toml"
    path.write_text(OWN_TABLE)
    return path


def observed(mean: int, *, seed: int = 0, count: int = 200) -> list[int]:
    """Return the right answers of some episodes of four questions, a share of about `mean` percent; the same noise for all."""
    noise = np.random.default_rng(seed).integers(0, 100, (count, 4))
    return [int(each) for each in (noise < mean).sum(axis=1)]


def add_row_runs(table: PlannedTable, *, runs_root: Path, means: dict[str, int], seeds: tuple[int, ...] = (0,)) -> None:
    """Make finished runs of the rows that have a mean, measured on the same episodes."""
    for row in table.rows:
        for seed in seeds if row.row.key in means else ():
            folder = RunFolder.create(row.loaded, seed=seed, runs_root=runs_root)
            for protocol in row.loaded.recipe.evaluation.protocols:
                correct = observed(means[row.row.key] + seed)
                value = 25.0 * float(np.mean(correct))
                measured = result(protocol, "student", value)
                measured["measurements"][0]["samples"] = pack(correct, of=4)
                settings = getattr(row.loaded.recipe.evaluation, protocol).model_dump(mode="json")
                measured["details"] = {**settings, "dataset": row.loaded.recipe.data.dataset}
                measured["protocol_hash"] = canonical_hash(settings)
                folder.add_result(measured)
            folder.set_state(status="finished", step=10, total_steps=10, trained_s=61.0)


def add_gallery(folder: RunFolder) -> None:
    """Put a gallery of visual words into a run, as `obowlab words` would."""
    place = folder.path / "words"
    place.mkdir()
    level = {
        **{"num_words": 2, "used": 2, "delta": 0.1, "distance": 8.0, "patch_side": 4, "words_per_sheet": 1},
        **{"coherence": 0.5, "coherence_of_others": 0.25, "sheets": ["conv5-0.png", "conv5-1.png"]},
        "words": [
            {"number": i, "use": 50.0, "coherence": 0.5, "score": 0.5, "age": 3, "places": 2, "sheet": i, "row": 0}
            for i in range(2)
        ],
    }
    facts = {
        **{"format": 1, "run_id": folder.run_id, "title": "", "version": "0.1.0", "step": 1500, "network": "teacher"},
        **{"dataset": "demo", "split": "train", "num_images": 90, "view": {"resize": 28, "size": 24}, "patches_per_word": 2},
        "levels": {"conv5": level},
    }
    (place / "words.json").write_text(json.dumps(facts))
    (place / "index.html").write_text(render_words(facts))
    for i in range(2):
        Image.new("RGB", (16, 8), (80 * i, 120, 90)).save(place / f"conv5-{i}.png")


def add_study(runs_root: Path, *, name: str = "kappa-delta", run_id: str = "", title: str = "", figures: bool = False) -> Path:
    """Write the file of a study of two parameters with one pruned trial, with Optuna's figures if asked."""
    trials = [
        {
            "number": i,
            "status": "pruned" if i == 5 else "completed",
            "params": {"method.kappa": 4.0 + i, "method.delta_base": 0.01 * 2 ** (i % 4)},
            "value": 4.0 if i == 5 else 10.0 + (i * 7) % 5,
            "interval": None if i == 5 else 0.5,
            "is_paper": i == 1,
            "resumed": int(i == 2),
            "repeat_of": None,
            "message": "behind the median" if i == 5 else "",
            "runs": [{"run_id": run_id, "seed": 0, "status": "finished"}] if i == 0 and run_id else [],
        }
        for i in range(8)
    ]
    content: dict[str, Any] = {
        "format": 1,
        "name": name,
        "title": title,
        "recipe": "demo",
        "metric": "fewshot_5shot",
        "unit": "%",
        "direction": "max",
        "seeds": [0],
        "budget": 8,
        "parameters": [
            {
                "key": "method.delta_base",
                "kind": "float",
                "low": 0.01,
                "high": 0.1,
                "log": True,
                "paper": 0.02,
                "importance": 0.3,
            },
            {"key": "method.kappa", "kind": "float", "low": 4, "high": 12, "log": False, "paper": 5.0, "importance": 0.7},
        ],
        "trials": trials,
        "best": 2,
        "best_against_paper": {"value": 2.0, "interval": 0.6, "seeds": 1, "p": 0.01},
    }
    if figures:
        content["figures"] = optuna_figures(content)
    path = runs_root / ".studies" / "kappa-delta" / "study.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def optuna_figures(content: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of a study's completed trials as the writer of `study.json` makes them."""
    import optuna
    from optuna.distributions import BaseDistribution, FloatDistribution

    from obowlab.studies.schema import StudyReport
    from obowlab.studies.storage import quiet
    from obowlab.studies.summary import study_figures

    report = StudyReport.model_validate(content)
    spaces: dict[str, BaseDistribution] = {
        parameter.key: FloatDistribution(parameter.low or 0.0, parameter.high or 1.0, log=parameter.log)
        for parameter in report.parameters
    }
    with quiet():
        study = optuna.create_study(direction="maximize")
        for trial in report.completed:
            study.add_trial(optuna.trial.create_trial(params=trial.params, distributions=spaces, value=trial.value))
        figures = study_figures(
            study, parameters=report.parameters, trials=report.completed, objective="fewshot_5shot [%]", maximize=True
        )
    return {name: figure.model_dump(mode="json") for name, figure in figures.items()}


def make_table(base: list[RunFolder], changed: list[RunFolder], *, label: str = "hard codes", comparable: bool = False) -> Table:
    """Return a table of two rows over runs, and a row whose runs are missing and failed."""
    rows = (
        _row("base", "base row", base, ours=Estimate(13.0, 0.8, 2), against=None, paper=62.44, is_base=True),
        _row("hard", label, changed, ours=Estimate(12.0, 0.7, 2), against=Estimate(-1.0, 0.4, 2, 0.0123), paper=60.0),
        _row("lost", "lost row", [], ours=None, against=None, paper=None, message=f"the loss is not finite; {label}"),
    )
    return Table(
        name="table3",
        title=f"Table 3: {label}",
        scale="paper" if comparable else "tiny",
        comparable=comparable,
        dataset="synthetic",
        primary="fewshot_5shot",
        columns=(Column("fewshot_5shot", "5-shot", "%"),),
        rows=rows,
        footnotes=("First footnote.", f"Second footnote on {label}."),
    )


def _row(
    key: str,
    label: str,
    runs: list[RunFolder],
    *,
    ours: Estimate | None,
    against: Estimate | None,
    paper: float | None,
    is_base: bool = False,
    message: str = "",
) -> Row:
    verdict = "agrees" if against is not None else None
    refs = [
        RunRef(
            run.run_id,
            run.info.seed,
            run.state.status,
            run.state.step,
            1500,
            run.state.message,
            run.info.fingerprint,
            "c0ffee",
            False,
            "da7a",
            "f00d" * 8,
            75.0,
            {"fewshot_5shot": 12.5 + run.info.seed},
        )
        for run in runs
    ]
    if not runs:
        refs = [
            RunRef("demo-s0-00000000", 0, "failed", 3, 1500, message, "0" * 64, None, None, None, None, None, {}),
            RunRef("demo-s1-00000000", 1, "missing", 0, None, "", "1" * 64, None, None, None, None, None, {}),
        ]
    random, p_holm = (Estimate(6.0, 0.5, 1) if ours else None), (0.0246 if against else None)
    cell = Cell("fewshot_5shot", paper, ours, random, None, against, verdict, p_holm)
    return Row(key, label, "group", "demo", {"method.codes": "hard"}, 12, is_base, (cell,), tuple(refs), verdict, (2,))
