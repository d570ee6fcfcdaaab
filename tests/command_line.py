"""What the tests of the command line share: calling it in this process, what a folder holds, a finished run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy

from obowlab.cli import main
from obowlab.config import load_recipe
from obowlab.runs.folder import RunFolder
from obowlab.runs.results import pack
from obowlab.weights.info import METADATA_KEY, EncoderInfo


@dataclass(frozen=True)
class Obowlab:
    """Calls the command line: exit code, standard output, standard error."""

    capsys: pytest.CaptureFixture[str]

    def __call__(self, *words: str) -> tuple[int, str, str]:
        code = main(words)
        captured = self.capsys.readouterr()
        return code, captured.out, captured.err


def contents(place: Path) -> dict[str, tuple[int, bytes]]:
    """Return every file below a folder with its time and bytes."""
    files = (path for path in sorted(place.rglob("*")) if path.is_file())
    return {str(path.relative_to(place)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def result(protocol: str, subject: str, value: float) -> dict[str, Any]:
    """Return an evaluation result as it is filed."""
    name = "fewshot_5shot" if protocol == "fewshot" else f"{protocol}_top1"
    return {
        "protocol": protocol,
        "version": 1,
        "protocol_hash": "ab" * 32,
        "subject": subject,
        "weights_hash": "cd" * 32,
        "data_hash": "ef" * 32,
        "measurements": [{"name": name, "value": value, "interval": 0.5, "count": 200, "samples": pack([1] * 200, of=4)}],
        "details": {"dataset": "synthetic"},
        "elapsed_s": 1.0,
    }


def finished_run(runs_root: Path) -> RunFolder:
    """Make a finished run of `demo`, with results and without real weights."""
    folder = RunFolder.create(load_recipe("demo"), seed=0, runs_root=runs_root)
    folder.append_attempt({"host": "here"})
    with folder.metric_log() as log:
        log.append(10, {"loss": 3.5, "perplexity_image_conv5": 20.25})
    folder.add_result(result("fewshot", "student", 31.25))
    folder.add_result(result("fewshot", "random", 11.75))
    folder.add_result(result("linear", "student", 40.0))
    recipe = folder.info.recipe
    info = EncoderInfo(
        backbone=recipe.backbone,
        original_resize=recipe.views.original_resize,
        original_size=recipe.views.original_size,
        source=folder.run_id,
        fingerprint=folder.info.fingerprint,
        weights_hash="cd" * 32,
    )
    folder.write_artifact("encoder.safetensors", safetensors.numpy.save({}, metadata={METADATA_KEY: info.model_dump_json()}))
    folder.write_artifact("checkpoint.pt", b"checkpoint")
    folder.set_state(status="finished", step=10, total_steps=10)
    return folder
