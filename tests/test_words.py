"""Visual words: the search against one that keeps everything, the sheets, and the command from a checkpoint to a gallery."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from obowlab.data.datasets import open_split
from obowlab.data.photometric import normalise
from obowlab.evaluation import word_sheets
from obowlab.evaluation.features import frozen
from obowlab.evaluation.word_search import CentreViews, TopPatches, best_locations
from obowlab.evaluation.word_sheets import TILE, WORDS_PER_SHEET, Likeness, draw_sheet, map_places, patch_corners
from obowlab.methods import METHODS, LevelWords, OBoW, OneProcess
from obowlab.track.folder import RunFolder
from obowlab.track.mirror import Mirror
from obowlab.training import checkpoint as checkpoints
from tests.command_line import Obowlab, contents, empty_workplace
from tests.runs import small_recipe

STEP = 7


# ------------------------------------------------------------------------------------------------------------ the search


def level_words(vectors: torch.Tensor, *, delta: float) -> LevelWords:
    return LevelWords(
        vectors=vectors, delta=torch.tensor(delta), border=0, inserted_at=torch.zeros(len(vectors), dtype=torch.int64)
    )


def drawn(seed: int, *, num_images: int, num_words: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [N, U, C] and words [K, C] of small whole numbers: distances are exact, and many are equal."""
    generator = torch.Generator().manual_seed(seed)
    local = torch.randint(0, 3, (num_images, 6, 4), generator=generator).float()
    local[num_images // 2 :: 5] = local[: len(local[num_images // 2 :: 5])]  # some images come twice
    return local, torch.randint(0, 3, (num_words, 4), generator=generator).float()


def search(local: torch.Tensor, read_with: LevelWords, *, per_word: int, batch_size: int) -> TopPatches:
    top = TopPatches(num_words=len(read_with.vectors), per_word=per_word, device=torch.device("cpu"))
    positions = np.arange(len(local), dtype=np.int64)
    for start in range(0, len(local), batch_size):
        part = slice(start, start + batch_size)
        top.update(local[part], words=read_with, images=positions[part])
    return top


def search_slowly(local: torch.Tensor, read_with: LevelWords) -> tuple[list[list[tuple[float, float, int, int]]], list[int]]:
    """Keep every image's best location of every word, sort in the end; return these and how often each word was nearest."""
    num_words = len(read_with.vectors)
    best: list[list[tuple[float, float, int, int]]] = [[] for _ in range(num_words)]
    counts = [0] * num_words
    for image, local_UC in enumerate(local):
        of_image: list[list[tuple[float, float, int, int]]] = [[] for _ in range(num_words)]
        for location, feature in enumerate(local_UC):
            distances = (feature - read_with.vectors).square().sum(1)
            counts[int(distances.argmin())] += 1
            codes = torch.softmax(-distances / read_with.delta, dim=0)
            for word in range(num_words):
                of_image[word].append((-float(codes[word]), float(distances[word]), image, location))
        for word in range(num_words):
            best[word].append(min(of_image[word]))
    return [sorted(each) for each in best], counts


@pytest.mark.parametrize("delta", [3.0, 0.5, 0.02])  # at the last one codes are 0 or 1 to float32's last digit
@pytest.mark.parametrize("batch_size", [1, 7, 60])
def test_the_best_patches_are_those_of_a_search_that_keeps_everything(delta: float, batch_size: int) -> None:
    local, vectors = drawn(0, num_images=60, num_words=15)
    read_with = level_words(vectors, delta=delta)
    top = search(local, read_with, per_word=8, batch_size=batch_size)
    expected, counts = search_slowly(local, read_with)
    assert top.num_locations == 60 * 6
    assert top.nearest_K.sum() == 60 * 6
    if len(vectors.unique(dim=0)) == len(vectors):
        assert top.nearest_K.tolist() == counts
    for word, every in enumerate(expected):
        scores = torch.tensor([-score for score, *_ in every[:8]])
        torch.testing.assert_close(top.scores_KP[word], scores, atol=1e-6, rtol=1e-6)
        of_image = {image: (score, distance) for score, distance, image, _ in every}
        images = top.images_KP[word].tolist()
        assert len(set(images)) == 8, "at most one patch per image"
        for rank, image in enumerate(images):
            score, distance = of_image[image]
            assert float(top.distances_KP[word, rank]) == distance
            # The very image, unless codes that differ in the last digit stand beside each other.
            if all(abs(score - other) > 1e-6 or score == other for other, *_ in every):
                assert image == every[rank][2], (word, rank)


def test_equal_patches_are_taken_by_distance_then_by_order() -> None:
    vectors = torch.tensor([[0.0], [100.0]])
    local = torch.tensor([[[3.0]], [[1.0]], [[2.0]], [[1.0]]])  # every code of word 0 is 1 in float32
    top = search(local, level_words(vectors, delta=1.0), per_word=3, batch_size=2)
    assert top.scores_KP[0].tolist() == [1.0, 1.0, 1.0]
    assert top.images_KP[0].tolist() == [1, 3, 2]
    assert top.images_KP[1].tolist() == [0, 2, 1], "where all codes are 0 the nearest come first as well"


def test_codes_are_finite_and_one_hot_without_a_temperature() -> None:
    local, vectors = drawn(1, num_images=9, num_words=5)
    distances = (local[:, :, None] - vectors).square().sum(-1) * 1e6
    scores, nearest, _ = best_locations(distances, delta=torch.tensor(0.0))
    assert torch.isfinite(scores).all()
    assert torch.isfinite(nearest).all()
    assert ((distances == distances.amin(-1, keepdim=True)).any(1) == (scores > 0)).all()
    tiny, _, _ = best_locations(distances, delta=torch.tensor(1e-30))
    assert torch.equal(tiny, scores)


def test_what_is_kept_does_not_grow_with_the_images() -> None:
    def kept(num_images: int) -> int:
        local, vectors = drawn(2, num_images=num_images, num_words=10)
        top = search(local, level_words(vectors, delta=0.5), per_word=4, batch_size=16)
        tensors = [value for value in vars(top).values() if isinstance(value, torch.Tensor)]
        assert all(value.untyped_storage().nbytes() == value.numel() * value.element_size() for value in tensors), (
            "a view would keep what it was cut from"
        )
        return sum(value.numel() for value in tensors)

    assert kept(16) == kept(800) == 10 * 4 * 4 + 10 + 1


def test_fewer_images_than_patches_leave_empty_places() -> None:
    local, vectors = drawn(3, num_images=3, num_words=5)
    top = search(local, level_words(vectors, delta=0.5), per_word=8, batch_size=2)
    assert (top.images_KP[:, :3] >= 0).all()
    assert (top.images_KP[:, 3:] == -1).all()


# ------------------------------------------------------------------------------------------------------------ the sheets


def test_patches_lie_around_their_place_and_within_the_view() -> None:
    places = map_places(np.arange(25).reshape(5, 5), width=5, border=1)
    assert places[0, 0].tolist() == [1, 1]
    assert places[4, 2].tolist() == [5, 3]
    corners = patch_corners(places, map_size=(7, 7), side=96, view=224)
    assert corners[2, 2].tolist() == [64, 64], "the middle of the map is the middle of the view"
    assert corners[0, 0].tolist() == [0, 0]
    assert corners[4, 4].tolist() == [128, 128]
    everywhere = map_places(np.arange(16), width=4, border=0)
    small = patch_corners(everywhere, map_size=(4, 4), side=14, view=32)
    assert small.min() == 0
    assert small.max() == 32 - 14
    assert patch_corners(everywhere, map_size=(4, 4), side=32, view=32).max() == 0


@pytest.mark.parametrize("side", [20, 100])
def test_a_sheet_shows_a_word_per_row_and_its_best_patch_first(side: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (3, 2, 3), dtype=np.uint8)
    corners = rng.integers(0, 120 - side, (3, 2, 2))
    pixels = np.zeros((6, 120, 120, 3), dtype=np.uint8)
    for number, (colour, (top, left)) in enumerate(zip(colours.reshape(-1, 3), corners.reshape(-1, 2), strict=True)):
        pixels[number, top : top + side, left : left + side] = colour
    draw_sheet(pixels, corners, side=side, path=tmp_path / "sheet.jpg")
    with Image.open(tmp_path / "sheet.jpg") as image:
        sheet = np.asarray(image).reshape(3, TILE, 2, TILE, 3).transpose(0, 2, 1, 3, 4).astype(int)
    assert np.abs(sheet - colours[:, :, None, None]).max() <= 8, "nothing but the patch, up to JPEG's losses"


def test_coherence_is_the_mean_over_all_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(9, 4, 5, generator=generator)
    features[2, 1] = 0.0
    used = torch.tensor([True, True, True, False, True, True, True, True, True])
    likeness = Likeness()
    found = likeness.add(features[:5], used=used[:5]) + likeness.add(features[5:], used=used[5:])

    def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
        return float(F.cosine_similarity(a, b, dim=0))

    pairs = [(p, q) for p in range(4) for q in range(4) if p != q]
    slow = [float(np.mean([cosine(word[p], word[q]) for p, q in pairs])) for word in features]
    np.testing.assert_allclose(np.array(found, dtype=float), slow, atol=1e-6)
    in_use = [index for index in range(9) if used[index]]
    assert likeness.median() == pytest.approx(np.median([slow[index] for index in in_use]), abs=1e-6)
    others = [cosine(a, b) for i in in_use for j in in_use if i != j for a in features[i] for b in features[j]]
    assert likeness.of_others() == pytest.approx(np.mean(others), abs=1e-6)


def test_one_patch_or_one_word_has_no_coherence() -> None:
    likeness = Likeness()
    assert likeness.add(torch.rand(3, 1, 5), used=torch.ones(3, dtype=torch.bool)) == [None, None, None]
    assert likeness.median() is None
    assert likeness.of_others() is not None, "patches of different words can still be compared"
    alone = Likeness()
    alone.add(torch.rand(1, 4, 5), used=torch.ones(1, dtype=torch.bool))
    assert alone.of_others() is None
    idle = Likeness()
    idle.add(torch.rand(2, 4, 5), used=torch.zeros(2, dtype=torch.bool))
    assert (idle.median(), idle.of_others()) == (None, None)


# ----------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data_root: Path) -> Path:
    place = empty_workplace(tmp_path, monkeypatch)
    machine = tmp_path / "machine.toml"
    machine.write_text(f'data_root = "{data_root}"\nloader = "torch"\nworkers = 0\n')
    monkeypatch.setenv("OBOWLAB_MACHINE", str(machine))
    return place


@pytest.fixture
def obowlab(capsys: pytest.CaptureFixture[str]) -> Obowlab:
    return Obowlab(capsys)


def trained(place: Path, *overrides: str) -> RunFolder:
    """Make a run of a small recipe whose checkpoint holds a method that took a few steps on noise."""
    loaded = small_recipe(place, dataset="small", overrides=overrides)
    recipe = loaded.recipe
    folder = RunFolder.create(loaded, seed=0, runs_root=place / "runs")
    method = METHODS["obow"](recipe.method, backbone=recipe.backbone, total_steps=STEP, seed=0, num_classes=5, comm=OneProcess())
    generator = torch.Generator().manual_seed(0)
    for step in range(STEP):
        original = torch.randn(16, 3, 24, 24, generator=generator)
        draws = torch.rand(16, method.num_draws, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            method(original, {"crops": original}, step=step, draws=draws)
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
    assert obowlab("words", "small", "--dataset", "nowhere", "--dry-run")[0] == 2
    assert obowlab("words", "small", "--dataset", "synthetic", "--data-root", "fresh", "--dry-run")[0] == 0
    assert contents(workplace) == before


def refused(obowlab: Obowlab, *words: str) -> str:
    """Return the one sentence that a mistake gets, the same in a dry run."""
    code, out, err = obowlab("words", *words)
    assert (code, out) == (2, ""), err
    (line,) = err.splitlines()
    assert obowlab("words", *words, "--dry-run") == (2, "", err)
    return line


def test_mistakes_are_one_sentence(run: RunFolder, workplace: Path, obowlab: Obowlab, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "There is no run 'nothing'" in refused(obowlab, "nothing")
    assert "'--level'" in refused(obowlab, "small", "--level", "conv3")
    assert "`obowlab data prepare other" in refused(obowlab, "small", "--dataset", "other")
    Path("notes").mkdir()
    Path("notes/mine.txt").write_text("mine")
    assert "notes holds other things than a gallery" in refused(obowlab, "small", "--out", "notes")
    assert "mine.txt is a file; choose another --out" in refused(obowlab, "small", "--out", "notes/mine.txt")
    assert "Cannot write" in err_of(obowlab, "small", "--out", "notes/mine.txt/deep")
    one_level = trained(workplace, 'method.levels=["conv5"]')
    assert "no words of conv4; choose --level from conv5" in refused(obowlab, one_level.run_id, "--level", "conv4")
    monkeypatch.setattr(OBoW, "visual_words", lambda self: None)
    assert f"Run '{run.run_id}' has no visual words: its method, obow," in refused(obowlab, run.run_id)
    monkeypatch.undo()


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
    assert "does not fit this version" in refused(obowlab, "small")
