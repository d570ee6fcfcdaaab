"""Batched colours against torchvision on PIL images, one image at a time."""

import dataclasses

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as F
from PIL import Image, ImageFilter, ImageOps

from obowlab.config import CropView, Views
from obowlab.views.draws import box_weights, draw, recolourings
from obowlab.views.loaders import PixelBatch
from obowlab.views.packed import pack
from obowlab.views.photometric import blur, coloured, jitter, luma, normalise, render, solarise
from obowlab.views.views import MEAN, STD, Colour, colour, flips, patch_positions

CPU = torch.device("cpu")
SMALL = Views(
    original_size=40,
    original_resize=44,
    num_crops=2,
    crop_size=32,
    num_patches=5,
    patch_size=16,
    patch_source_size=48,
    patch_jitter=4,
)


def pictures(count, size, *, seed=0):
    """Smooth colour images with some grain, edges and flat parts, uint8 [count, size, size, 3]."""
    rng = np.random.default_rng(seed)
    images = []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
        image = np.asarray(coarse).astype(int) + rng.integers(-8, 9, (size, size, 3))
        image[: size // 5, : size // 3] = rng.integers(0, 256, 3)
        images.append(image.clip(0, 255).astype(np.uint8))
    return np.stack(images)


def neutral(count, **changes):
    ones, zeros = np.ones(count), np.zeros(count)
    values = {
        "brightness": ones,
        "contrast": ones,
        "saturation": ones,
        "hue": zeros,
        "grayscale": zeros > 0,
        "sigma": zeros,
        "solarised": zeros > 0,
    }
    return Colour(orders=np.tile(np.arange(4), (count, 1)), **(values | changes))


def to_planes(images):
    return torch.from_numpy(images).permute(3, 0, 1, 2).to(torch.float32).contiguous()


def from_planes(planes):
    return planes.permute(1, 2, 3, 0).numpy()


def to_bytes(views):
    """Undo the normalisation: [N, 3, H, W] -> levels [N, H, W, 3]."""
    return views.permute(0, 2, 3, 1).numpy() * (255.0 * np.array(STD)) + 255.0 * np.array(MEAN)


def batch_of(count, views, *, seed=0, indices=None):
    crops = torch.from_numpy(pictures(count * views.num_crops, views.crop_size, seed=seed + 1)).unflatten(
        0, (count, views.num_crops)
    )
    indices = np.arange(count) + 100 if indices is None else indices
    return PixelBatch(
        epoch=3,
        step=0,
        indices=indices,
        numbers=pack((draw(views, seed=seed, epoch=3, indices=indices), torch.zeros(count, dtype=torch.int64))),
        original=torch.from_numpy(pictures(count, views.original_size, seed=seed)),
        crops=crops,
        patch_source=torch.from_numpy(pictures(count, views.patch_source_size, seed=seed + 2)),
    )


def render_with(batch, views, *, seed, device=CPU, **options):
    draws = pack(draw(views, seed=seed, epoch=batch.epoch, indices=batch.indices, **options)).on(device)
    return render(batch, draws, device=device)


@pytest.mark.parametrize(
    ("name", "reference", "low", "high", "mean_bound", "max_bound"),
    [
        ("brightness", F.adjust_brightness, 0.6, 1.4, 0.0, 0),
        ("contrast", F.adjust_contrast, 0.6, 1.4, 0.0, 0),
        ("saturation", F.adjust_saturation, 0.6, 1.4, 0.0, 0),
        ("brightness", F.adjust_brightness, 0.0, 2.0, 0.0, 0),
        ("hue", F.adjust_hue, -0.1, 0.1, 0.02, 8),
        ("hue", F.adjust_hue, -0.5, 0.5, 0.02, 8),
    ],
)
def test_jitter_equals_torchvision_on_pil(name, reference, low, high, mean_bound, max_bound):
    images = pictures(24, 48)
    strength = np.random.default_rng(1).uniform(low, high, len(images))
    expected = np.stack(
        [np.asarray(reference(Image.fromarray(image), value)) for image, value in zip(images, strength, strict=True)]
    )
    planes = to_planes(images)
    (piece,) = recolourings(neutral(len(images), **{name: strength}), np.zeros(len(images), dtype=bool))
    jitter(planes, piece)
    difference = np.abs(from_planes(planes) - expected.astype(float))
    assert difference.mean() <= mean_bound
    assert difference.max() <= max_bound


def test_grayscale_equals_pil():
    images = pictures(8, 48)
    expected = np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in images])
    assert np.array_equal(luma(to_planes(images)).numpy(), expected)


@pytest.mark.parametrize(("low", "high"), [(0.1, 2.0), (2.0, 6.0)])
def test_blur_is_pils_but_for_its_rounding(low, high):
    images = pictures(24, 40)
    sigma = np.random.default_rng(1).uniform(low, high, len(images))
    expected = np.stack(
        [
            np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius=float(value))))
            for image, value in zip(images, sigma, strict=True)
        ]
    )
    difference = np.abs(from_planes(blur(to_planes(images), box_weights(sigma))) - expected)
    assert difference.mean() < 0.45  # PIL rounds six times
    assert difference.max() < 3.5


def test_solarise_inverts_what_pil_inverts():
    images = pictures(8, 48)
    for threshold, level in ((0.5, 128), (0.25, 64), (1.0, 255), (0.0, 0)):
        expected = np.stack([np.asarray(ImageOps.solarize(Image.fromarray(image), threshold=level)) for image in images])
        assert np.array_equal(from_planes(solarise(to_planes(images), threshold=255.0 * threshold)), expected), threshold


def test_small_crops_are_coloured_with_their_own_numbers():
    views = SMALL.model_copy(update={"num_small_crops": 2, "small_crop_size": 20})
    plain = batch_of(3, SMALL)
    small = torch.from_numpy(pictures(6, 20, seed=9)).unflatten(0, (3, 2))
    draws = draw(views, seed=7, epoch=3, indices=plain.indices)
    found = render(dataclasses.replace(plain, small_crops=small), draws, device=torch.device("cpu")).student
    others = render(plain, draw(SMALL, seed=7, epoch=3, indices=plain.indices), device=torch.device("cpu")).student
    assert all(torch.equal(found[kind], others[kind]) for kind in others)
    assert found.keys() - others.keys() == {"small_crops"}
    first = SMALL.num_crops + 1
    for row, index in enumerate(plain.indices):
        one = {"seed": 7, "epoch": 3, "indices": np.array([index])}
        params, mirrored = colour(views, **one), flips(views, **one)
        for view in range(2):
            pieces = recolourings(params.of_views(slice(first + view, first + view + 1)), mirrored[:, 1 + first + view])
            expected = coloured(small[row, view][None], pieces)
            torch.testing.assert_close(found["small_crops"][2 * row + view], expected[0], rtol=0.0, atol=1e-5)


def test_a_crop_is_solarised_after_its_blur_whatever_the_others_are():
    plain = {"flip_probability": 0.0, "jitter_probability": 0.0, "grayscale_probability": 0.0, "blur_probability": 1.0}
    blurred = SMALL.model_copy(update=plain | {"num_patches": 1})
    own = (CropView(), *[CropView(solarise_probability=1.0)] * (SMALL.num_crops - 1))
    both = blurred.model_copy(update={"per_crop": own, "solarise_threshold": 0.3})
    batch = batch_of(5, blurred)
    draws = [draw(each, seed=7, epoch=3, indices=batch.indices) for each in (blurred, both)]
    expected, found = (render(batch, each, device=torch.device("cpu")).student for each in draws)
    assert torch.equal(found["patches"], expected["patches"])
    levels, solarised = (to_bytes(each["crops"]).reshape(5, SMALL.num_crops, -1) for each in (expected, found))
    np.testing.assert_array_equal(solarised[:, 0], levels[:, 0])
    inverted = np.where(levels < 0.3 * 255.0, levels, 255.0 - levels)
    near = np.abs(levels - 0.3 * 255.0) < 1e-2  # to_bytes rounds
    np.testing.assert_allclose(solarised[:, 1:][~near[:, 1:]], inverted[:, 1:][~near[:, 1:]], atol=1e-3)


def test_a_batch_is_rendered_as_pil_renders_its_images_one_by_one():
    count = 24
    batch = batch_of(count, SMALL)
    mirrored = flips(SMALL, seed=7, epoch=3, indices=batch.indices)
    params = colour(SMALL, seed=7, epoch=3, indices=batch.indices)
    adjust = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)

    def reference(pixels, row, view):
        image = Image.fromarray(pixels.numpy())
        strength = [values[row, view] for values in (params.brightness, params.contrast, params.saturation, params.hue)]
        if strength != [1.0, 1.0, 1.0, 0.0]:
            for operation in params.orders[row, view]:
                image = adjust[operation](image, strength[operation])
        if params.grayscale[row, view]:
            image = F.to_grayscale(image, num_output_channels=3)
        if params.sigma[row, view] > 0:
            image = image.filter(ImageFilter.GaussianBlur(radius=float(params.sigma[row, view])))
        return np.asarray(F.hflip(image) if mirrored[row, 1 + view] else image).astype(float)

    rendered = render_with(batch, SMALL, seed=7)
    crops = np.stack([reference(batch.crops[row, view], row, view) for row in range(count) for view in range(2)])
    assert np.abs(to_bytes(rendered.student["crops"]) - crops).mean() < 0.3
    assert np.abs(to_bytes(rendered.student["crops"]) - crops).max() < 10
    corners = patch_positions(SMALL, seed=7, epoch=3, indices=batch.indices)
    sources = [reference(batch.patch_source[row], row, 2) for row in range(count)]
    patches = np.stack([sources[row][top : top + 16, left : left + 16] for row in range(count) for top, left in corners[row]])
    assert np.abs(to_bytes(rendered.student["patches"]) - patches).mean() < 0.05
    originals = np.stack([image[:, ::-1] if mirrored[row, 0] else image for row, image in enumerate(batch.original.numpy())])
    assert np.abs(to_bytes(rendered.original) - originals).max() < 1e-3


def test_every_image_has_its_own_parameters():
    one = pictures(1, 32)
    images = torch.from_numpy(np.repeat(one, 16, axis=0))
    params = colour(Views(), seed=0, epoch=0, indices=np.arange(16)).of_views(slice(0, 1))
    views = coloured(images, recolourings(params, np.zeros(16, dtype=bool)))
    distances = torch.cdist(views.flatten(1), views.flatten(1))
    plain = (params.brightness == 1.0) & ~params.grayscale & (params.sigma == 0)
    assert plain.sum() < 3
    assert (distances + 100 * torch.eye(16) > 1.0).float().mean() > 0.98


def test_a_view_does_not_depend_on_the_batch_it_is_rendered_in():
    batch = batch_of(8, SMALL)
    together = render_with(batch, SMALL, seed=5)
    in_chunks = render_with(batch, SMALL, seed=5, piece_pixels=2000)  # nor on how a batch is split
    for row in range(8):
        part = PixelBatch(
            epoch=3,
            step=0,
            indices=batch.indices[row : row + 1],
            numbers=batch.numbers,
            original=batch.original[row : row + 1],
            crops=batch.crops[row : row + 1],
            patch_source=batch.patch_source[row : row + 1],
        )
        alone = render_with(part, SMALL, seed=5)
        for whole in (together, in_chunks):
            torch.testing.assert_close(alone.original[0], whole.original[row], rtol=0, atol=0)
            torch.testing.assert_close(alone.student["crops"], whole.student["crops"][2 * row : 2 * row + 2], rtol=0, atol=1e-4)
            torch.testing.assert_close(
                alone.student["patches"], whole.student["patches"][5 * row : 5 * row + 5], rtol=0, atol=1e-4
            )
    other = render_with(batch, SMALL, seed=6)
    assert (other.student["crops"] - together.student["crops"]).abs().mean() > 0.05


def test_shapes_memory_format_and_untouched_input():
    batch = batch_of(6, SMALL)
    before = [batch.original.clone(), batch.crops.clone(), batch.patch_source.clone()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        views = render_with(batch, SMALL, seed=0)
    assert views.original.shape == (6, 3, 40, 40)
    assert views.student["crops"].shape == (12, 3, 32, 32)
    assert views.student["patches"].shape == (30, 3, 16, 16)
    for tensor in (views.original, views.student["crops"], views.student["patches"]):
        assert tensor.dtype == torch.float32
        assert tensor.is_contiguous(memory_format=torch.channels_last)
    assert list(views.student) == ["crops", "patches"]
    for kept, now in zip(before, (batch.original, batch.crops, batch.patch_source), strict=True):
        assert torch.equal(kept, now)
    torch.testing.assert_close(views.student["crops"], render_with(batch, SMALL, seed=0).student["crops"])


def test_without_probabilities_a_view_is_only_normalised():
    still = Views(
        **SMALL.model_dump()
        | {"flip_probability": 0.0, "jitter_probability": 0.0, "grayscale_probability": 0.0, "blur_probability": 0.0}
    )
    batch = batch_of(4, still)
    views = render_with(batch, still, seed=0)
    torch.testing.assert_close(views.student["crops"], normalise(batch.crops.flatten(0, 1), device=CPU), rtol=0, atol=1e-6)
    flipped = render_with(batch, still.model_copy(update={"flip_probability": 1.0}), seed=0)
    torch.testing.assert_close(flipped.student["crops"], views.student["crops"].flip(-1), rtol=0, atol=0)
    torch.testing.assert_close(flipped.original, views.original.flip(-1), rtol=0, atol=0)


def test_normalise_equals_torchvision():
    images = pictures(3, 20)
    expected = torch.stack([F.normalize(F.to_tensor(Image.fromarray(image)), MEAN, STD) for image in images])
    torch.testing.assert_close(normalise(torch.from_numpy(images), device=CPU), expected, rtol=0, atol=1e-5)


def test_no_student_views_without_crops_or_patches():
    views = Views(
        original_size=40, original_resize=44, num_crops=0, num_patches=5, patch_size=16, patch_source_size=48, patch_jitter=4
    )
    batch = batch_of(2, SMALL)
    only = PixelBatch(
        epoch=0,
        step=0,
        indices=batch.indices,
        numbers=batch.numbers,
        original=batch.original,
        crops=None,
        patch_source=batch.patch_source,
    )
    assert list(render_with(only, views, seed=0).student) == ["patches"]
