"""MoCo v2: tell the key of the same image from the keys of earlier ones (docs/method.md, 10.3).

He et al., "Momentum contrast for unsupervised visual representation learning", CVPR 2020; Chen et al., "Improved baselines with
momentum contrastive learning", 2020.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from obowlab.config import Moco
from obowlab.methods import bow
from obowlab.methods.base import Batch, SelfSupervised, StepOutput
from obowlab.methods.split_batchnorm import split_batchnorm
from obowlab.methods.teacher import follow_student
from obowlab.precision import full_precision


class Projection(nn.Module):
    """The MLP of MoCo v2, features -> features -> projection, whose output has length 1."""

    def __init__(self, *, num_features: int, size: int):
        super().__init__()
        self.fc1 = nn.Linear(num_features, num_features)
        self.fc2 = nn.Linear(num_features, size)

    def forward(self, features_ND: Tensor) -> Tensor:
        """Return unit vectors, [N, size], in float32 at least."""
        hidden = F.relu(self.fc1(features_ND), inplace=True)
        return F.normalize(bow.at_least_float32(self.fc2(hidden)), dim=1)


class MoCo(SelfSupervised[Moco]):
    """A student encodes queries, a slowly following teacher keys; a queue holds the keys of earlier batches.

    The last crop of an image is its key, every other view a query of its own. Batch-norm sees the global batch in groups, and
    the keys are shuffled over them, so that no group tells which query a key belongs to.

    Attributes:
        num_uniforms: random numbers a step needs per image: one, which decides the key's place in the shuffled batch.
    """

    num_uniforms = 1
    queue: Tensor
    pointer: Tensor
    inserted_at: Tensor

    def build(self, method: Moco) -> None:
        """Make the teacher, both projections and a queue of random unit vectors; batch norms work in groups."""
        num_groups = method.batchnorm_splits // self.comm.world_size
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        for encoder in (self.student, self.teacher):
            split_batchnorm(encoder, num_groups=num_groups, comm=self.comm)
        features = self.student.num_features
        self.projection = Projection(num_features=features, size=method.projection_size)
        self.teacher_projection = copy.deepcopy(self.projection).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(method.queue_size, method.projection_size), dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))
        self.register_buffer("inserted_at", torch.zeros(method.queue_size, dtype=torch.int64))

    def forward(self, batch: Batch) -> StepOutput:
        """Do one training step up to its loss; teacher and queue move on.

        The original view plays no part. The online classifier sees the teacher's features of the keys.
        """
        num_images = len(batch.original)
        queries, key_images = split_views(batch.views, num_images=num_images)
        query_NC = {kind: self.forward_student(images) for kind, images in queries.items()}
        follow_student(
            [(self.teacher, self.student), (self.teacher_projection, self.projection)], momentum=self.method.teacher_momentum
        )
        features_ND, keys_NC = self.forward_teacher(key_images, uniforms_B=batch.uniforms[:, 0])  # of the global batch
        mine = slice(self.comm.rank * num_images, (self.comm.rank + 1) * num_images)
        queue_KC = self.queue.clone()  # the backward pass needs the keys that new ones are about to replace
        logits = {
            kind: contrast_logits(each, repeat_keys(keys_NC[mine], each), queue_KC, temperature=self.method.temperature)
            for kind, each in query_NC.items()
        }
        losses = {kind: F.cross_entropy(each, each.new_zeros(len(each), dtype=torch.int64)) for kind, each in logits.items()}
        hits_N = torch.cat([each.detach().argmax(dim=1) == 0 for each in logits.values()])
        metrics = {"contrast_accuracy": 100.0 * hits_N.float().mean()}
        if batch.wants_metrics:
            metrics["queue_age"] = batch.step - self.inserted_at.to(self.queue.dtype).mean()
            metrics["teacher_momentum"] = torch.full((), self.method.teacher_momentum, device=batch.original.device)
        self.update_queue(keys_NC, step=batch.step)
        return self._output(losses, metrics, features=features_ND[mine], labels=batch.labels)

    def forward_student(self, images: Tensor) -> Tensor:
        """Return the queries of views, [N, C]."""
        return cast(Tensor, self.projection(self.student(images)))

    @torch.no_grad()
    def forward_teacher(self, images: Tensor, *, uniforms_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return the teacher's features and keys of the global batch, in its order, [N, D] and [N, C].

        The images are encoded in the order of their random numbers, each process its part of it.
        """
        order = self.comm.all_gather(uniforms_B.to(images.device)).argsort(stable=True)
        mine = slice(self.comm.rank * len(images), (self.comm.rank + 1) * len(images))
        shuffled = self.comm.all_gather(images)[order[mine]]
        if images.is_contiguous(memory_format=torch.channels_last):
            shuffled = shuffled.contiguous(memory_format=torch.channels_last)
        encoded_ND = self.comm.all_gather(self.teacher(shuffled))
        features_ND = torch.empty_like(encoded_ND)
        features_ND[order] = encoded_ND
        return features_ND, cast(Tensor, self.teacher_projection(features_ND))

    @torch.no_grad()
    def update_queue(self, keys_NC: Tensor, *, step: int) -> None:
        """Put the keys of the global batch into the queue, in place of the oldest."""
        slots = bow.queue_slots(self.pointer, num_vectors=len(keys_NC), num_words=len(self.queue))
        self.queue.index_copy_(0, slots, keys_NC[-len(slots) :])
        self.inserted_at.index_fill_(0, slots, step)
        self.pointer.add_(len(keys_NC)).remainder_(len(self.queue))


def split_views(views: Mapping[str, Tensor], *, num_images: int) -> tuple[dict[str, Tensor], Tensor]:
    """Return the queries by kind of view, [B·V, 3, s, s], and the last crop of every image, which gives its key."""
    crops = views["crops"].view(num_images, -1, *views["crops"].shape[1:])
    queries = {kind: images for kind, images in views.items() if kind != "crops"}
    if crops.shape[1] > 1:
        queries = {"crops": crops[:, :-1].flatten(0, 1), **queries}
    return queries, crops[:, -1]


def repeat_keys(keys_BC: Tensor, queries_NC: Tensor) -> Tensor:
    """Return the key of each query, [N, C]: all queries of an image are beside each other."""
    return keys_BC.repeat_interleave(len(queries_NC) // len(keys_BC), dim=0)


def contrast_logits(query_NC: Tensor, key_NC: Tensor, queue_KC: Tensor, *, temperature: float) -> Tensor:
    """Return the similarities of queries to their own key (column 0) and to the queue, over the temperature, [N, 1 + K]."""
    with full_precision(query_NC.device):
        own_N1 = (query_NC * key_NC).sum(dim=1, keepdim=True)
        return torch.cat((own_N1, query_NC @ queue_KC.T), dim=1) / temperature
