"""`obowlab words`, from a checkpoint to a gallery."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from obowlab.config import Backbone, Bownet, Data, Loaded, Machine, Recipe, Views, load_recipe
from obowlab.data.datasets import open_split
from obowlab.evaluation.features import frozen
from obowlab.evaluation.words import sheets as word_sheets
from obowlab.evaluation.words.gallery import show_words
from obowlab.evaluation.words.search import CentreViews
from obowlab.evaluation.words.sheets import TILE, WORDS_PER_SHEET
from obowlab.methods import METHODS, Batch, Method, OBoW, OneProcess
from obowlab.runs.folder import RunFolder
from obowlab.tracking.mirror import Mirror
from obowlab.training import checkpoint as checkpoints
from obowlab.views.photometric import normalise
from tests.command_line import Obowlab, contents
from tests.runs import small_recipe
from tests.test_word_search import level_words, search_slowly

STEP = 7


@pytest.fixture
def workplace(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data_root: Path) -> Path:
    machine = tmp_path / "machine.toml"
    machine.write_text(f'data_root = "{data_root}"\nloader = "torch"\nworkers = 0\n')
    monkeypatch.setenv("OBOWLAB_MACHINE", str(machine))
    return workplace


def trained(place: Path, *overrides: str) -> RunFolder:
    """Make a run of a small recipe whose checkpoint holds a method that took a few steps on noise."""
    loaded = small_recipe(place, dataset="small", overrides=overrides)
    recipe = loaded.recipe
    method = METHODS["obow"](recipe.method, backbone=recipe.backbone, total_steps=STEP, seed=0, num_classes=5, comm=OneProcess())
    generator = torch.Generator().manual_seed(0)
    for step in range(STEP):
        original = torch.randn(16, 3, 24, 24, generator=generator)
        uniforms = torch.rand(16, method.num_uniforms, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            method(Batch(original=original, views={"crops": original}, uniforms=uniforms, step=step))
    return with_checkpoint(loaded, method=method, place=place)


def with_checkpoint(loaded: Loaded, *, method: Method[Any], place: Path) -> RunFolder:
    """Make the finished run of a recipe, with a checkpoint of this method and nothing else."""
    folder = RunFolder.create(loaded, seed=0, runs_root=place / "runs")
    state = checkpoints.Checkpoint(
        step=STEP, fingerprint=folder.info.fingerprint, data_hash="", method=method.state_dict(), optimizer={}
    )
    checkpoints.save(folder.path, checkpoint=state)
    folder.set_state(status="finished", step=STEP, total_steps=STEP)
    return folder


@pytest.fixture
def run(workplace: Path) -> RunFolder:
    return trained(workplace)


def teacher_maps(folder: RunFolder, *, level: str, data_root: Path) -> tuple[OBoW, torch.Tensor, np.ndarray]:
    """Return a run's method, all its teacher's maps [N, C, H, W] of the training images, and the images [N, S, S, 3]."""
    method, step, _ = checkpoints.open_method(folder, map_location=torch.device("cpu"))
    assert isinstance(method, OBoW)
    assert step == STEP
    split = open_split("small", "train", data_root=data_root)
    machine = folder.machine.model_copy(update={"workers": 0, "loader": "torch"})
    views = CentreViews(split=split, views=folder.info.recipe.views, machine=machine, device=torch.device("cpu"))
    ((_, pixels, _),) = views.batches(np.arange(split.num_images), batch_size=1000)
    with frozen(method.teacher):
        maps, _ = method.teacher.levels(normalise(pixels, device=torch.device("cpu")), (level,))  # type: ignore[arg-type]
    return method, maps[level], pixels.numpy()  # type: ignore[index]


def test_a_run_becomes_a_gallery_in_its_folder_and_in_mlflow(
    run: RunFolder, workplace: Path, data_root: Path, obowlab: Obowlab
) -> None:
    code, out, err = obowlab("words", "small")
    assert code == 0, err
    target = run.path / "words"
    assert f"Open {(target / 'index.html').as_uri()}" in out
    assert "60 images of small/train" in err
    facts = json.loads((target / "words.json").read_text())
    assert sorted(path.name for path in target.iterdir()) == sorted(
        ["index.html", "words.json", *(name for level in facts["levels"].values() for name in level["sheets"])]
    )
    assert (facts["run_id"], facts["step"], facts["num_images"], facts["patches_per_word"]) == (run.run_id, STEP, 60, 8)
    assert list(facts["levels"]) == ["conv4", "conv5"]
    for level, found in facts["levels"].items():
        method, map_BCHW, pixels = teacher_maps(run, level=level, data_root=data_root)
        check_level(found, level=level, method=method, map_BCHW=map_BCHW, pixels=pixels, folder=target)
    mirror = Mirror(run)
    assert mirror.pending() == 0
    artifacts = workplace / "runs" / "mlartifacts"
    sent = {path.name for path in artifacts.rglob("words/*")}
    assert sent == {path.name for path in target.iterdir()}
    assert [path for path in run.path.iterdir() if path.name.startswith(".")] == [], "nothing is left beside"


def check_level(
    found: dict[str, Any], *, level: str, method: OBoW, map_BCHW: torch.Tensor, pixels: np.ndarray, folder: Path
) -> None:
    """Hold the facts of a level against the teacher's maps, one location at a time."""
    vocabulary = method.vocabularies[level]
    vectors, delta = vocabulary.words, method.method.delta_base * vocabulary.msd  # type: ignore[union-attr]
    local_BUC = map_BCHW.flatten(2).transpose(1, 2).contiguous()
    expected, counts = search_slowly(local_BUC, level_words(vectors, delta=float(delta)))  # type: ignore[arg-type]
    listed = found["words"]
    assert sorted(word["number"] for word in listed) == list(range(40))
    assert [(-word["use"], word["number"]) for word in listed] == sorted((-word["use"], word["number"]) for word in listed)
    assert sum(word["use"] for word in listed) == pytest.approx(100)
    assert found["used"] == sum(count > 0 for count in counts)
    assert found["map"] == list(map_BCHW.shape[2:])
    nearest = torch.cdist(local_BUC.flatten(0, 1).double(), vectors.double()).square().amin(1)  # type: ignore[union-attr, operator]
    assert found["distance"] == pytest.approx(float(nearest.mean()), rel=1e-3)
    side = found["patch_side"]
    assert side == {"conv4": 7, "conv5": 10}[level]
    for position, word in enumerate(listed):
        number, patches = word["number"], word["patches"]
        assert (word["sheet"], word["row"]) == divmod(position, WORDS_PER_SHEET)
        assert word["use"] == pytest.approx(100 * counts[number] / sum(counts), abs=1e-9)
        assert word["age"] == STEP - int(vocabulary.inserted_at[number])  # type: ignore[index, union-attr]
        best = expected[number][:8]
        assert [patch["score"] for patch in patches] == pytest.approx([-score for score, *_ in best], abs=1e-4)
        assert word["score"] == pytest.approx(-np.mean([score for score, *_ in best]), abs=1e-4)
        assert word["places"] == len({tuple(patch["place"]) for patch in patches})
        features = torch.stack([map_BCHW[patch["image"], :, patch["place"][0], patch["place"][1]] for patch in patches])
        similar = F.normalize(features.double(), dim=1) @ F.normalize(features.double(), dim=1).T
        of_pairs = (float(similar.sum()) - float(similar.trace())) / 56
        assert word["coherence"] == pytest.approx(of_pairs, abs=1e-4)
        with Image.open(folder / found["sheets"][word["sheet"]]) as image:
            row = np.asarray(image.crop((0, word["row"] * TILE, 8 * TILE, (word["row"] + 1) * TILE))).astype(int)
        for column, patch in enumerate(patches):
            top, left = patch["corner"]
            tile = row[:, column * TILE : (column + 1) * TILE]
            cut = pixels[patch["image"], top : top + side, left : left + side].astype(int)
            assert np.abs(tile.mean((0, 1)) - cut.mean((0, 1))).max() < 6, "the tile shows the patch that is named"


def test_levels_split_and_number_can_be_chosen(run: RunFolder, workplace: Path, obowlab: Obowlab) -> None:
    code, out, err = obowlab(
        "words", "small", "--level", "conv4", "--split", "val", "--per-word", "31", "--out", "seen/words", "--json"
    )
    assert code == 0, err
    said = json.loads(out)
    facts = json.loads(Path("seen/words/words.json").read_text())
    assert said["folder"] == str(workplace / "seen" / "words")
    assert "words" not in said["levels"]["conv4"]
    assert (facts["split"], facts["num_images"]) == ("val", 30)
    assert facts["patches_per_word"] == 30, "no more than there are images"
    assert all(len(word["patches"]) == 30 for word in facts["levels"]["conv4"]["words"])
    assert list(facts["levels"]) == ["conv4"]
    assert not (run.path / "words").exists()


def test_soft_codes_are_the_scores_also_where_training_used_hard_ones(run: RunFolder, workplace: Path, obowlab: Obowlab) -> None:
    hard = trained(workplace, "method.codes=hard")
    assert hard.run_id != run.run_id
    for folder, out in ((run, "soft"), (hard, "hard")):
        assert obowlab("words", str(folder.path), "--level", "conv5", "--out", out)[0] == 0
    scores = [word["score"] for word in json.loads(Path("hard/words.json").read_text())["levels"]["conv5"]["words"]]
    assert any(0.01 < score < 0.99 for score in scores)
    # Nothing was learnt from the codes, so both runs have the same teacher and words.
    soft, hardened = (json.loads(Path(f"{out}/words.json").read_text())["levels"] for out in ("soft", "hard"))
    assert soft == hardened


def test_a_recipes_own_training_images_are_those_it_trained_on(workplace: Path, obowlab: Obowlab) -> None:
    folder = trained(workplace, "data.images_per_class=3")
    for split, count in (("train", 15), ("val", 30)):
        assert obowlab("words", folder.run_id, "--out", split, "--split", split)[0] == 0
        facts = json.loads(Path(f"{split}/words.json").read_text())
        assert facts["num_images"] == count
    assert (
        max(
            patch["image"] % 12
            for word in json.loads(Path("train/words.json").read_text())["levels"]["conv5"]["words"]
            for patch in word["patches"]
        )
        == 2
    )


def test_the_same_run_gives_the_same_gallery_and_replaces_an_earlier_one(run: RunFolder, obowlab: Obowlab) -> None:
    assert obowlab("words", "small", "--level", "conv4", "--out", "out")[0] == 0
    first = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    assert obowlab("words", "small", "--out", "out")[0] == 0
    assert Path("out/conv5-000.jpg").exists()
    assert obowlab("words", "small", "--level", "conv4", "--out", "out")[0] == 0
    assert {path.name: path.read_bytes() for path in Path("out").iterdir()} == first


def test_ctrl_c_leaves_what_was_there(run: RunFolder, workplace: Path, obowlab: Obowlab, monkeypatch: pytest.MonkeyPatch) -> None:
    assert obowlab("words", "small", "--level", "conv4", "--out", "out")[0] == 0
    before = contents(workplace)
    reached: list[Path] = []

    def interrupt(*_: Any, path: Path, **__: Any) -> None:
        reached.append(path)
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(word_sheets, "draw_sheet", interrupt)
    for out in (["--out", "out"], []):
        code, _, err = obowlab("words", "small", *out)
        assert (code, err.splitlines()[-1]) == (130, "Interrupted.")
    assert len(reached) == 2
    assert contents(workplace) == before
    assert sorted(path.name for path in workplace.iterdir() if path.is_dir()) == ["out", "runs"]


def test_a_dry_run_looks_and_changes_nothing(run: RunFolder, workplace: Path, obowlab: Obowlab) -> None:
    before = contents(workplace)
    code, out, _ = obowlab("words", "small", "--dry-run")
    assert code == 0
    assert out.splitlines() == [
        f"Would find the 8 best patches of every word of conv4, conv5 of {run.run_id} in small/train",
        f"Would write them to {run.path / 'words'}",
    ]
    code, out, err = obowlab("words", "small", "--dataset", "nowhere", "--dry-run")
    assert (code, err) == (0, "")
    assert "not on this machine: 'nowhere' is not prepared" in out
    assert obowlab("words", "small", "--dataset", "synthetic", "--data-root", "fresh", "--dry-run")[0] == 0
    assert contents(workplace) == before


def refused(obowlab: Obowlab, *words: str) -> str:
    """Return the one sentence that a mistake gets, the same in a dry run."""
    code, out, err = obowlab("words", *words)
    assert (code, out) == (2, ""), err
    (line,) = err.splitlines()
    assert obowlab("words", *words, "--dry-run") == (2, "", err)
    return line


def test_mistakes_are_one_sentence(run: RunFolder, workplace: Path, obowlab: Obowlab) -> None:
    assert "There is no run 'nothing'" in refused(obowlab, "nothing")
    assert "'--level'" in refused(obowlab, "small", "--level", "conv3")
    assert "`obowlab data prepare other" in err_of(obowlab, "small", "--dataset", "other")
    Path("notes").mkdir()
    Path("notes/mine.txt").write_text("mine")
    assert "notes holds other things than a gallery" in refused(obowlab, "small", "--out", "notes")
    assert "mine.txt is a file; choose another --out" in refused(obowlab, "small", "--out", "notes/mine.txt")
    assert "Cannot write" in err_of(obowlab, "small", "--out", "notes/mine.txt/deep")
    one_level = trained(workplace, 'method.levels=["conv5"]')
    assert "no words of conv4; choose --level from conv5" in refused(obowlab, one_level.run_id, "--level", "conv4")
    Path("turned.toml").write_text('extends = "small"\n[method]\nname = "rotnet"\n')
    loaded = load_recipe("turned.toml")
    method = METHODS["rotnet"](
        loaded.recipe.method, backbone=loaded.recipe.backbone, total_steps=1, seed=0, num_classes=None, comm=OneProcess()
    )
    turned = with_checkpoint(loaded, method=method, place=workplace)
    assert refused(obowlab, "turned") == (
        f"Error: Run '{turned.run_id}' has no visual words: its method, rotnet, learns without them."
    )


def err_of(obowlab: Obowlab, *words: str) -> str:
    code, _, err = obowlab("words", *words)
    assert code == 2
    return err.splitlines()[-1]


def test_only_a_checkpoint_can_be_looked_into(run: RunFolder, obowlab: Obowlab) -> None:
    current = run.path / checkpoints.CURRENT
    whole = current.read_bytes()
    (run.path / checkpoints.PREVIOUS).write_bytes(whole)
    current.write_bytes(whole[:-100])
    code, _, err = obowlab("words", "small", "--out", "out")
    assert code == 0
    assert "Warning:" in err
    assert "Using the checkpoint before it." in err
    (run.path / checkpoints.PREVIOUS).unlink()
    assert "is damaged" in refused(obowlab, "small")
    current.unlink()
    sentence = refused(obowlab, "small")
    assert "There is no checkpoint.pt" in sentence
    assert "`obowlab run small`" in sentence


def test_a_checkpoint_of_another_version_is_refused(run: RunFolder, obowlab: Obowlab) -> None:
    content = torch.load(run.path / checkpoints.CURRENT, weights_only=True)
    content["method"]["vocabularies.conv5.surprise"] = torch.zeros(1)
    torch.save(content, run.path / checkpoints.CURRENT)
    assert "does not fit this version" in err_of(obowlab, "small")


def test_words_without_a_temperature_are_ranked_by_hard_codes_and_distance(data_root: Path, tmp_path: Path) -> None:
    backbone = Backbone(stem="small", width=4)
    method = METHODS["bownet"](
        Bownet(num_words=12, border=0), backbone=backbone, total_steps=1, seed=0, num_classes=None, comm=OneProcess()
    )
    recipe = Recipe(data=Data(dataset="small"), views=Views(original_size=24, original_resize=27), backbone=backbone)
    maps, _ = method.teacher.levels(torch.randn(12, 3, 24, 24, generator=torch.Generator().manual_seed(0)), ("conv5",))
    method.words.copy_(maps["conv5"][:, :, 1, 1])
    words = method.visual_words()
    assert words is not None
    facts = show_words(
        words,
        recipe=recipe,
        machine=Machine(data_root=data_root, loader="torch", workers=0),
        levels=("conv5",),
        dataset="small",
        split="train",
        per_word=8,
        step=STEP,
        device=torch.device("cpu"),
        folder=tmp_path,
        about={},
        report=lambda line: None,
    )
    found = facts["levels"]["conv5"]
    assert found["delta"] == 0
    assert {word["age"] for word in found["words"]} == {STEP}
    assert {patch["score"] for word in found["words"] for patch in word["patches"]} <= {0.0, 1.0}
    assert any(word["score"] > 0 for word in found["words"])
    for word in found["words"]:
        assert word["score"] > 0 or word["use"] == 0, "a word that is nearest somewhere has a patch to show"
