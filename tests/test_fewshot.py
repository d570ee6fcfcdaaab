from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from obowlab.config import FewShot
from obowlab.data.class_lists import class_list
from obowlab.errors import UserError
from obowlab.evaluation.fewshot import Episodes, authors_episodes, counter_episodes, episode_answers, few_shot
from obowlab.evaluation.result import Measurement, Result, mean_with_interval, proportion_with_interval
from obowlab.runs.results import pack, unpack

# ImageNet's validation images have this shape: 1000 classes of 50 images in order. 300 classes to draw from.
IMAGES_OF = {label: list(range(50 * label, 50 * label + 50)) for label in range(1000)}
CLASSES = list(range(0, 900, 3))


def canonical(episodes: Episodes) -> list[list[list[object]]]:
    """Per episode and class: label, training images and test images, sorted."""
    return [
        [[int(train[0]) // 50, sorted(train.tolist()), sorted(test.tolist())] for train, test in zip(trains, tests, strict=True)]
        for trains, tests in zip(episodes.train, episodes.test, strict=True)
    ]


# SHA-256 of the compact JSON of the same list, from a run of the authors' order of draws on this layout.
@pytest.mark.parametrize(
    ("num_shots", "num_queries", "golden"),
    [
        (1, 1, "ffe654261f3691c126326ef1891352e07076f8739b54c8cb0419a60adca5aab1"),
        (5, 1, "3de45baaa98c71e6cbef5f386c9333f3ea146af7b47d2ce21202923b679e683a"),
        (2, 3, "97f4cb88fc6b23d624b545e0b9ecac9885a08ffa5deba553f776aba15669f90f"),
    ],
)
def test_authors_episodes_are_the_authors(num_shots: int, num_queries: int, golden: str) -> None:
    config = FewShot(num_ways=50, num_queries=num_queries, num_episodes=200)
    random.seed(7)  # the global generator must play no part
    listed = canonical(authors_episodes(IMAGES_OF, classes=CLASSES, config=config, num_shots=num_shots))
    assert hashlib.sha256(json.dumps(listed, separators=(",", ":")).encode()).hexdigest() == golden


def test_authors_episodes_in_the_open() -> None:
    episodes = canonical(authors_episodes(IMAGES_OF, classes=CLASSES, config=FewShot(), num_shots=5))
    assert episodes[0][0] == [0, [5, 20, 28, 32, 47], [34]]
    assert episodes[1][0] == [3, [151, 159, 161, 164, 188], [194]]
    assert episodes[199][-1] == [879, [43956, 43973, 43982, 43984, 43986], [43999]]


def draws_of_the_slow_way(seed: int, num_episodes: int, num_shots: int, num_queries: int) -> list[list[list[object]]]:
    """The authors' order of draws once more, with lists of (image, way) pairs that are really shuffled."""
    random.seed(seed)
    episodes = []
    for _ in range(num_episodes):
        ways = sorted(random.sample(CLASSES, 5))
        train, test = [], []
        for way, label in enumerate(ways):
            images = random.sample(IMAGES_OF[label], num_queries + num_shots)
            test += [(image, way) for image in images[:num_queries]]
            train += [(image, way) for image in images[num_queries:]]
        random.shuffle(train)
        random.shuffle(test)
        episodes.append(
            [
                [label, sorted(i for i, w in train if w == way), sorted(i for i, w in test if w == way)]
                for way, label in enumerate(ways)
            ]
        )
    return episodes


def test_authors_episodes_equal_the_slow_way() -> None:
    config = FewShot(num_ways=5, num_queries=2, num_episodes=30)
    state = random.getstate()
    try:
        expected = draws_of_the_slow_way(0, 30, 3, 2)
    finally:
        random.setstate(state)
    assert canonical(authors_episodes(IMAGES_OF, classes=CLASSES, config=config, num_shots=3)) == expected


def test_counter_episodes_are_pure_and_distinct() -> None:
    def draw(num_episodes: int, num_shots: int, seed: int = 0) -> Episodes:
        config = FewShot(num_ways=20, num_queries=2, num_episodes=num_episodes, sampler="counter")
        return counter_episodes(IMAGES_OF, classes=CLASSES, config=config, num_shots=num_shots, seed=seed)

    few, many = draw(5, 1), draw(40, 1)
    assert np.array_equal(few.train, many.train[:5])  # more episodes change nothing
    assert np.array_equal(draw(5, 5).test, few.test)  # nor do more shots change the question
    assert not np.array_equal(draw(5, 1, seed=1).train, few.train)
    for train, test in zip(many.train, many.test, strict=True):
        images = np.concatenate([train, test], axis=1)
        assert all(len(set(row)) == len(row) for row in images.tolist())
        labels = images // 50
        assert (labels == labels[:, :1]).all()
        assert len(set(labels[:, 0])) == 20
        assert set(labels[:, 0]) <= set(CLASSES)


def test_counter_episodes_are_uniform() -> None:
    config = FewShot(num_ways=2, num_episodes=3000, sampler="counter")
    images_of = {label: [10 * label + i for i in range(4)] for label in range(5)}
    episodes = counter_episodes(images_of, classes=range(5), config=config, num_shots=1, seed=3)
    counts = np.bincount(episodes.train.ravel(), minlength=44)[[10 * c + i for c in range(5) for i in range(4)]]
    assert counts.sum() == 6000
    assert abs(counts - 300).max() < 6 * 300**0.5


def slow_answers(features: np.ndarray, train: np.ndarray, test: np.ndarray) -> int:
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    prototypes = [unit[images].mean(0) / np.linalg.norm(unit[images].mean(0)) for images in train]
    hits = [way == int(np.argmax([unit[image] @ p for p in prototypes])) for way, images in enumerate(test) for image in images]
    return sum(hits)


def test_answers_equal_the_slow_way(monkeypatch: pytest.MonkeyPatch) -> None:
    features = np.random.default_rng(0).normal(size=(50_000, 16)) + np.repeat(
        np.random.default_rng(1).normal(size=(1000, 16)), 50, 0
    )
    config = FewShot(num_ways=10, num_queries=3, num_episodes=17)
    episodes = authors_episodes(IMAGES_OF, classes=CLASSES, config=config, num_shots=2)
    expected = [slow_answers(features, train, test) for train, test in zip(episodes.train, episodes.test, strict=True)]
    tensor = torch.from_numpy(features).float()
    assert episode_answers(tensor, episodes=episodes).tolist() == expected
    assert 6 < np.mean(expected) < 29.7  # of 30: the comparison would be empty at either end
    monkeypatch.setattr("obowlab.evaluation.fewshot.MAX_GATHERED", 2500)  # chunks of three episodes
    assert episode_answers(tensor, episodes=episodes).tolist() == expected


def test_perfect_and_chance_features() -> None:
    labels = np.repeat(np.arange(30), 8)
    classes = class_list("all", class_names=[f"c{i}" for i in range(30)], folder=Path("nowhere"))
    config = FewShot(num_ways=10, num_episodes=100, shots=(1, 5))

    def measure(features: torch.Tensor) -> tuple[Measurement, ...]:
        names = [f"c{i}" for i in range(30)]
        return few_shot(features, labels=labels, classes=classes, class_names=names, config=config, seed=0)

    one, five = measure(torch.eye(30)[torch.from_numpy(labels)])
    assert (one.name, one.value, one.interval, one.count) == ("fewshot_1shot", 100.0, 0.0, 100)
    assert (five.name, five.value) == ("fewshot_5shot", 100.0)
    noise, _ = measure(torch.randn(240, 8, generator=torch.Generator().manual_seed(0)))
    assert abs(noise.value - 10) < 3 * noise.interval
    assert 0.5 < noise.interval < 4


def test_class_lists(tmp_path: Path) -> None:
    names = ["n01", "n02", "n03", "n04"]
    (tmp_path / "lowshot_classes.json").write_text(json.dumps({"novel_1": [2, 0], "label_names": ["n04"], "beyond": [4]}))
    (tmp_path / "mine.txt").write_text("n03\n\nn01\n")
    (tmp_path / "mine.json").write_text('["n03", "n01"]')

    def find(spec: str) -> tuple[int, ...]:
        return class_list(spec, class_names=names, folder=tmp_path).indices

    assert find("all") == (0, 1, 2, 3)
    assert find("novel_1") == find(str(tmp_path / "mine.txt")) == find(str(tmp_path / "mine.json")) == (2, 0)
    by_key, by_file = (class_list(s, class_names=names, folder=tmp_path) for s in ("novel_1", str(tmp_path / "mine.txt")))
    assert by_key.names_hash == by_file.names_hash != class_list("all", class_names=names, folder=tmp_path).names_hash


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("novel_3", "Did you mean 'novel_1'"),
        ("label_names", "no list of class indices"),
        ("beyond", "4 classes"),
        ("twice", "twice"),
        ("absent.txt", "Cannot read the class list"),
        ("unknown.txt", "'n09'"),
        ("broken.json", "cannot be read"),
    ],
)
def test_class_lists_that_will_not_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    lists = {"novel_1": [2, 0], "twice": [1, 1], "label_names": ["n04"], "beyond": [4]}
    Path("lowshot_classes.json").write_text(json.dumps(lists))
    Path("unknown.txt").write_text("n01\nn09\n")
    Path("broken.json").write_text("[")
    with pytest.raises(UserError, match=message):
        class_list(spec, class_names=["n01", "n02", "n03", "n04"], folder=tmp_path)


def test_a_key_without_the_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"lowshot_classes\.json"):
        class_list("novel_classes_1", class_names=["a"], folder=tmp_path)


def test_too_few_classes_or_images() -> None:
    names = ["a", "b", "c"]
    classes = class_list("all", class_names=names, folder=Path("nowhere"))
    labels = np.array([0] * 6 + [1] * 6 + [2] * 5)
    features = torch.randn(17, 4)
    with pytest.raises(UserError, match="num_ways = 4 exceeds the 3 classes"):
        few_shot(features, labels=labels, classes=classes, class_names=names, config=FewShot(num_ways=4), seed=0)
    with pytest.raises(UserError, match="need 6 validation images per class, but 'c' has 5"):
        few_shot(features, labels=labels, classes=classes, class_names=names, config=FewShot(num_ways=3), seed=0)


def test_intervals() -> None:
    measured = mean_with_interval("m", [20, 25, 30, 25], of=50)
    assert measured.value == 50
    assert measured.interval == pytest.approx(1.96 * (200 / 3) ** 0.5 / 2, rel=1e-4)
    proportion = proportion_with_interval("p", [1] * 22_930 + [0] * 27_070)
    assert (proportion.value, proportion.count) == (pytest.approx(45.86), 50_000)
    assert proportion.interval == pytest.approx(0.4368, abs=1e-4)  # docs/method.md, 11.5
    nothing = proportion_with_interval("p", [0] * 10)  # Wilson: nothing right of 10 proves little
    assert (nothing.value, nothing.low, nothing.high) == (0, 0, pytest.approx(27.7533, abs=1e-4))


@pytest.mark.parametrize(("right", "count"), [(0, 1), (1, 1), (3, 40), (1053, 1200), (600, 1200)])
def test_wilsons_interval_holds_the_proportions_that_the_score_test_does_not_reject(right: int, count: int) -> None:
    found = proportion_with_interval("p", [1] * right + [0] * (count - right))
    for end in (found.low / 100, found.high / 100):
        assert (right / count - end) ** 2 == pytest.approx(1.959963984540054**2 * end * (1 - end) / count, abs=1e-12)
    assert found.low <= found.value <= found.high
    assert found.interval == pytest.approx((found.high - found.low) / 2)


def test_results_survive_json() -> None:
    measured = (Measurement("m", 1.5, 0.25, 1.25, 1.75, 200, pack([1, 0], of=1)),)
    result = Result("fewshot", 1, "aa", "student", "bb", "cc", measured, {"num_ways": 50, "shots": [1, 5]}, 0.5)
    filed = json.loads(json.dumps(result.to_json()))
    assert Result.from_json(filed) == result
    for measurement in filed["measurements"]:
        del measurement["low"], measurement["high"]  # as earlier versions wrote them
    assert Result.from_json(filed) == result


@pytest.mark.parametrize(("correct", "of"), [([3, 0, 50, 7], 50), ([1, 0, 0, 1, 1, 0, 1, 1, 0, 1], 1), ([300, 2], 400), ([1], 1)])
def test_packed_samples_survive_json(correct: list[int], of: int) -> None:
    packed = json.loads(json.dumps(pack(correct, of=of)))
    assert unpack(packed).tolist() == [100 * right / of for right in correct]


def test_measurements_keep_the_observations_behind_them() -> None:
    measured = mean_with_interval("m", [20, 25, 30, 25], of=50)
    assert unpack(measured.samples).tolist() == [40.0, 50.0, 60.0, 50.0]
    proportion = proportion_with_interval("p", [1, 0, 1])
    assert unpack(proportion.samples).mean() == pytest.approx(proportion.value)
