"""Two gloo processes are one process, up to the order of float sums; loader workers change nothing at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from obowlab.config import (
    Backbone,
    Bownet,
    Byol,
    Detector,
    Machine,
    MethodSection,
    Moco,
    Obow,
    Recipe,
    Rotnet,
    Simclr,
    Simsiam,
    Supervised,
    Swav,
)
from obowlab.config.methods import needs_classes
from obowlab.errors import UserError
from obowlab.evaluation import evaluate
from obowlab.methods import METHODS, Batch, Method
from obowlab.methods.backbones import build_backbone
from obowlab.runs.folder import RunFolder
from obowlab.training.distributed import OtherRankFailed, World, parallelise
from obowlab.training.sync_batchnorm import synchronise_batchnorm
from obowlab.training.window import MetricWindow
from obowlab.weights.encoder_file import read_encoder
from tests.contracts import objects_of, small_preparation
from tests.fork_server import fork_all
from tests.runs import complete, differing_weights, points, small_recipe

STEPS = 10
BATCH = 8
SMALL = Backbone(stem="small", width=4)
MASKS = Detector(architecture="fpn", anchors=(4.0, 8.0, 16.0, 32.0, 64.0), standard_side=16.0, width=8, head_width=8, regions=12)
METHOD = Obow(levels=("conv4", "conv5"), num_words=20, border=0, msd_start="first_batch", teacher_momentum=0.9)


def train_in_float64(world: World, method_config: MethodSection) -> Method[Any]:
    """Do ten steps on this rank's share of fixed random images; in float64 rounding cannot hide a mistake."""
    method = METHODS[method_config.name](
        method_config,
        backbone=SMALL,
        total_steps=STEPS,
        seed=0,
        num_classes=3 if needs_classes(method_config) else None,
        comm=world,
    ).double()
    teacher = Recipe(method=Rotnet(), backbone=SMALL) if method_config.name == "bownet" else None
    method.prepare(small_preparation(Recipe(method=method_config, backbone=SMALL, teacher=teacher), size=24, dtype=torch.float64))
    synchronise_batchnorm(method, world=world)
    parallel = parallelise(method, world=world).train()
    optimizer = torch.optim.SGD(method.param_groups(weight_decay=5e-4), lr=0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    part = BATCH // world.world_size
    mine = slice(world.rank * part, (world.rank + 1) * part)
    for step in range(STEPS):
        original = torch.randn(BATCH, 3, 24, 24, generator=generator, dtype=torch.float64)[mine]
        crops = torch.randn(BATCH, 2, 3, 16, 16, generator=generator, dtype=torch.float64)[mine].flatten(0, 1)
        uniforms = torch.rand(BATCH, method.num_uniforms, generator=generator, dtype=torch.float64)[mine]
        share = torch.rand(BATCH, 2, generator=generator, dtype=torch.float64)[mine].flatten()
        mixed = {"crops": share} if method_config.name in ("obow", "bownet", "supervised") else {}
        views = {"crops": crops}
        if method_config.name == "swav":
            small = torch.randn(BATCH, 3, 3, 12, 12, generator=generator, dtype=torch.float64)[mine]
            views["small_crops"] = small.flatten(0, 1)
        batch = Batch(
            original=original,
            views=views,
            uniforms=uniforms,
            step=step,
            labels=(torch.arange(BATCH) % 3)[mine],
            cutmix_lambda=mixed,
            objects=(*objects_of(step, size=24, dtype=torch.float64), *objects_of(-step, size=24, dtype=torch.float64))[mine],
            first=mine.start,
        )
        output = parallel(batch)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    return method


def one_of_two(rank: int, file: str, method_config: MethodSection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}.rendezvous", rank=rank, world_size=2)
    method = train_in_float64(World(rank=rank, world_size=2, device=torch.device("cpu")), method_config)
    torch.save(method.state_dict(), f"{file}.{rank}")
    dist.destroy_process_group()


VARIANTS: dict[str, MethodSection] = {
    "queue": METHOD,
    "hard": METHOD.model_copy(update={"codes": "hard", "queue_vector": "global_average"}),
    "kmeans_replace": METHOD.model_copy(update={"vocabulary": "kmeans_replace", "kmeans_patience": 2}),
    "kmeans_sinkhorn": METHOD.model_copy(update={"vocabulary": "kmeans_sinkhorn"}),
    "bownet": Bownet(num_words=20, border=0, kmeans_points=3),
    "rotnet": Rotnet(),
    "moco": Moco(queue_size=21, batchnorm_splits=4, teacher_momentum=0.9),
    "supervised": Supervised(),
    "detector": Detector(anchors=(8.0,), pooled=4, regions=12),
    "masks": MASKS,
    "masks with norms": MASKS.model_copy(update={"head": "infomin"}),
    "frozen": Supervised(trunk="frozen", head_start="normal", head_batchnorm=True),
    "finetuned": Supervised(trunk_rate=0.01, head_start="normal"),
    "simsiam": Simsiam(projection_size=12, prediction_size=6, zero_residual=False),
    "simclr": Simclr(projection_size=6, temperature=0.5, zero_residual=False),
    "byol": Byol(projection_size=6, hidden_size=12, teacher_momentum=0.9),
    # The queue is full after two of the ten steps.
    "swav": Swav(hidden_size=12, projection_size=6, num_prototypes=10, queue_size=16, queue_start_step=2, frozen_steps=3),
}
"""All of them train on mixed crops that can, and SwAV on small crops too."""


def test_every_method_is_compared() -> None:
    assert {config.name for config in VARIANTS.values()} == METHODS.keys()


@pytest.mark.parametrize("method_config", VARIANTS.values(), ids=VARIANTS.keys())
def test_two_processes_do_the_same_mathematics(method_config: MethodSection, tmp_path: Path) -> None:
    alone = train_in_float64(World(rank=0, world_size=1, device=torch.device("cpu")), method_config).state_dict()
    file = str(tmp_path / "state")
    fork_all(one_of_two, ranks=2, arguments=(file, method_config))
    ranks = [torch.load(f"{file}.{rank}", weights_only=True) for rank in range(2)]
    for name, value in alone.items():
        for rank in ranks:
            torch.testing.assert_close(rank[name], value, rtol=1e-6, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
    for name in ("vocabularies.conv5.words", "words", "queue"):
        assert name not in alone or alone[name].abs().sum() > 0


def contrast(world: World, *, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean loss of this rank's rows [n, C], each told from the rows of all ranks, and its gradient to them."""
    rows = features.clone().requires_grad_()
    everyone = world.all_gather_with_gradient(rows)
    logits = rows @ everyone.T
    own = world.rank * len(rows) + torch.arange(len(rows))
    loss = torch.nn.functional.cross_entropy(logits, own)
    loss.backward()
    assert rows.grad is not None
    return loss.detach(), rows.grad


def gathered(rank: int, file: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    world = World(rank=rank, world_size=2, device=torch.device("cpu"))
    features = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.save(contrast(world, features=features[3 * rank : 3 * rank + 3]), f"{file}.{rank}")
    dist.destroy_process_group()


def test_a_gather_with_gradient_gives_the_gradient_of_the_mean_over_all_rows(tmp_path: Path) -> None:
    features = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    loss, gradient = contrast(World(rank=0, world_size=1, device=torch.device("cpu")), features=features)
    fork_all(gathered, ranks=2, arguments=(str(tmp_path / "rendezvous"),))
    losses, gradients = zip(*(torch.load(tmp_path / f"rendezvous.{rank}", weights_only=True) for rank in range(2)), strict=True)
    torch.testing.assert_close(torch.stack(losses).mean(), loss, rtol=1e-12, atol=0.0)
    # DistributedDataParallel divides by the number of ranks what it has added up.
    torch.testing.assert_close(torch.cat(gradients) / 2, gradient, rtol=1e-10, atol=1e-14)


def four_starts(rank: int, file: str) -> None:
    """Train six steps in one start and in two, the second of which resumes from the first."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=4)
    world = World(rank=rank, world_size=4, device=torch.device("cpu"))
    ends = []
    for starts in ((6,), (3, 3)):
        method = METHODS["obow"](METHOD, backbone=SMALL, total_steps=6, seed=0, num_classes=None, comm=world)
        synchronise_batchnorm(method, world=world)
        optimizer = torch.optim.SGD(method.param_groups(weight_decay=5e-4), lr=0.05, momentum=0.9)
        generator = torch.Generator().manual_seed(rank)
        step = 0
        for steps in starts:
            parallel = parallelise(method, world=world).train()
            for _ in range(steps):
                original = torch.randn(2, 3, 24, 24, generator=generator)
                crops = torch.randn(4, 3, 16, 16, generator=generator)
                uniforms = torch.rand(2, method.num_uniforms, generator=generator, dtype=torch.float64)
                output = parallel(Batch(original=original, views={"crops": crops}, uniforms=uniforms, step=step))
                optimizer.zero_grad()
                output.loss.backward()
                optimizer.step()
                step += 1
        ends.append(method.state_dict())
    torch.save({name: torch.equal(value, ends[1][name]) for name, value in ends[0].items()}, f"{file}.{rank}")


def test_four_processes_resume_to_the_bit(tmp_path: Path) -> None:
    """With more than two, a sum depends on the order it is taken in, and a new start must not change that."""
    fork_all(four_starts, ranks=4, arguments=(str(tmp_path / "rendezvous"),))
    for rank in range(4):
        equal = torch.load(tmp_path / f"rendezvous.{rank}", weights_only=True)
        assert [name for name, same in equal.items() if not same] == []


def rank_0_fails(rank: int, file: str) -> None:
    """Let rank 0 do something that works, then something that does not, and write how it ended."""
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    world = World(rank=rank, world_size=2, device=torch.device("cpu"))
    window = MetricWindow()
    window.add({"loss": torch.tensor(float(rank))})
    found: list[Any] = [world.on_main(lambda: "done"), window.state(world), window.take(world)]

    def full_disk() -> None:
        raise UserError("no space left")

    try:
        world.on_main(full_disk)
    except (UserError, OtherRankFailed) as error:
        found.append(type(error).__name__)
    torch.save(found, f"{file}.{rank}")
    dist.destroy_process_group()


def test_a_failure_of_rank_0_ends_every_rank_and_metrics_are_kept_per_rank(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(rank_0_fails, args=(str(tmp_path / "rendezvous"),), nprocs=2)  # type: ignore[no-untyped-call]
    found = [torch.load(tmp_path / f"rendezvous.{rank}", weights_only=True) for rank in range(2)]
    state = {"counts": {"loss": 1}, "sums": [[0.0], [1.0]]}
    assert found == [["done", state, {"loss": 0.5}, "UserError"], [None, state, {"loss": 0.5}, "OtherRankFailed"]]


def run(folder: Path, *, data_root: Path, protocols: str = "[]", **machine_values: object) -> RunFolder:
    folder.mkdir()
    machine = Machine.model_validate(
        {
            "data_root": data_root,
            "runs_root": folder / "runs",
            "device": "cpu",
            "loader": "torch",
            "workers": 0,
            **machine_values,
        }
    )
    # Small steps, or rounding grows by itself until the runs part.
    overrides = (f"evaluation.protocols={protocols}", "optimizer.learning_rate=0.002")
    return complete(small_recipe(folder, dataset="small", epochs=2, batch_size=8, overrides=overrides), machine=machine)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, data_root: Path) -> RunFolder:
    return run(tmp_path_factory.mktemp("distributed") / "alone", data_root=data_root)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, data_root: Path) -> RunFolder:
    """The run that `alone` is, trained and measured by two processes of torchrun."""
    folder = tmp_path_factory.mktemp("distributed") / "both"
    return run(folder, data_root=data_root, procs=2, protocols='["fewshot", "knn"]')


def test_two_processes_equal_one(alone: RunFolder, both: RunFolder) -> None:
    assert (both.state.total_steps or 0) >= STEPS
    pairs = list(zip(points(alone), points(both), strict=True))
    assert [one[0] for one, _ in pairs] == [two[0] for _, two in pairs]
    losses = [(one[1]["loss"], two[1]["loss"]) for one, two in pairs]
    # The first step agrees to rounding. Then single activations near zero fall on either side of a ReLU, and the runs drift
    # apart as any two float32 runs do; that the mathematics is the same is what the float64 test shows.
    assert losses[0][1] == pytest.approx(losses[0][0], rel=1e-6)
    for name in ("words_used_conv4", "words_used_conv5", "perplexity_batch_conv5", "distance_conv4"):
        assert pairs[0][1][1][name] == pytest.approx(pairs[0][0][1][name], rel=1e-4), name
    for one, two in losses:
        assert two == pytest.approx(one, rel=0.02)


def test_what_two_processes_trained_measures_in_one_as_it_did_there(tmp_path: Path, data_root: Path, both: RunFolder) -> None:
    recipe = both.info.recipe
    encoder = read_encoder(both.path / "encoder.safetensors").model
    assert {type(module) for module in encoder.modules() if "BatchNorm" in type(module).__name__} == {torch.nn.BatchNorm2d}
    machine = Machine(data_root=data_root, runs_root=tmp_path / "elsewhere", device="cpu", loader="torch", workers=0)
    here: dict[tuple[str, str], Any] = {}
    for subject, model in (("student", encoder), ("random", build_backbone(recipe.backbone, seed=both.info.seed))):
        results = evaluate(
            model,
            recipe=recipe,
            machine=machine,
            subject=subject,
            cache_dir=machine.runs_root,
            device=torch.device("cpu"),
            report=lambda line: None,
        )
        here |= {(subject, result.protocol): result.to_json()["measurements"] for result in results}
    assert {(result["subject"], result["protocol"]): result["measurements"] for result in both.results()} == here
    assert len(here) == 4


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(workers: int, tmp_path: Path, data_root: Path, alone: RunFolder) -> None:
    other = run(tmp_path / "other", data_root=data_root, workers=workers)
    assert points(other) == points(alone)
    assert not differing_weights(alone, other)
