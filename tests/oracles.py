"""Slow, obvious versions of the method, written from the specification and sharing no code with `obowlab.methods`.

`ObowOracle` follows the order of one step in docs/method.md to the letter, with Python loops over images, views and locations,
its own ResNet of basic blocks, batch norm, queue, moving averages and SGD. It only reads the initial values from an OBoW module.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from obowlab.config import Moco, Obow
from obowlab.evaluation.detection.voc_metric import Found, Truth, overlaps_with


def batch_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Normalise with the statistics of the batch: over everything but dimension 1."""
    dims = [d for d in range(x.dim()) if d != 1]
    shape = [1, -1] + [1] * (x.dim() - 2)
    centred = x - x.mean(dims, keepdim=True)
    variance = (centred * centred).mean(dims, keepdim=True)
    return centred / torch.sqrt(variance + 1e-5) * weight.view(shape) + bias.view(shape)


def resnet_levels(p: dict[str, Tensor], x: Tensor, *, stem: str) -> dict[str, Tensor]:
    """Return the maps conv4 and conv5 of a ResNet of basic blocks in train mode, from parameters with torchvision's names."""
    if stem == "small":
        x = F.conv2d(x, p["conv1.weight"], stride=1, padding=1)
    else:
        x = F.conv2d(x, p["conv1.weight"], stride=2, padding=3)
    x = torch.relu(batch_norm(x, p["bn1.weight"], p["bn1.bias"]))
    if stem != "small":
        x = F.max_pool2d(x, 3, stride=2, padding=1)
    maps = {}
    for layer in (1, 2, 3, 4):
        block = 0
        while f"layer{layer}.{block}.conv1.weight" in p:
            name = f"layer{layer}.{block}"
            stride = 2 if layer > 1 and block == 0 else 1
            y = F.conv2d(x, p[f"{name}.conv1.weight"], stride=stride, padding=1)
            y = torch.relu(batch_norm(y, p[f"{name}.bn1.weight"], p[f"{name}.bn1.bias"]))
            y = F.conv2d(y, p[f"{name}.conv2.weight"], padding=1)
            y = batch_norm(y, p[f"{name}.bn2.weight"], p[f"{name}.bn2.bias"])
            if f"{name}.downsample.0.weight" in p:
                x = F.conv2d(x, p[f"{name}.downsample.0.weight"], stride=stride)
                x = batch_norm(x, p[f"{name}.downsample.1.weight"], p[f"{name}.downsample.1.bias"])
            x = torch.relu(x + y)
            block += 1
        maps[f"conv{layer + 1}"] = x
    return maps


def unit(v: Tensor) -> Tensor:
    return v / torch.sqrt((v * v).sum())


class ObowOracle:
    """One process, queue vocabulary, dynamic head with batch norm."""

    def __init__(
        self,
        method: Obow,
        state: dict[str, Tensor],
        *,
        stem: str,
        total_steps: int,
        lr: float,
        momentum: float,
        weight_decay: float,
    ):
        self.method, self.stem, self.total_steps = method, stem, total_steps
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        statistics = ("running_mean", "running_var", "num_batches_tracked")

        def part(prefix: str) -> dict[str, Tensor]:
            found = {k[len(prefix) :]: v.clone() for k, v in state.items() if k.startswith(prefix) and not k.endswith(statistics)}
            assert found
            return found

        self.student, self.teacher = part("student."), part("teacher.")
        self.heads = {level: part(f"heads.{level}.") for level in method.levels}
        self.words = {level: [w.clone() for w in state[f"vocabularies.{level}.words"]] for level in method.levels}
        self.pointer = dict.fromkeys(method.levels, 0)
        self.msd = dict.fromkeys(method.levels, 0.5 if method.msd_start == "authors" else None)
        self.velocity: dict[int, Tensor] = {}

    def learnt(self) -> dict[str, Tensor]:
        """Return what SGD moves, under the names of the OBoW module."""
        found = {f"student.{k}": v for k, v in self.student.items()}
        for level, head in self.heads.items():
            found |= {f"heads.{level}.{k}": v for k, v in head.items() if k != "kappa" or self.method.learn_kappa}
        return found

    def step(self, original: Tensor, views: dict[str, Tensor], *, step: int, uniforms: Tensor) -> tuple[float, dict[str, Tensor]]:
        """Do a whole step, SGD included; return its loss and gradients."""
        method = self.method
        num_images = len(original)
        learnt = self.learnt()
        for value in learnt.values():
            value.requires_grad_(True)
        # (1) snapshot
        snapshot = {level: torch.stack(words) for level, words in self.words.items()}
        # (2) student and predictions
        log_predictions: dict[tuple[str, str, int, int], Tensor] = {}
        generated = {level: self.generate(level, snapshot[level]) for level in method.levels}
        for kind, images in views.items():
            maps = resnet_levels(self.student, images, stem=self.stem)["conv5"]
            per_image = len(images) // num_images
            for level, weights in generated.items():
                for b in range(num_images):
                    for v in range(per_image):
                        feature = maps[b * per_image + v].mean((1, 2))
                        logits = self.heads[level]["kappa"] * (weights @ feature)
                        log_predictions[kind, level, b, v] = logits - torch.logsumexp(logits, 0)
        # (3) EMA
        alpha = method.teacher_momentum
        if method.teacher_momentum_schedule == "cosine":
            alpha = 1 - (1 - alpha) * (1 + math.cos(math.pi * step / self.total_steps)) / 2
        for name, value in self.teacher.items():
            self.teacher[name] = alpha * value + (1 - alpha) * self.student[name].detach()
        # (4) teacher
        with torch.no_grad():
            maps = resnet_levels(self.teacher, original, stem=self.stem)
        targets: dict[str, list[Tensor]] = {}
        for index, level in enumerate(method.levels):
            edge = method.border
            cropped = [m[:, edge : m.shape[1] - edge, edge : m.shape[2] - edge] for m in maps[level]]
            locations = [[m[:, i, j] for i in range(m.shape[1]) for j in range(m.shape[2])] for m in cropped]
            # (5) distances to the snapshot
            distances = [[((snapshot[level] - x) ** 2).sum(1) for x in image] for image in locations]
            # (6) mu_MSD
            nearest = [float(d.min()) for image in distances for d in image]
            mean = sum(nearest) / len(nearest)
            before = self.msd[level]
            self.msd[level] = mean if before is None else method.msd_momentum * before + (1 - method.msd_momentum) * mean
            # (7) enqueue
            for b in range(num_images):
                self.words[level][self.pointer[level]] = self.vector(cropped[b], float(uniforms[b, index]))
                self.pointer[level] = (self.pointer[level] + 1) % method.num_words
            # (8) codes, (9) pooling
            delta = method.delta_base * self.msd[level]
            targets[level] = []
            for image in distances:
                codes = []
                for d in image:
                    if method.codes == "hard":
                        code = torch.zeros_like(d)
                        code[int(d.argmin())] = 1.0
                    else:
                        e = torch.exp(-(d - d.min()) / delta)
                        code = e / e.sum()
                    codes.append(code)
                stacked = torch.stack(codes)
                bag = stacked.max(0).values if method.pooling == "max" else stacked.mean(0)
                targets[level].append(bag / bag.sum())
        # (10) loss, backward, SGD
        loss = torch.zeros((), dtype=original.dtype)
        for kind, images in views.items():
            per_image = len(images) // num_images
            terms = [
                -(targets[level][b] * log_predictions[kind, level, b, v]).sum()
                for level in method.levels
                for b in range(num_images)
                for v in range(per_image)
            ]
            loss = loss + sum(terms) / len(terms)
        grads = dict(zip(learnt, torch.autograd.grad(loss, list(learnt.values())), strict=True))
        for name, value in learnt.items():
            value.requires_grad_(False)
            change = grads[name] + self.weight_decay * value
            self.velocity[name] = change if name not in self.velocity else self.momentum * self.velocity[name] + change
            value -= self.lr * self.velocity[name]
        return float(loss.detach()), grads

    def generate(self, level: str, words: Tensor) -> Tensor:
        """G of eq. 5."""
        p = self.heads[level]
        hidden = torch.stack([p["fc1.weight"] @ unit(w) for w in words])
        hidden = torch.relu(batch_norm(hidden, p["norm.weight"], p["norm.bias"]))
        return torch.stack([unit(p["fc2.weight"] @ h + p["fc2.bias"]) for h in hidden])

    def vector(self, cropped: Tensor, uniform: float) -> Tensor:
        """What an image offers to the queue."""
        kind = self.method.queue_vector
        if kind == "global_average":
            return cropped.mean((1, 2))
        size = 3 if kind == "local_average" else 1
        rows, columns = cropped.shape[1] - size + 1, cropped.shape[2] - size + 1
        choices = [cropped[:, i : i + size, j : j + size].mean((1, 2)) for i in range(rows) for j in range(columns)]
        return choices[math.floor(uniform * len(choices))]


class MocoOracle:
    """MoCo v2 with a queue that is a Python list, every group of the batch through a network of its own, and plain SGD."""

    def __init__(self, method: Moco, state: dict[str, Tensor], *, stem: str, lr: float):
        self.method, self.stem, self.lr = method, stem, lr
        statistics = ("running_mean", "running_var", "num_batches_tracked")

        def part(prefix: str) -> dict[str, Tensor]:
            return {k[len(prefix) :]: v.clone() for k, v in state.items() if k.startswith(prefix) and not k.endswith(statistics)}

        self.student = part("student.") | {f"projection.{k}": v for k, v in part("projection.").items()}
        self.teacher = part("teacher.") | {f"projection.{k}": v for k, v in part("teacher_projection.").items()}
        self.queue = [key.clone() for key in state["queue"]]
        self.pointer = 0

    def encode(self, p: dict[str, Tensor], images: list[Tensor]) -> list[Tensor]:
        """Return the projections of images, of which each group is normalised by itself."""
        size = len(images) // self.method.batchnorm_splits
        found = []
        for start in range(0, len(images), size):
            group = torch.stack(images[start : start + size])
            for conv5 in resnet_levels(p, group, stem=self.stem)["conv5"]:
                hidden = torch.relu(p["projection.fc1.weight"] @ conv5.mean((1, 2)) + p["projection.fc1.bias"])
                found.append(unit(p["projection.fc2.weight"] @ hidden + p["projection.fc2.bias"]))
        return found

    def step(self, views: dict[str, Tensor], *, num_images: int, uniforms: Tensor) -> tuple[float, float]:
        """Do a whole step, SGD included; return its loss and the percentage of queries that find their key."""
        for value in self.student.values():
            value.requires_grad_(True)
        crops = views["crops"].view(num_images, -1, *views["crops"].shape[1:])
        queries = {"crops": [crop for image in crops for crop in image[:-1]]}
        queries |= {kind: list(images) for kind, images in views.items() if kind != "crops"}
        projected = {kind: self.encode(self.student, images) for kind, images in queries.items() if images}
        alpha = self.method.teacher_momentum
        for name, value in self.teacher.items():
            self.teacher[name] = alpha * value + (1 - alpha) * self.student[name].detach()
        order = sorted(range(num_images), key=lambda image: float(uniforms[image, 0]))
        with torch.no_grad():
            shuffled = self.encode(self.teacher, [crops[image, -1] for image in order])
        keys = dict(zip(order, shuffled, strict=True))
        loss, hits, seen = torch.zeros((), dtype=crops.dtype), 0, 0
        for vectors in projected.values():
            per_image = len(vectors) // num_images
            terms = []
            for number, query in enumerate(vectors):
                similar = torch.stack([query @ keys[number // per_image], *(query @ old for old in self.queue)])
                terms.append(-torch.log_softmax(similar / self.method.temperature, dim=0)[0])
                hits += int(similar.argmax()) == 0
                seen += 1
            loss = loss + sum(terms) / len(terms)
        for image in range(num_images):
            self.queue[self.pointer] = keys[image]
            self.pointer = (self.pointer + 1) % self.method.queue_size
        grads = torch.autograd.grad(loss, list(self.student.values()))
        for value, grad in zip(self.student.values(), grads, strict=True):
            value.requires_grad_(False)
            value -= self.lr * grad
        return float(loss.detach()), 100.0 * hits / seen


def balanced_assignment(distances: Tensor, *, epsilon: float, iterations: int) -> Tensor:
    """Return the transport plan of appendix D, [N, K] with unit rows, by plain scaling of exp(-D / epsilon) in float64."""
    plan = torch.exp(-distances.double() / epsilon)
    plan /= plan.sum(1, keepdim=True)
    for _ in range(iterations):
        plan = plan / plan.sum(0, keepdim=True)
        plan = plan / plan.sum(1, keepdim=True)
    return plan


def normalised(rows: Tensor, norm: nn.Module) -> Tensor:
    """Return batch norm with the statistics of these rows, a channel at a time."""
    columns = []
    for channel, values in enumerate(rows.T):
        mean = sum(values) / len(values)
        variance = sum((value - mean) ** 2 for value in values) / len(values)
        column = torch.stack([(value - mean) / (variance + 1e-5) ** 0.5 for value in values])
        if norm.weight is not None:
            column = column * norm.weight[channel]
        if norm.bias is not None:
            column = column + norm.bias[channel]
        columns.append(column)
    return torch.stack(columns, dim=1)


def linear(rows: Tensor, layer: nn.Linear) -> Tensor:
    """Return what a layer makes of rows, a product at a time."""
    columns = [sum(row[i] * weight[i] for i in range(len(row))) for row in rows for weight in layer.weight]  # type: ignore[misc]
    product = torch.stack(columns).view(len(rows), -1)  # type: ignore[arg-type]
    return product if layer.bias is None else product + layer.bias


def average_precision(labels: Sequence[int], scores: Sequence[float]) -> float:
    """Return the area under the non-increasing precision over the recall, in [0, 1]; equal scores keep their order."""
    hits = [labels[index] for index in sorted(range(len(labels)), key=lambda index: -scores[index])]
    right, precisions = 0, []
    for count, hit in enumerate(hits, start=1):
        right += hit
        precisions.append(right / count)
    best, total = 0.0, 0.0
    for hit, precision in zip(reversed(hits), reversed(precisions), strict=True):
        best = max(best, precision)
        total += best * hit
    return total / right if right else 0.0


def voc_average_precision(found: Sequence[Found], *, truths: Mapping[str, Truth], overlap: float) -> float:
    """Return the 11-point average precision of one class at one overlap, in percent: detection by detection, by falling score."""
    num_objects = sum(int((~truth.difficult).sum()) for truth in truths.values())
    taken = {image: [False] * len(truth.boxes) for image, truth in truths.items()}
    right, wrong, points = 0, 0, []
    for each in sorted(found, key=lambda one: -one.score):
        truth = truths.get(each.image)
        overlaps = overlaps_with(each.box, truth.boxes) if truth is not None and len(truth.boxes) else np.zeros(1)
        best = int(overlaps.argmax())
        if truth is None or overlaps[best] <= overlap:
            wrong += 1
        elif not truth.difficult[best]:
            right, wrong = (right, wrong + 1) if taken[each.image][best] else (right + 1, wrong)
            taken[each.image][best] = True
        if num_objects and right + wrong:
            points.append((right / num_objects, right / (right + wrong)))
    recalls = np.arange(0.0, 1.1, 0.1)
    return 100.0 * sum(max((precision for recall, precision in points if recall >= point), default=0.0) for point in recalls) / 11
