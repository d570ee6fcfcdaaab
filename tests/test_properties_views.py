"""Laws of random numbers and of the geometry of views, on drawn settings; the same examples every time."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from obowlab.config import Views
from obowlab.randomness import Stream, epoch_order, random_words, uniforms
from obowlab.views.views import centre_geometry, colour, cutmix_boxes, flips, geometry, patch_positions

drawn = settings(derandomize=True, deadline=None, max_examples=30, database=None)
seeds, epochs = st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1)
streams = st.sampled_from(list(Stream))


@st.composite
def views(draw: st.DrawFn) -> Views:
    """Sizes that fit each other, and any number of crops and patches."""
    original = draw(st.integers(16, 64))
    source = draw(st.integers(40, 80))
    patch = draw(st.integers(8, source // 2))
    low = draw(st.floats(0.05, 0.9))
    return Views.model_validate(
        {
            "original_size": original,
            "original_resize": original + draw(st.integers(0, 16)),
            "num_crops": draw(st.integers(1, 3)),
            "crop_size": draw(st.integers(8, original)),
            "crop_scale": (low, draw(st.floats(low, 1.0))),
            "num_patches": draw(st.integers(0, 9)),
            "patch_source_size": source,
            "patch_size": patch,
            "patch_jitter": draw(st.integers(0, source - patch)),
            "cutmix_probability": draw(st.sampled_from([0.0, 0.5, 1.0])),
        }
    )


@drawn
@given(
    seed=seeds, epoch=epochs, stream=streams, count=st.integers(1, 9), lane=st.integers(0, 2**24 - 1), start=st.integers(0, 2**31)
)
def test_a_number_depends_on_its_own_image_alone(
    seed: int, epoch: int, stream: Stream, count: int, lane: int, start: int
) -> None:
    indices = np.arange(start, start + 5)
    key: dict[str, Any] = {"seed": seed, "epoch": epoch, "stream": stream, "lane": lane}
    found = uniforms(indices=indices, count=count, **key)
    assert found.shape == (5, count)
    assert ((found >= 0.0) & (found < 1.0)).all()
    assert np.array_equal(uniforms(indices=indices[[3, 1]], count=count, **key), found[[3, 1]])
    assert np.array_equal(uniforms(indices=indices, count=count + 3, **key)[:, :count], found), (
        "more numbers do not change the first"
    )
    assert np.array_equal(random_words(indices=indices, count=count, **key) * 2.0**-32, found)


@drawn
@given(seed=seeds, epoch=epochs, num_images=st.integers(1, 200))
def test_an_epoch_visits_every_image_once(seed: int, epoch: int, num_images: int) -> None:
    assert sorted(epoch_order(num_images, seed=seed, epoch=epoch).tolist()) == list(range(num_images))


@drawn
@given(settings_=views(), seed=seeds, height=st.integers(9, 90), width=st.integers(9, 90))
def test_every_view_lies_in_its_image(settings_: Views, seed: int, height: int, width: int) -> None:
    sides = {"heights": np.full(4, height), "widths": np.full(4, width)}
    plan = geometry(settings_, seed=seed, epoch=2, indices=np.arange(4), **sides)
    top, left, box_height, box_width = np.moveaxis(plan.boxes, -1, 0)
    assert (box_height > 0).all()
    assert (box_width > 0).all()
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + box_height <= height).all()
    assert (left + box_width <= width).all()
    num_views = 1 + settings_.num_crops + (settings_.num_patches > 0)
    assert plan.boxes.shape == (4, num_views, 4)
    assert len(plan.sizes) == num_views
    for view, side in enumerate(plan.sizes):
        assert (plan.windows[:, view] >= 0).all()
        assert (plan.windows[:, view] + side <= plan.resized[:, view]).all()
    centre = centre_geometry(settings_, **sides)
    assert np.array_equal(plan.boxes[:, :1], centre.boxes)
    assert plan.resized[:, 0].min() == settings_.original_resize


@drawn
@given(settings_=views(), seed=seeds, epoch=epochs)
def test_patches_and_pasted_rectangles_lie_in_their_view(settings_: Views, seed: int, epoch: int) -> None:
    indices = np.arange(6)
    if settings_.num_patches:
        corners = patch_positions(settings_, seed=seed, epoch=epoch, indices=indices)
        assert corners.shape == (6, settings_.num_patches, 2)
        assert corners.min() >= 0
        assert corners.max() + settings_.patch_size <= settings_.patch_source_size
    boxes = cutmix_boxes(settings_, seed=seed, epoch=epoch, indices=indices)
    assert boxes.shape == (6, settings_.num_crops, 4)
    assert (boxes[..., :2] <= boxes[..., 2:]).all()
    assert boxes.min() >= 0
    assert boxes.max() <= settings_.cut_size
    if settings_.cutmix_probability == 0.0:
        assert not boxes.any()


@drawn
@given(settings_=views(), seed=seeds, epoch=epochs)
def test_an_image_has_its_flips_and_colours_in_any_batch(settings_: Views, seed: int, epoch: int) -> None:
    key: dict[str, Any] = {"seed": seed, "epoch": epoch}
    indices = np.arange(10, 18)
    assert np.array_equal(flips(settings_, indices=indices[2:5], **key), flips(settings_, indices=indices, **key)[2:5])
    part, whole = colour(settings_, indices=indices[2:5], **key), colour(settings_, indices=indices, **key)
    for name, values in vars(part).items():
        assert np.array_equal(values, getattr(whole.of_images(slice(2, 5)), name)), name
    crops = whole.of_views(slice(0, settings_.num_crops))
    assert np.array_equal(crops.hue, whole.hue[:, : settings_.num_crops].reshape(-1))
    assert (np.sort(whole.orders, axis=-1) == np.arange(4)).all()
