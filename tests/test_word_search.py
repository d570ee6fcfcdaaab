"""The search for the best patches against one that keeps everything, and the sheets and similarities against slow versions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from obowlab.evaluation.words.search import TopPatches, best_locations
from obowlab.evaluation.words.sheets import TILE, Likeness, draw_sheet, map_places, patch_corners
from obowlab.methods import LevelWords

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
