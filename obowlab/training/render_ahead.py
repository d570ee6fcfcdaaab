"""Batches of a training, each rendered on a GPU while the step before it is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from obowlab.methods import Batch

T = TypeVar("T")


def rendered(items: Iterator[T], render: Callable[[T], Batch], *, device: torch.device) -> Iterator[tuple[T, Batch]]:
    """Yield every item with its rendered batch.

    On a GPU an item is rendered on a stream of its own as soon as the step of the one before is queued. The host queues one
    after the other; the GPU works on both at once.

    Args:
        items: what a loader gives.
        render: queues the work that makes a batch of one.
        device: where.
    """
    if device.type != "cuda":
        for item in items:
            yield item, render(item)
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    for item in items:
        with torch.cuda.stream(stream):
            batch = render(item)
        training = torch.cuda.current_stream(device)
        training.wait_stream(stream)
        for tensor in _tensors(batch):
            tensor.record_stream(training)  # its memory is not used anew before training is done with it
        yield item, batch


def _tensors(batch: Batch) -> list[Tensor]:
    several = (*batch.views.values(), *batch.cutmix_lambda.values())
    several += tuple(tensor for each in batch.objects for tensor in (each.boxes, each.labels))
    return [batch.original, batch.uniforms, *several, *([] if batch.labels is None else [batch.labels])]
