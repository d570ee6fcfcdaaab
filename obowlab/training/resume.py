"""What a run continues from: its newest valid checkpoint, the same on every rank, with all metrics that were logged by then."""

from __future__ import annotations

import torch

from obowlab.errors import UserError
from obowlab.training import checkpoint as checkpoints
from obowlab.training import online_evaluation as online
from obowlab.training.context import RunContext


def newest_checkpoint(run: RunContext, *, data_hash: str) -> checkpoints.Checkpoint | None:
    """Return the newest valid checkpoint of the run; None when there is no checkpoint.

    Raises:
        UserError: it is of another recipe, seed or data set.
    """
    folder = run.folder
    found, complaints = checkpoints.newest(folder.path, fingerprint=folder.info.fingerprint, map_location=run.world.device)
    for complaint in complaints:
        run.reporter.say(f"Warning: {complaint} Using the checkpoint before it.")
    if found is not None and found.data_hash != data_hash:
        raise UserError(
            f"The training images are not those that {folder.run_id} began with (content hash {data_hash[:12]}, "
            f"was {found.data_hash[:12]}): restore the data set, or start over with --fresh."
        )
    return found


def check_same(run: RunContext, *, found: checkpoints.Checkpoint | None) -> None:
    """Refuse to train from different checkpoints: a node may not see the run folder, or not as it is.

    Raises:
        UserError: on every rank.
    """
    steps = run.world.all_gather(torch.tensor([-1 if found is None else found.step], device=run.world.device)).tolist()
    if len(set(steps)) > 1:
        seen = ", ".join("none" if step < 0 else f"step {step}" for step in steps)
        raise UserError(
            f"The processes found different checkpoints in {run.folder.path} ({seen}): let every node see the same folder, and "
            "run the command again."
        )


def check_logs(run: RunContext, *, found: checkpoints.Checkpoint) -> None:
    """Refuse to resume when metrics logged before the checkpoint are missing: they would never be logged again.

    Raises:
        UserError: names the file and the step at which it ends.
    """
    expected = {
        "metrics": found.logged_step if found.logged_step is not None else -1,
        online.ONLINE: found.measured_step if found.measured_step is not None else -1,
    }
    for name, step in expected.items():
        last = max((point.step for point in run.folder.metrics(name)), default=-1)
        if last < step:
            raise UserError(
                f"{run.folder.path / name}.jsonl ends at step {max(last, 0)}, but by the checkpoint step {step} was logged: "
                f"restore the file from a copy, or remove {checkpoints.CURRENT} and {checkpoints.PREVIOUS} beside it to train "
                "from the start."
            )
