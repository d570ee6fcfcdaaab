"""RotNet: which way is up, against a version with loops."""

from __future__ import annotations

import math

import pytest
import torch

from obowlab.config import Backbone, Rotnet, Views
from obowlab.errors import UserError
from obowlab.methods import Batch, OneProcess, RotNet
from obowlab.methods.rotnet import rotations


def turn(image: torch.Tensor) -> torch.Tensor:
    """Turn an image [C, s, s] by a quarter, anticlockwise: its last column becomes the first row."""
    side = image.shape[-1]
    out = torch.empty_like(image)
    for row in range(side):
        for column in range(side):
            out[:, row, column] = image[:, column, side - 1 - row]
    return out


def test_every_image_is_followed_by_its_three_turns() -> None:
    images = torch.randn(3, 2, 5, 5, generator=torch.Generator().manual_seed(0))
    found = rotations(images)
    for number, image in enumerate(images):
        for quarters in range(4):
            assert torch.equal(found[number * 4 + quarters], image), (number, quarters)
            image = turn(image)
        assert torch.equal(image, images[number])
    striped = images.contiguous(memory_format=torch.channels_last)
    assert rotations(striped).is_contiguous(memory_format=torch.channels_last)


def test_loss_is_the_cross_entropy_of_the_rotation_per_kind() -> None:
    generator = torch.Generator().manual_seed(1)
    backbone = Backbone(stem="small", width=4)
    method = RotNet(Rotnet(), backbone=backbone, total_steps=1, seed=0, num_classes=3, comm=OneProcess()).eval()
    original = torch.zeros(2, 3, 24, 24)
    views = {
        "crops": torch.randn(2, 3, 16, 16, generator=generator),
        "patches": torch.randn(6, 3, 8, 8, generator=generator),
    }
    output = method(Batch(original=original, views=views, uniforms=torch.zeros(2, 0), step=0, labels=torch.tensor([2, 0])))
    expected: dict[str, float] = {}
    hits, seen = 0, 0
    upright = []
    for kind, images in views.items():
        terms = []
        for image in images:
            for quarters in range(4):
                feature = method.student(image[None])
                if quarters == 0:
                    upright.append(feature)
                logits = method.head(feature)[0].tolist()
                terms.append(math.log(sum(math.exp(value) for value in logits)) - logits[quarters])
                hits += logits.index(max(logits)) == quarters
                seen += 1
                image = turn(image)
        expected[kind] = sum(terms) / len(terms)
    assert float(output.metrics["loss_crops"]) == pytest.approx(expected["crops"], rel=1e-5)
    assert float(output.metrics["loss_patches"]) == pytest.approx(expected["patches"], rel=1e-5)
    assert float(output.metrics["loss"]) == pytest.approx(sum(expected.values()), rel=1e-5)
    assert float(output.metrics["rotation_accuracy"]) == pytest.approx(100 * hits / seen)
    assert method.monitor is not None
    order = [0, 2, 3, 4, 1, 5, 6, 7]  # the crop and the patches of image 0, then those of image 1
    logits = method.monitor(torch.cat(upright)[order])
    labels = torch.tensor([2, 2, 2, 2, 0, 0, 0, 0])
    assert float(output.metrics["monitor_loss"]) == pytest.approx(
        torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5
    )


def test_mixed_crops_are_refused() -> None:
    views = Views(cutmix_probability=0.5)
    with pytest.raises(
        UserError, match=r"^RotNet has no targets that cutmix could mix: set views\.cutmix_probability to 0\.0\.$"
    ):
        RotNet.check_views(Rotnet(), backbone=Backbone(), views=views)
    RotNet.check_views(Rotnet(), backbone=Backbone(), views=Views())
