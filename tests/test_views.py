"""Random numbers, geometry, colours and patch positions: pure, uniform, and distributed as torchvision's."""

import numpy as np
import pytest
import torch
import torchvision.transforms as T
from torchvision.transforms.functional import _compute_resized_output_size

from obowlab.config import CropView, Views
from obowlab.randomness import Stream, epoch_order, philox4x32, random_words, uniforms
from obowlab.views.views import (
    CROP_RATIO,
    CROP_TRIES,
    JITTER_ORDERS,
    centre_geometry,
    colour,
    flips,
    geometry,
    patch_positions,
    random_boxes,
)

FULL = Views(num_crops=2, num_patches=5)


def draw(**changes):
    return uniforms(**{"seed": 1, "epoch": 2, "indices": np.arange(50), "stream": Stream.CROPS, "count": 7} | changes)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    words = philox4x32(np.array([counter, [1, 2, 3, 4]], dtype=np.uint32), np.array(key, dtype=np.uint32))
    assert words[0].tolist() == expected


def test_the_counter_is_block_index_epoch_stream_and_lane():
    seed, stream, lane = (7 << 32) | 5, Stream.CROPS, 9
    indices = np.array([2, 2**32 - 1])
    words = random_words(seed=seed, epoch=3, indices=indices, stream=stream, count=5, lane=lane)
    for row, index in enumerate(indices.tolist()):
        counter = np.array([[block, index, 3, 2 | 9 << 8] for block in range(2)], dtype=np.uint32)
        assert words[row].tolist() == philox4x32(counter, np.array([5, 7], dtype=np.uint32)).reshape(-1)[:5].tolist()
    assert words[0].tolist() == [3342535016, 662919797, 244257755, 523370704, 1382457460]
    assert words.dtype == np.uint32


@pytest.mark.parametrize(("name", "bits"), [("seed", 64), ("epoch", 32), ("lane", 24)])
def test_numbers_that_the_counter_has_no_room_for_are_refused(name, bits):
    draw(**{name: 2**bits - 1})
    for value in (-1, 2**bits):
        with pytest.raises(ValueError, match=f"{name} {value} is not an unsigned {bits}-bit number"):
            draw(**{name: value})


def test_the_order_of_an_epoch_is_the_same_for_ever():
    assert epoch_order(12, seed=5, epoch=3).tolist() == [7, 2, 0, 5, 4, 3, 8, 6, 9, 1, 11, 10]


def test_uniforms_are_pure_in_seed_epoch_index_stream_and_lane():
    assert np.array_equal(draw()[[3, 40]], draw(indices=np.array([3, 40])))
    assert np.array_equal(draw()[:, :3], draw(count=3))
    for change in (
        {"seed": 2},
        {"epoch": 3},
        {"stream": Stream.FLIPS},
        {"lane": 1},
        {"indices": np.arange(50) + 50},
        {"seed": 1 + 2**32},
    ):
        assert not np.isin(draw(**change), draw()).any(), change


def test_uniforms_are_uniform_and_uncorrelated():
    u = draw(indices=np.arange(20000), count=4)
    assert u.min() >= 0.0
    assert u.max() < 1.0
    histogram = np.stack([np.histogram(column, bins=20, range=(0, 1))[0] for column in u.T])
    chi_squared = ((histogram - 1000.0) ** 2 / 1000.0).sum(axis=1)
    assert (chi_squared < 43.8).all()  # the 0.1 % point of 19 degrees of freedom
    correlation = np.corrcoef(np.concatenate([u.T, np.roll(u, 1, axis=0).T]))
    assert np.abs(correlation - np.eye(8)).max() < 4.0 / np.sqrt(20000)  # with each other and with the previous index


def test_epoch_order_is_a_pure_permutation():
    order = epoch_order(1000, seed=5, epoch=3)
    assert sorted(order.tolist()) == list(range(1000))
    assert np.array_equal(order, epoch_order(1000, seed=5, epoch=3))
    assert not np.array_equal(order, epoch_order(1000, seed=5, epoch=4))
    assert not np.array_equal(order, epoch_order(1000, seed=6, epoch=3))
    firsts = [epoch_order(10, seed=1, epoch=epoch)[0] for epoch in range(1000)]
    assert (np.abs(np.bincount(firsts, minlength=10) - 100) < 40).all()


@pytest.mark.parametrize(("height", "width", "scale"), [(375, 500, (0.08, 0.6)), (500, 333, (0.6, 1.0)), (64, 64, (0.08, 0.6))])
def test_crops_are_distributed_as_torchvisions(height, width, scale):
    count = 3000
    views = Views(crop_scale=scale)
    sides = np.full(count, height), np.full(count, width)
    boxes = geometry(views, seed=1, epoch=0, indices=np.arange(count), heights=sides[0], widths=sides[1]).boxes[:, 1]
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array([T.RandomResizedCrop.get_params(image, list(scale), list(CROP_RATIO)) for _ in range(count)])

    def statistics(boxes):
        top, left, rows, columns = boxes.T.astype(float)
        return np.stack([rows * columns / (height * width), np.log(columns / rows), top, left, top * left, rows**2])

    ours, theirs = statistics(boxes), statistics(theirs)
    error = np.sqrt((ours.var(axis=1) + theirs.var(axis=1)) / count)
    assert (np.abs(ours.mean(axis=1) - theirs.mean(axis=1)) < 4 * error).all()
    assert (np.abs(ours.std(axis=1) / theirs.std(axis=1) - 1) < 0.1).all()
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 0] + boxes[:, 2] <= height).all()
    assert (boxes[:, 1] + boxes[:, 3] <= width).all()


@pytest.mark.parametrize(("height", "width"), [(20, 400), (400, 20), (7, 9), (30, 40)])
def test_a_crop_that_never_fits_is_torchvisions_fallback(height, width):
    scale = (4.0, 4.0)  # larger than the image: no try fits
    draws = uniforms(seed=0, epoch=0, indices=np.arange(3), stream=Stream.CROPS, count=2 * CROP_TRIES + 2)
    boxes = random_boxes(draws, heights=np.full(3, height), widths=np.full(3, width), scale=scale)
    expected = T.RandomResizedCrop.get_params(torch.empty(3, height, width), list(scale), list(CROP_RATIO))
    assert (boxes == np.array(expected)).all()


def test_centre_is_torchvisions_resize_and_centre_crop():
    rng = np.random.default_rng(0)
    heights, widths = rng.integers(20, 700, 500), rng.integers(20, 700, 500)
    plan = centre_geometry(Views(), heights=heights, widths=widths)
    for row, (height, width) in enumerate(zip(heights.tolist(), widths.tolist(), strict=True)):
        resized = _compute_resized_output_size((height, width), [256])
        assert plan.resized[row, 0].tolist() == resized
        assert plan.windows[row, 0].tolist() == [round((side - 224) / 2.0) for side in resized]
        assert plan.boxes[row, 0].tolist() == [0, 0, height, width]


def test_geometry_covers_every_view_and_does_not_depend_on_its_neighbours():
    heights, widths = np.array([100, 60, 300]), np.array([80, 90, 300])
    plan = geometry(FULL, seed=3, epoch=1, indices=np.array([7, 8, 9]), heights=heights, widths=widths)
    assert plan.sizes == (224, 160, 160, 256)
    assert plan.boxes.shape == (3, 4, 4)
    assert (plan.resized[:, 1:] == np.array([160, 160, 256])[:, None]).all()
    alone = geometry(FULL, seed=3, epoch=1, indices=np.array([8]), heights=heights[1:2], widths=widths[1:2])
    assert np.array_equal(alone.boxes[0], plan.boxes[1])
    fewer = geometry(Views(num_crops=1), seed=3, epoch=1, indices=np.array([7, 8, 9]), heights=heights, widths=widths)
    assert np.array_equal(fewer.boxes, plan.boxes[:, :2])
    assert not np.array_equal(plan.boxes[:, 1], plan.boxes[:, 2])


def test_flips_happen_with_their_probability():
    indices = np.arange(4000)
    mirrored = flips(FULL, seed=0, epoch=0, indices=indices)
    assert mirrored.shape == (4000, 4)
    assert (np.abs(mirrored.mean(axis=0) - 0.5) < 0.04).all()
    assert not flips(Views(flip_probability=0.0), seed=0, epoch=0, indices=indices).any()
    assert flips(Views(flip_probability=1.0), seed=0, epoch=0, indices=indices).all()


def test_colours_have_the_papers_ranges_and_probabilities():
    params = colour(FULL, seed=0, epoch=0, indices=np.arange(8000))
    jittered = params.brightness != 1.0
    assert (np.abs(jittered.mean(axis=0) - 0.8) < 0.02).all()
    for factor in (params.brightness, params.contrast, params.saturation):
        assert (factor[~jittered] == 1.0).all()
        assert (factor >= 0.6).all()
        assert (factor <= 1.4).all()
        assert factor[jittered].std() == pytest.approx(0.8 / np.sqrt(12), rel=0.03)
    assert np.abs(params.hue).max() <= 0.1
    assert params.hue[jittered].std() == pytest.approx(0.2 / np.sqrt(12), rel=0.03)
    assert (np.abs(params.grayscale.mean(axis=0) - 0.2) < 0.02).all()
    assert (np.abs((params.sigma > 0).mean(axis=0) - [0.5, 0.5, 0.0]) < 0.02).all()  # patches are not blurred
    assert params.sigma[params.sigma > 0].min() >= 0.1
    assert params.sigma.max() <= 2.0
    _, counts = np.unique(params.orders.reshape(-1, 4), axis=0, return_counts=True)
    assert len(counts) == 24
    assert (np.abs(counts / 1000 - 1) < 0.15).all()
    assert np.array_equal(colour(FULL, seed=0, epoch=0, indices=np.array([77])).hue[0], params.hue[77])


def test_patches_lie_in_the_grid_and_every_cell_is_chosen_equally_often():
    corners = patch_positions(FULL, seed=0, epoch=0, indices=np.arange(3000))
    assert corners.shape == (3000, 5, 2)
    assert corners.min() == 0
    assert corners.max() == 2 * 68 + 24  # (256 - 96 - 24) // 2 = 68
    whole = patch_positions(FULL.model_copy(update={"num_patches": 9, "patch_jitter": 0}), seed=0, epoch=0, indices=np.arange(2))
    offset = (256 - 96) // 2
    assert whole[1].tolist() == [[row * offset, column * offset] for row in range(3) for column in range(3)]
    still = patch_positions(FULL.model_copy(update={"patch_jitter": 0}), seed=0, epoch=0, indices=np.arange(3000)) // offset
    cells = still[..., 0] * 3 + still[..., 1]
    assert all(len(set(row)) == 5 for row in cells.tolist())
    assert (np.abs(np.bincount(cells.reshape(-1)) / (3000 * 5 / 9) - 1) < 0.1).all()


# Slow, obvious versions: one image and one view at a time, from the numbers that are drawn for it.

MIXED = {"jitter_probability": 0.6, "blur_probability": 0.4, "grayscale_probability": 0.3, "brightness": 0.4, "contrast": 0.9}


@pytest.mark.parametrize("num_patches", [0, 1, 5])
def test_colours_are_these_functions_of_the_draws(num_patches):
    views = Views(num_crops=2, num_patches=num_patches, **MIXED)
    found = colour(views, seed=3, epoch=4, indices=np.arange(30))
    lanes = [(Stream.CROP_COLOUR, 0), (Stream.CROP_COLOUR, 1)] + [(Stream.PATCH_COLOUR, 0)] * (num_patches > 0)
    assert found.hue.shape == (30, len(lanes))
    for image in range(30):
        for view, (stream, lane) in enumerate(lanes):
            u = uniforms(seed=3, epoch=4, indices=np.array([image]), stream=stream, count=9, lane=lane)[0]
            jittered, blurred = u[0] < 0.6, u[7] < (0.4 if stream is Stream.CROP_COLOUR else 0.0)
            place = (image, view)
            assert found.orders[place].tolist() == JITTER_ORDERS[int(24 * u[1])].tolist()
            assert found.brightness[place] == pytest.approx(0.6 + 0.8 * u[2] if jittered else 1.0)
            assert found.contrast[place] == pytest.approx(0.1 + 1.8 * u[3] if jittered else 1.0)
            assert found.saturation[place] == pytest.approx(
                1.0 - views.saturation + 2.0 * views.saturation * u[4] if jittered else 1.0
            )
            assert found.hue[place] == pytest.approx(views.hue * (2.0 * u[5] - 1.0) if jittered else 0.0)
            assert found.grayscale[place] == (u[6] < 0.3)
            low, high = views.blur_sigma
            assert found.sigma[place] == pytest.approx(low + (high - low) * u[8] if blurred else 0.0)


def test_a_crop_with_settings_of_its_own_is_drawn_as_if_all_had_them():
    own = {
        "scale": (0.3, 0.4),
        "interpolation": "bicubic",
        "jitter_probability": 1.0,
        "brightness": 0.7,
        "contrast": 0.1,
        "saturation": 0.2,
        "hue": 0.3,
        "grayscale_probability": 0.5,
        "blur_probability": 0.9,
        "blur_sigma": (3.0, 4.0),
        "solarise_probability": 0.5,
    }
    assert own.keys() == CropView.model_fields.keys()
    drawn = {"seed": 3, "epoch": 4, "indices": np.arange(30)}
    sizes = {"heights": np.full(30, 200), "widths": np.full(30, 300)}
    for extent, scale in (("part", "crop_scale"), ("whole", "whole_scale")):
        plain = Views(num_crops=3, num_patches=2, crop_extent=extent, **MIXED)
        mixed = Views(num_crops=3, num_patches=2, crop_extent=extent, per_crop=(CropView(), CropView(**own), CropView()), **MIXED)
        renamed = {scale if name == "scale" else name: value for name, value in own.items()}
        all_so = plain.model_copy(update=renamed)
        found, alike, so = (colour(views, **drawn) for views in (mixed, plain, all_so))
        for name, values in vars(found).items():
            for column, expected in enumerate((alike, so, alike, alike)):  # the last is the patches'
                np.testing.assert_array_equal(values[:, column], getattr(expected, name)[:, column], err_msg=name)
        found, alike, so = (geometry(views, **drawn, **sizes) for views in (mixed, plain, all_so))
        for column, expected in enumerate((alike, alike, so, alike, alike)):  # the original, crops, patches
            np.testing.assert_array_equal(found.boxes[:, column], expected.boxes[:, column])
        assert found.bicubic == (False, False, True, False, False)
        assert so.bicubic == (False, True, True, True, True)
        assert not np.array_equal(alike.boxes[:, 2], so.boxes[:, 2])


def test_small_crops_are_further_crops_and_change_no_other_view():
    drawn = {"seed": 3, "epoch": 4, "indices": np.arange(30)}
    sizes = {"heights": np.full(30, 200), "widths": np.full(30, 300)}
    plain = Views(num_crops=2, num_patches=4, **MIXED)
    both = plain.model_copy(update={"num_small_crops": 3, "small_crop_size": 40, "small_crop_scale": (0.1, 0.2)})
    as_crops = Views(num_crops=5, crop_size=40, crop_scale=(0.1, 0.2), **MIXED)
    found, alike, further = (geometry(views, **drawn, **sizes) for views in (both, plain, as_crops))
    assert found.sizes == (*alike.sizes, 40, 40, 40)
    for name in ("boxes", "resized", "windows"):
        np.testing.assert_array_equal(getattr(found, name)[:, :4], getattr(alike, name))
        np.testing.assert_array_equal(getattr(found, name)[:, 4:], getattr(further, name)[:, 3:])
    found, alike, further = (colour(views, **drawn) for views in (both, plain, as_crops))
    for name, values in vars(found).items():
        np.testing.assert_array_equal(values[:, :3], getattr(alike, name))
        np.testing.assert_array_equal(values[:, 3:], getattr(further, name)[:, 2:])
    mirrored = flips(both, **drawn)
    assert mirrored.shape == (30, 7)
    np.testing.assert_array_equal(mirrored[:, :4], flips(plain, **drawn))
    own = [CropView()] * 4 + [CropView(scale=(0.5, 0.6), solarise_probability=1.0)]
    other = both.model_copy(update={"per_crop": tuple(own)})
    boxes = geometry(other, **drawn, **sizes).boxes
    np.testing.assert_array_equal(boxes[:, :6], geometry(both, **drawn, **sizes).boxes[:, :6])
    share = boxes[:, 6, 2] * boxes[:, 6, 3] / (200 * 300)
    assert ((share > 0.48) & (share < 0.62)).all()
    assert colour(other, **drawn).solarised.sum(axis=0).tolist() == [0, 0, 0, 0, 0, 30]


def test_byols_crops_are_blurred_and_solarised_as_often_as_they_should_be():
    views = Views(
        num_crops=2,
        num_patches=1,
        per_crop=(CropView(blur_probability=1.0), CropView(blur_probability=0.1, solarise_probability=0.2)),
    )
    found = colour(views, seed=0, epoch=0, indices=np.arange(1000))
    assert (found.sigma > 0).mean(axis=0) == pytest.approx([1.0, 0.1, 0.0], abs=0.03)
    assert found.solarised.mean(axis=0) == pytest.approx([0.0, 0.2, 0.0], abs=0.04)
    u = [uniforms(seed=0, epoch=0, indices=np.arange(1000), stream=Stream.CROP_COLOUR, count=10, lane=n) for n in range(2)]
    assert np.array_equal(found.solarised[:, :2], np.stack([u[0][:, 9] < 0.0, u[1][:, 9] < 0.2], axis=1))


def test_some_views_of_some_images_keep_their_colours():
    all_of_them = colour(FULL, seed=3, epoch=4, indices=np.arange(6))
    crops, second = all_of_them.of_views(slice(0, 2)), all_of_them.of_images(slice(1, 2))
    for name, values in vars(all_of_them).items():
        assert np.array_equal(getattr(crops, name), np.concatenate([each[:2] for each in values])), name
        assert np.array_equal(getattr(second, name), values[1:2]), name


@pytest.mark.parametrize(("num_patches", "count"), [(0, 3), (1, 4), (5, 4)])
def test_patches_of_an_image_are_flipped_together(num_patches, count):
    views = Views(num_crops=2, num_patches=num_patches, flip_probability=0.3)
    found = flips(views, seed=3, epoch=4, indices=np.arange(20))
    drawn = uniforms(seed=3, epoch=4, indices=np.arange(20), stream=Stream.FLIPS, count=count)
    assert np.array_equal(found, drawn < 0.3)


@pytest.mark.parametrize("num_patches", [3, 9])
def test_patches_are_these_functions_of_the_draws(num_patches):
    views = Views(num_crops=1, num_patches=num_patches)
    found = patch_positions(views, seed=3, epoch=4, indices=np.arange(30))
    offset = (views.patch_source_size - views.patch_size - views.patch_jitter) // 2
    for image in range(30):
        u = uniforms(seed=3, epoch=4, indices=np.array([image]), stream=Stream.PATCHES, count=27)[0]
        cells = [
            [
                cell // 3 * offset + int(u[2 * cell] * (views.patch_jitter + 1)),
                cell % 3 * offset + int(u[2 * cell + 1] * (views.patch_jitter + 1)),
            ]
            for cell in range(9)
        ]
        order = sorted(range(9), key=lambda cell: u[18 + cell]) if num_patches < 9 else range(9)
        assert found[image].tolist() == [cells[cell] for cell in order][:num_patches]
