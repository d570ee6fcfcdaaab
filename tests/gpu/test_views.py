"""Views rendered on a GPU against those rendered on the CPU.

Flips and normalisation are the same to the bit. Colours are whole numbers between operations: where two devices round a product
differently, a pixel is one level off, and no more. The blur is a matrix product whose sums have another order; its pixels are not
rounded.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from obowlab.config import Views
from obowlab.views.draws import box_weights
from obowlab.views.photometric import RenderedViews, blur
from obowlab.views.views import STD
from tests.gpu.precision import precision
from tests.test_photometric import batch_of, render_with

pytestmark = pytest.mark.gpu
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LEVEL = 1.0 / (255.0 * min(STD))
"""One 8-bit level after normalisation, at most."""

VIEWS = Views(
    num_crops=2, num_patches=5, original_size=96, original_resize=104, crop_size=64, patch_size=32, patch_source_size=104
)
NUM_IMAGES = 16


def both(views: Views, *, number: str = "float32") -> tuple[RenderedViews, RenderedViews]:
    batch = batch_of(NUM_IMAGES, views)
    expected = render_with(batch, views, seed=5)
    with precision(number, device=CUDA):
        return render_with(batch, views, seed=5, device=CUDA, piece_pixels=None), expected


def levels_apart(found: Tensor, expected: Tensor) -> Tensor:
    scale = 255.0 * torch.tensor(STD).view(3, 1, 1)
    return (found.cpu() - expected).abs() * scale


def test_flips_and_normalisation_are_equal_to_the_bit() -> None:
    found, expected = both(
        VIEWS.model_copy(update={"jitter_probability": 0.0, "grayscale_probability": 0.0, "blur_probability": 0.0})
    )
    assert torch.equal(found.original.cpu(), expected.original)
    for kind, images in expected.student.items():
        assert torch.equal(found.student[kind].cpu(), images), kind


def test_colours_without_blur_are_equal_but_for_rare_single_levels() -> None:
    found, expected = both(VIEWS.model_copy(update={"blur_probability": 0.0, "grayscale_probability": 0.3}))
    for kind, images in expected.student.items():
        apart = levels_apart(found.student[kind], images)
        share = float((apart > 1e-3).float().mean())
        print(f"{kind}: largest difference {float(apart.max()):.4f} levels, {100 * share:.4f} % of the numbers differ")
        assert float(apart.max()) < 1.001
        # A contrast whose mean grey is a tie moves a whole image by at most one level: no more than one image in ten.
        assert share < 0.1


@pytest.mark.parametrize("number", ["float32", "tf32", "bfloat16"])
def test_all_operations_are_within_one_level(number: str) -> None:
    """Whatever precision the encoders compute in, the blur's products are full float32."""
    found, expected = both(VIEWS.model_copy(update={"cutmix_probability": 0.5}), number=number)
    assert torch.equal(found.original.cpu(), expected.original)
    for kind, images in expected.student.items():
        apart = levels_apart(found.student[kind], images)
        print(f"{kind}: largest difference {float(apart.max()):.4f} levels, mean {float(apart.mean()):.6f}")
        assert float(apart.max()) < 1.001
        assert float(apart.mean()) < 1e-2
    for kind, share in expected.cutmix_lambda.items():
        assert torch.equal(found.cutmix_lambda[kind].cpu(), share)


@pytest.mark.parametrize("number", ["float32", "tf32"])
def test_the_blur_is_a_float32_product(number: str) -> None:
    planes = torch.randint(256, (3, 8, 64, 64), generator=torch.Generator().manual_seed(0)).to(torch.float32)
    box = box_weights(np.linspace(0.1, 2.0, 8))
    expected = blur(planes, box)
    with precision(number, device=CUDA):
        found = blur(planes.to(CUDA), box.to(CUDA))
    # 24 bits: 255 x 2^-24 x a few sums; TF32's 11 bits would be off by 0.1.
    assert float((found.cpu() - expected).abs().max()) < 1e-2
