"""BoWNet: a student predicts the bag of words of a frozen teacher, words made once by k-means (docs/method.md, 10.1)."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

from obowlab.config import Bownet
from obowlab.config.compatibility import refuse_few_features, refuse_small_map
from obowlab.methods import bow
from obowlab.methods.base import Batch, LevelWords, Preparation, SelfSupervised, StepOutput, VisualWords
from obowlab.methods.heads import FixedHead
from obowlab.methods.kmeans import kmeans
from obowlab.methods.vocabulary import WordAssignment, level_metrics

REPORT_EVERY = 50
"""Batches of images between two lines of progress."""


class BoWNet(SelfSupervised[Bownet]):
    """Hard codes, max pooling, L1, a linear layer with one weight vector per word, cross-entropy.

    Teacher and words are fixed before the first step (`prepare`); both belong to the method's state.
    """

    words: Tensor

    def build(self, method: Bownet) -> None:
        """Make the teacher and the words, both empty until `prepare`, and the head."""
        self.teacher = copy.deepcopy(self.student).requires_grad_(False).eval()
        features = self.student.num_features
        self.head = FixedHead(num_words=method.num_words, num_features=features)
        self.register_buffer("words", torch.zeros(method.num_words, self.student.level_channels[method.level]))

    def visual_words(self) -> VisualWords:
        """Return the words, inserted at step 0, with delta 0: the codes are one-hot."""
        words = LevelWords(
            vectors=self.words,
            delta=self.words.new_zeros(()),
            border=self.method.border,
            inserted_at=torch.zeros(len(self.words), dtype=torch.int64, device=self.words.device),
        )
        return VisualWords(teacher=self.teacher, levels={self.method.level: words})

    def train(self, mode: bool = True) -> BoWNet:
        """Set the mode of everything but the teacher, which uses the batch-norm statistics it was trained with."""
        super().train(mode)
        self.teacher.eval()
        return self

    # ------------------------------------------------------------------------------------------------- before training

    @torch.no_grad()
    def prepare(self, preparation: Preparation) -> bool:
        """Load the teacher and cluster its local features of training images into the words.

        Raises:
            UserError: the images have fewer local features than `method.num_words`.
        """
        assert preparation.teacher is not None, "the recipe sees to it"
        self.teacher.load_state_dict(preparation.teacher.state_dict(), strict=True)
        self.teacher.eval()
        points_NC = self._local_features(preparation)
        refuse_few_features(self.method, num_features=len(points_NC), num_images=preparation.num_images)
        words_KC = self.comm.together(lambda: self._cluster(points_NC, preparation=preparation))
        # Every process did the same work on the same points; all take the first one's result, to the bit.
        shared = self.comm.all_gather(words_KC.to(self.words))
        self.words.copy_(shared[: self.method.num_words])
        return True

    def _cluster(self, points_NC: Tensor, *, preparation: Preparation) -> Tensor:
        preparation.report(f"k-means: {self.method.num_words} words from {len(points_NC)} local features of {self.method.level}.")
        return kmeans(
            points_NC,
            num_words=self.method.num_words,
            iterations=self.method.kmeans_iterations,
            seed=preparation.seed,
            report=preparation.report,
        )

    def _local_features(self, preparation: Preparation) -> Tensor:
        """Return the teacher's vectors at drawn locations of drawn images, [N, C], the same on every process."""
        numbers, locations = self.comm.together(lambda: self._draw_locations(preparation))
        share = math.ceil(len(numbers) / self.comm.world_size)
        padded = torch.arange(share * self.comm.world_size).clamp(max=len(numbers) - 1)  # every process contributes equally many
        mine = padded[self.comm.rank * share : (self.comm.rank + 1) * share]
        found_NLC = self.comm.together(lambda: self._read(preparation, numbers=numbers[mine], locations=locations[mine]))
        return self.comm.all_gather(found_NLC)[: len(numbers)].flatten(0, 1)

    def _read(self, preparation: Preparation, *, numbers: Tensor, locations: Tensor) -> Tensor:
        """Return the teacher's vectors of these images at these locations, [N, L, C]."""
        found: list[Tensor] = []
        done = 0
        for images in preparation.originals(numbers):
            local_BUC = self._local(images)
            chosen = locations[done : done + len(images)].to(local_BUC.device)
            found.append(local_BUC.gather(1, chosen[..., None].expand(-1, -1, local_BUC.shape[2])))
            done += len(images)
            if len(found) % REPORT_EVERY == 0 or done == len(numbers):
                preparation.report(f"Vocabulary: read {done} of {len(numbers)} images.")
        return torch.cat(found)

    def _draw_locations(self, preparation: Preparation) -> tuple[Tensor, Tensor]:
        """Return which images are read, [N], and which locations of each, [N, L]: as few of each as are needed."""
        numbers = torch.arange(preparation.num_images)
        order = preparation.uniforms(numbers, 1, 0)[:, 0].argsort(stable=True)
        num_locations = self._local(next(preparation.originals(order[:1]))).shape[1]
        wanted = self.method.kmeans_points * self.method.num_words
        per_image = min(num_locations, math.ceil(wanted / preparation.num_images))
        chosen = order[: math.ceil(wanted / per_image)]
        return chosen, preparation.uniforms(chosen, num_locations, 1).argsort(dim=1, stable=True)[:, :per_image]

    # ---------------------------------------------------------------------------------------------------------- a step

    def forward(self, batch: Batch) -> StepOutput:
        """Do one training step up to its loss.

        The online classifier sees the student's features of all views, each with the class of the image that most of it shows.
        """
        num_images, level = len(batch.original), self.method.level
        features = {kind: self.student(images) for kind, images in batch.views.items()}
        assignment = self.assign(batch.original)
        log_predictions = {
            kind: torch.log_softmax(bow.bow_logits(features_ND, self.head(self.words), kappa=self.head.kappa), dim=-1)
            for kind, features_ND in features.items()
        }
        losses, entropies = bow.prediction_losses(log_predictions, assignment.targets, cutmix_lambda=batch.cutmix_lambda)
        metrics: dict[str, Tensor] = {}
        if batch.wants_metrics:
            metrics = level_metrics(level, assignment, torch.cat(list(log_predictions.values())), comm=self.comm)
        features_BVD = torch.cat([each.view(num_images, -1, self.student.num_features) for each in features.values()], dim=1)
        return self._output(
            losses,
            metrics,
            features=features_BVD.flatten(0, 1),
            labels=view_labels(batch),
            target_entropy=torch.stack(list(entropies.values())).sum(),
        )

    @torch.no_grad()
    def assign(self, original: Tensor) -> WordAssignment:
        """Return the BoW targets of a batch: hard codes, pooled, L1."""
        distance_BU, nearest_BU = bow.nearest_words(bow.Distances(self._local(original), self.words))
        targets = bow.hard_bow(nearest_BU, num_words=self.method.num_words, pooling=self.method.pooling, dtype=self.words.dtype)
        mean_distance = self.comm.all_reduce_mean(distance_BU.mean())
        return WordAssignment(targets=targets, nearest=nearest_BU, mean_distance=mean_distance)

    def _local(self, images: Tensor) -> Tensor:
        """Return the teacher's vectors at the locations of its border-cropped maps, [B, U, C]."""
        map_BCHW = self.teacher.levels(images, (self.method.level,))[0][self.method.level]
        refuse_small_map(self.method, level=self.method.level, size=min(map_BCHW.shape[-2:]))
        map_BCHW = bow.at_least_float32(bow.crop_border(map_BCHW, border=self.method.border))
        return map_BCHW.flatten(2).transpose(1, 2).contiguous()


def view_labels(batch: Batch) -> Tensor | None:
    """Return the class of the image that most of each view shows, all views of an image together; None without classes."""
    if batch.labels is None:
        return None
    labels_BV = []
    for kind, images in batch.views.items():
        own_BV = batch.labels[:, None].expand(-1, len(images) // len(batch.labels))
        if kind in batch.cutmix_lambda:
            lambda_BV = batch.cutmix_lambda[kind].view(len(batch.labels), -1)
            own_BV = torch.where(lambda_BV < 0.5, bow.neighbours(batch.labels)[:, None], own_BV)
        labels_BV.append(own_BV)
    return torch.cat(labels_BV, dim=1).flatten()
