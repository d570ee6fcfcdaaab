"""Prediction heads: the weights with which a student's feature predicts a bag of visual words (paper, eqs. 1 and 5)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from obowlab.config import Obow
from obowlab.methods import bow


class DynamicHead(nn.Module):
    """G of eq. 5: an MLP that turns the current words into the weights that predict them.

    L2-normalise, Linear, BatchNorm1d (the authors' code has it, the paper does not mention it), ReLU, Linear, L2-normalise:
    https://github.com/valeoai/obow/blob/45af1490d3c076a924ceaf02bbaf201bc74c7f99/obow/builder_obow.py#L504-L509
    Its batch norm sees the same words on every process and must stay unsynchronised.
    """

    def __init__(self, method: Obow, *, num_channels: int, num_features: int):
        super().__init__()
        hidden = 2 * num_features
        self.fc1 = nn.Linear(num_channels, hidden, bias=not method.head_batchnorm)
        self.norm = nn.BatchNorm1d(hidden) if method.head_batchnorm else nn.Identity()
        self.fc2 = nn.Linear(hidden, num_features)
        self.kappa = nn.Parameter(torch.tensor(method.kappa), requires_grad=method.learn_kappa)

    def forward(self, words_KC: Tensor) -> Tensor:
        """Return one unit vector of prediction weights per word, [K, D]."""
        hidden = F.relu(self.norm(self.fc1(bow.unit_rows(words_KC))), inplace=True)
        return bow.unit_rows(bow.at_least_float32(self.fc2(hidden)))


class FixedHead(nn.Module):
    """The linear layer of eq. 1, without kappa and bias: a weight vector per slot of the vocabulary, whatever word is in it."""

    kappa: Tensor

    def __init__(self, *, num_words: int, num_features: int):
        super().__init__()
        self.fc = nn.Linear(num_features, num_words, bias=False)
        self.register_buffer("kappa", torch.tensor(1.0), persistent=False)

    def forward(self, words_KC: Tensor) -> Tensor:
        """Return the weights, [K, D]; the words do not matter."""
        return self.fc.weight
