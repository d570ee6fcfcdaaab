import math

import pytest
import torch

from obowlab.methods import bow
from tests.oracles import balanced_assignment


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_squared_distances() -> None:
    x, words = randn(50, 7), randn(9, 7, seed=1)
    expected = torch.stack([((row - words) ** 2).sum(1) for row in x])
    assert torch.allclose(bow.squared_distances(x, words), expected, atol=1e-5)
    assert bow.squared_distances(x, x).diagonal().min() >= 0


def test_distances_stay_in_float32_under_bf16_autocast() -> None:
    # Neighbours far from the origin: in bfloat16 the cross term swallows their distance.
    words = 10 + 0.1 * randn(16, 64)
    exact = bow.squared_distances(words.double(), words.double())
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = bow.squared_distances(words, words)
            logits = bow.bow_logits(words, words, kappa=1.0)
        assert torch.get_float32_matmul_precision() == "medium", "put back"
    finally:
        torch.set_float32_matmul_precision(before)
    assert found.dtype == logits.dtype == torch.float32
    assert torch.allclose(found.double(), exact, atol=0.02)
    assert torch.allclose(logits.double(), words.double() @ words.double().T, rtol=1e-5)


@pytest.mark.parametrize("limit", [1, 300, 10**9])
@pytest.mark.parametrize("pooling", ["max", "mean"])
def test_chunks_do_not_change_the_targets(limit: int, pooling: str) -> None:
    local, words = randn(5, 12, 6), randn(10, 6, seed=1)
    dist = torch.stack([torch.stack([((x - words) ** 2).sum(1) for x in image]) for image in local])
    nearest_dist, nearest = bow.nearest_words(bow.Distances(local, words, limit=limit))
    assert torch.equal(nearest, dist.argmin(-1))
    assert torch.allclose(nearest_dist, dist.min(-1).values, atol=1e-5)
    codes = torch.softmax(-dist / 0.7, dim=-1)
    expected = codes.amax(1) if pooling == "max" else codes.mean(1)
    expected = expected / expected.sum(1, keepdim=True)
    found = bow.soft_bow(bow.Distances(local, words, limit=limit), delta=torch.tensor(0.7), pooling=pooling)
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(("limit", "sizes"), [(1, [1] * 5), (239, [1] * 5), (240, [2, 2, 1]), (600, [5]), (None, [5])])
def test_a_chunk_is_as_many_whole_images_as_the_limit_has_room_for(limit: int | None, sizes: list[int]) -> None:
    local, words = randn(5, 12, 6), randn(10, 6, seed=1)  # 120 distances an image
    chunks = list(bow.Distances(local, words, limit=limit))
    assert [len(part) for part, _ in chunks] == sizes
    assert [dist.shape for _, dist in chunks] == [(size, 12, 10) for size in sizes]
    assert torch.equal(torch.cat([part for part, _ in chunks]), local)


@pytest.mark.parametrize(
    ("limit", "keep", "computed"),
    [
        *((240, 0, 3 + 3), (240, 239, 3 + 3), (240, 240, 3 + 2), (240, 479, 3 + 2), (240, 599, 3 + 1), (240, 600, 3)),
        *((10_000, 599, 1 + 1), (10_000, 600, 1)),  # a batch smaller than what is made at a time
    ],
)
def test_distances_that_fit_are_computed_once(limit: int, keep: int, computed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(
        bow, "squared_distances", lambda *args, real=bow.squared_distances, **kw: calls.append(1) or real(*args, **kw)
    )
    distances = bow.Distances(
        randn(5, 12, 6), randn(10, 6, seed=1), limit=limit, keep=keep
    )  # chunks of 2, 2 and 1 images, or one
    once, again = ([dist for _, dist in distances] for _ in range(2))
    assert len(calls) == computed
    assert all(torch.equal(one, other) for one, other in zip(once, again, strict=True))


def test_mean_squared_distance_is_that_of_all_pairs() -> None:
    local, words = randn(5, 12, 6), randn(10, 6, seed=1)
    expected = bow.squared_distances(local.flatten(0, 1), words).mean()
    assert float(bow.mean_squared_distance(local, words)) == pytest.approx(float(expected), rel=1e-5)


def test_assigning_leaves_the_distances_alone() -> None:
    dist = bow.squared_distances(randn(50, 7), randn(9, 7, seed=1)).view(5, 10, 9)
    before = dist.clone()
    codes = bow.soft_assign(dist, delta=torch.tensor(0.3))
    assert torch.equal(dist, before)
    assert torch.allclose(codes, torch.softmax(-before / 0.3, dim=-1), atol=1e-6)


def test_hard_bow_marks_or_counts_words() -> None:
    nearest = torch.tensor([[0, 0, 0, 2], [1, 1, 3, 3]])
    assert torch.equal(bow.hard_bow(nearest, num_words=4, pooling="max"), torch.tensor([[0.5, 0, 0.5, 0], [0, 0.5, 0, 0.5]]))
    assert torch.equal(bow.hard_bow(nearest, num_words=4, pooling="mean"), torch.tensor([[0.75, 0, 0.25, 0], [0, 0.5, 0, 0.5]]))


def test_soft_codes_become_hard_as_delta_falls() -> None:
    local, words = randn(3, 8, 4), randn(6, 4, seed=1)
    hard = bow.hard_bow(bow.nearest_words(bow.Distances(local, words))[1], num_words=6, pooling="max")
    assert torch.allclose(bow.soft_bow(bow.Distances(local, words), delta=torch.tensor(1e-6), pooling="max"), hard, atol=1e-6)


def test_crop_border() -> None:
    x = torch.arange(25.0).view(1, 1, 5, 5)
    assert bow.crop_border(x, border=1).flatten().tolist() == [6, 7, 8, 11, 12, 13, 16, 17, 18]
    assert torch.equal(bow.crop_border(x, border=0), x)
    wide = torch.arange(12.0).view(1, 1, 3, 4)
    assert bow.crop_border(wide, border=1).flatten().tolist() == [5, 6]


def test_queue_vectors() -> None:
    x = torch.arange(32.0).view(1, 2, 4, 4).repeat(4, 1, 1, 1)
    uniforms = torch.tensor([0.0, 0.49, 0.5, math.nextafter(1.0, 0.0)], dtype=torch.float64)
    assert bow.queue_vectors(x, kind="local", uniforms_B=uniforms)[:, 0].tolist() == [0, 7, 8, 15]
    # 3x3 means have their centres at 5, 6, 9 and 10.
    assert bow.queue_vectors(x, kind="local_average", uniforms_B=uniforms).tolist() == [[5, 21], [6, 22], [9, 25], [10, 26]]
    assert bow.queue_vectors(x, kind="global_average", uniforms_B=uniforms).tolist() == [[7.5, 23.5]] * 4


def test_a_number_next_to_one_stays_inside() -> None:
    uniform = torch.tensor([1.0 - 2.0**-24])  # times 3 it is 3 in float32
    for num_locations in range(1, 200):
        vectors = torch.arange(float(num_locations)).view(1, -1, 1)
        assert int(bow.pick_locations(uniform, vectors)) == num_locations - 1


@pytest.mark.parametrize("num_words", [5, 6, 7])
def test_queue_slots_are_those_of_one_by_one_insertion(num_words: int) -> None:
    for start in range(num_words):
        for num_vectors in range(1, 3 * num_words + 2):
            ring, pointer = [-1] * num_words, start
            for vector in range(num_vectors):
                ring[pointer] = vector
                pointer = (pointer + 1) % num_words
            slots = bow.queue_slots(torch.tensor(start), num_vectors=num_vectors, num_words=num_words)
            found = torch.full((num_words,), -1)
            found[slots] = torch.arange(num_vectors)[-len(slots) :]
            assert found.tolist() == ring


def test_word_sums() -> None:
    counts, sums = bow.word_sums(torch.tensor([[1.0, 2], [3, 4], [5, 6]]), torch.tensor([2, 0, 2]), num_words=4)
    assert counts.tolist() == [1, 0, 2, 0]
    assert sums.tolist() == [[3, 4], [0, 0], [6, 8], [0, 0]]


@pytest.mark.parametrize("limit", [1, 100, None])
def test_sinkhorn_is_the_plain_scaling(limit: int | None) -> None:
    local, words, epsilon = randn(4, 6, 3), randn(8, 3, seed=1), torch.tensor(0.4)
    dist = bow.squared_distances(local.flatten(0, 1), words)
    expected = balanced_assignment(dist, epsilon=float(epsilon), iterations=3)
    potential = bow.sinkhorn(bow.Distances(local, words, limit=limit), epsilon=epsilon, iterations=3, all_gather=lambda x: x)
    assert torch.allclose(bow.balanced_codes(dist, potential, epsilon=epsilon).double(), expected, atol=1e-5)


def test_sinkhorn_balances_words_that_plain_scaling_cannot_even_represent() -> None:
    # exp(-D / epsilon) of the far words underflows to 0 in float32 for every location.
    local, words = randn(4, 32, 3), torch.cat([randn(4, 3, seed=1), 100 + randn(4, 3, seed=2)])
    epsilon = torch.tensor(5.0)
    potential = bow.sinkhorn(bow.Distances(local, words), epsilon=epsilon, iterations=200, all_gather=lambda x: x)
    codes = bow.balanced_codes(bow.squared_distances(local.flatten(0, 1), words), potential, epsilon=epsilon)
    assert torch.allclose(codes.sum(-1), torch.ones(128), atol=1e-5)
    assert torch.allclose(codes.mean(0), torch.full((8,), 1 / 8), rtol=0.02)


def log_domain_potential(dist: torch.Tensor, *, epsilon: float, iterations: int) -> torch.Tensor:
    """The potential of `sinkhorn` by the plain formula of docs/method.md, 3.6, every sum in the log domain and in float64."""
    scores, potential = -dist.double() / epsilon, torch.zeros(dist.shape[1], dtype=torch.float64)
    for _ in range(iterations):
        potential = potential - torch.log_softmax(potential + scores, dim=1).logsumexp(0)
        potential = potential - potential.mean()
    return potential


@pytest.mark.parametrize("iterations", [1, 2, 3, 10])
@pytest.mark.parametrize("epsilon", [0.02, 0.4, 50.0])
@pytest.mark.parametrize("distance", [0.0, 10.0, 30.0])  # at 30 and 0.02 the far words' codes are of order exp(-10^5)
def test_sinkhorn_equals_the_log_domain(iterations: int, epsilon: float, distance: float) -> None:
    local, words = randn(4, 25, 3).double(), torch.cat([randn(5, 3, seed=1), distance + randn(5, 3, seed=2)]).double()
    dist, scale = bow.squared_distances(local.flatten(0, 1), words), torch.tensor(epsilon, dtype=torch.float64)
    potential = bow.sinkhorn(bow.Distances(local, words, limit=200), epsilon=scale, iterations=iterations, all_gather=lambda x: x)
    expected = log_domain_potential(dist, epsilon=epsilon, iterations=iterations)
    assert torch.allclose(potential, expected, rtol=1e-9, atol=1e-6)
    single = bow.sinkhorn(
        bow.Distances(local.float(), words.float()), epsilon=scale.float(), iterations=iterations, all_gather=lambda x: x
    )
    rounding = 4e-6 * (1 + float(dist.max()) / epsilon)  # of D / epsilon in float32
    assert torch.allclose(single.double(), expected, rtol=0, atol=rounding)


@pytest.mark.parametrize("epsilon", [1e-12, 1e-6, 1e-3, 1e12])
def test_sinkhorn_stays_finite_at_any_epsilon(epsilon: float) -> None:
    local, words = randn(4, 25, 3), torch.cat([randn(5, 3, seed=1), 1000 + randn(5, 3, seed=2), torch.full((2, 3), 7.0)])
    distances, scale = bow.Distances(local, words), torch.tensor(epsilon)
    potential = bow.sinkhorn(distances, epsilon=scale, iterations=5, all_gather=lambda x: x)
    assert potential.isfinite().all()
    for _, dist in distances:
        codes = bow.balanced_codes(dist, potential, epsilon=scale)
        assert torch.allclose(codes.sum(-1), torch.ones(4, 25), atol=1e-5)


def test_cross_entropy_asks_every_view_for_the_whole_bag() -> None:
    logits = randn(3, 2, 5)
    target = torch.softmax(randn(3, 5, seed=1), dim=-1)
    expected = sum(torch.nn.functional.cross_entropy(logits[b, v], target[b]) for b in range(3) for v in range(2)) / 6
    assert float(bow.cross_entropy(torch.log_softmax(logits, -1), target)) == pytest.approx(float(expected), rel=1e-6)


def test_perplexity_takes_zero_log_zero_as_zero() -> None:
    rows = torch.tensor([[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0.25, 0.25, 0.25, 0.25]])
    assert bow.perplexity(rows).tolist() == pytest.approx([1, 2, 4])
    assert bow.entropy(rows)[0] == 0


def test_entropy_of_logs_is_that_of_the_last_dimension() -> None:
    probability = torch.softmax(randn(2, 3, 5), dim=-1)
    assert torch.allclose(bow.entropy_of_logs(probability.log()), bow.entropy(probability))
    assert bow.entropy_of_logs(probability.log()).shape == (2, 3)


def test_neighbours_are_pairs_of_rows() -> None:
    assert bow.neighbours(torch.arange(6)).tolist() == [1, 0, 3, 2, 5, 4]
    assert bow.neighbours(torch.tensor([[1, 2], [3, 4]])).tolist() == [[3, 4], [1, 2]]


def test_next_msd() -> None:
    assert float(bow.next_msd(torch.tensor(0.5), torch.tensor(10.0), momentum=0.99)) == pytest.approx(0.595)
