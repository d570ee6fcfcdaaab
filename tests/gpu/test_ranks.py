"""Nothing hangs with NCCL either, which does not notice that a rank is gone; needs one GPU, the rest two."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from obowlab.config import Machine
from obowlab.errors import UserError
from obowlab.runs.folder import RunFolder
from obowlab.training import distributed
from tests.fork_server import fork_all
from tests.test_ranks import FAULTS, ON_RANK_1, copy_of, end, free_port, play, trained, two_ranks

pytestmark = pytest.mark.gpu

__all__ = ["trained"]  # a fixture
FEW = ("0 checkpoint cannot be written", "0 data changes", "0 evaluation fails", *(f"1 {name}" for name in ON_RANK_1))


def votes_of_one(rank: int, port: int) -> None:
    """Make both groups as `join` does, of one process, and use everything that a run does."""
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with distributed.joined(rank=0, world_size=1, device=torch.device("cuda", 0)) as world:
        assert world._errors(None) == []
        (error,) = world._errors(UserError("no space left"))
        assert str(error) == "no space left"
        numbers = torch.arange(6.0, device="cuda").view(3, 2)
        gathered = torch.empty_like(numbers)
        distributed.gather_into(gathered, numbers)
        assert torch.equal(gathered, numbers)
    assert not dist.is_initialized()


def test_votes_and_tensors_go_over_two_groups() -> None:
    fork_all(votes_of_one, ranks=1, arguments=(free_port(),))


@pytest.mark.parametrize("fault", FEW)
def test_a_failure_of_one_gpu_ends_both_with_one_sentence(fault: str, tmp_path: Path, trained: RunFolder) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two NVIDIA GPUs")
    folder = copy_of(trained, tmp_path)
    folder.write_machine(Machine.model_validate({**folder.machine.model_dump(), "device": "cuda"}))
    codes, said = end(two_ranks(folder, play, fault))
    sentence = FAULTS[fault.partition(" ")[2]][1]
    assert [sentence in line for line in said.splitlines() if "Error" in line] == [True]
    assert codes == [0, 0]
    assert folder.state.status == "failed"
