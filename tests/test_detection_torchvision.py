"""The detector's parts beside torchvision's, where both do the same."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import MultiScaleRoIAlign, box_iou

from obowlab.methods.detection.boxes import HEAD_WEIGHTS, RPN_WEIGHTS, clip, decode, encode
from obowlab.methods.detection.matching import match, sample
from obowlab.methods.detection.rpn import BATCH, Level, Predicted, Proposing, RegionProposals
from obowlab.methods.detection.two_stage import MAX_DETECTIONS, MAX_OVERLAP, MIN_SCORE, _surest

SIZE = (96, 112)


def random_boxes(count: int, *, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, generator=generator) * 60
    return torch.cat((corners, corners + 4 + torch.rand(count, 2, generator=generator) * 50), dim=1)


def theirs(*, before: int, after: int) -> RegionProposalNetwork:
    return RegionProposalNetwork(
        AnchorGenerator(sizes=((32,),)),
        RPNHead(8, 3),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=BATCH,
        positive_fraction=0.5,
        pre_nms_top_n={"training": before, "testing": before},
        post_nms_top_n={"training": after, "testing": after},
        nms_thresh=0.7,
    )


@pytest.mark.parametrize("weights", [RPN_WEIGHTS, HEAD_WEIGHTS])
def test_boxes_move_as_theirs(weights: tuple[float, float, float, float]) -> None:
    boxes, towards = random_boxes(30, seed=0), random_boxes(30, seed=1)
    coder = BoxCoder(weights)
    deltas = encode(boxes, towards=towards, weights=weights)
    torch.testing.assert_close(deltas, coder.encode_single(towards, boxes))
    grown = deltas * 3
    torch.testing.assert_close(decode(grown, boxes=boxes, weights=weights), coder.decode_single(grown, boxes))


@pytest.mark.parametrize(("above", "below", "best_too"), [(0.7, 0.3, True), (0.5, 0.5, False)])
def test_boxes_are_matched_as_theirs(above: float, below: float, best_too: bool) -> None:
    overlaps = box_iou(random_boxes(5, seed=2), random_boxes(300, seed=3))
    found = match(overlaps, below=below, above=above, best_too=best_too)
    of_theirs = Matcher(above, below, allow_low_quality_matches=best_too)(overlaps)
    assert found.labels.tolist() == [1 if each >= 0 else 0 if each == -1 else -1 for each in of_theirs.tolist()]
    positive = found.labels == 1
    assert positive.any()
    assert torch.equal(found.objects[positive], of_theirs[positive])


def test_proposals_are_thinned_out_as_theirs() -> None:
    rpn = RegionProposals(8, levels=(Level(8, (32.0,)), Level(16, (64.0,))))
    maps = [torch.randn(2, 8, 12, 14, generator=torch.Generator().manual_seed(4)), torch.randn(2, 8, 6, 7)]
    predicted = rpn(maps)
    deltas = predicted.deltas.detach() * 20  # so that boxes move
    moved = Predicted(predicted.anchors, predicted.scores.detach(), deltas, predicted.of_levels)
    boxes = torch.stack([decode(each, boxes=predicted.anchors, weights=RPN_WEIGHTS) for each in deltas])
    whole = theirs(before=150, after=60)
    expected, _ = whole.filter_proposals(boxes, moved.scores, [SIZE, (80, 90)], list(predicted.of_levels))
    found = rpn.propose(moved, sizes=[SIZE, (80, 90)], how=Proposing(before=150, after=60))
    for ours, other in zip(found, expected, strict=True):
        assert len(ours) == 60
        torch.testing.assert_close(ours, other)


def test_the_loss_of_objectness_is_theirs_where_256_anchors_are_sampled() -> None:
    rpn = RegionProposals(8, levels=(Level(8, (16.0, 32.0)),))
    predicted = rpn([torch.randn(2, 8, 12, 14, generator=torch.Generator().manual_seed(5))])
    objects = [random_boxes(4, seed=6), random_boxes(2, seed=7)]
    keys = [torch.rand(len(predicted.anchors), generator=torch.Generator().manual_seed(8 + image)) for image in range(2)]
    whole = theirs(before=100, after=100)
    labels, matched = whole.assign_targets_to_anchors([predicted.anchors] * 2, [{"boxes": each} for each in objects])
    positive, negative = [], []
    for own, key in zip(labels, keys, strict=True):
        chosen = sample(torch.where(own < 0, -1, own).to(torch.int8), count=BATCH, positives=0.5, keys=key)
        assert len(chosen[0]) + len(chosen[1]) == BATCH
        for kind, rows in zip((positive, negative), chosen, strict=True):
            kind.append(torch.zeros(len(own), dtype=torch.uint8).index_fill(0, rows, 1))
    whole.fg_bg_sampler = lambda _: (positive, negative)
    targets = [encode(predicted.anchors, towards=each, weights=RPN_WEIGHTS) for each in matched]
    scores, deltas = predicted.scores.reshape(-1, 1), predicted.deltas.reshape(-1, 4)
    expected, _ = whole.compute_loss(scores, deltas, labels, targets)
    torch.testing.assert_close(rpn.losses(predicted, objects=objects, keys=keys)["rpn_objectness"], expected)


def test_the_loss_of_classes_is_theirs() -> None:
    generator = torch.Generator().manual_seed(9)
    logits, truth = torch.randn(40, 6, generator=generator), torch.randint(0, 6, (40,), generator=generator)
    background_first, labels = logits.roll(1, dims=1), (truth + 1) % 6
    expected, _ = fastrcnn_loss(background_first, torch.zeros(40, 24), [labels], [torch.zeros(40, 4)])
    torch.testing.assert_close(F.cross_entropy(logits, truth), expected)


def test_the_best_boxes_are_theirs() -> None:
    generator = torch.Generator().manual_seed(10)
    regions, logits = random_boxes(120, seed=11), 3 * torch.randn(120, 6, generator=generator)
    moves = torch.randn(120, 5, 4, generator=generator)
    head = RoIHeads(
        MultiScaleRoIAlign(["0"], 7, 2), None, None, 0.5, 0.5, 512, 0.25, HEAD_WEIGHTS, MIN_SCORE, MAX_OVERLAP, MAX_DETECTIONS
    )
    of_theirs = torch.cat((torch.zeros(120, 1, 4), moves), dim=1).reshape(120, -1)
    (boxes,), (scores,), (labels,) = head.postprocess_detections(logits.roll(1, dims=1), of_theirs, [regions], [SIZE])
    decoded = clip(decode(moves, boxes=regions, weights=HEAD_WEIGHTS), size=SIZE)
    found = _surest(decoded, probabilities=logits.softmax(dim=1)[:, :-1])
    assert len(found.boxes) == MAX_DETECTIONS
    torch.testing.assert_close(found.boxes, boxes)
    torch.testing.assert_close(found.scores, scores)
    assert torch.equal(found.labels, labels - 1)
