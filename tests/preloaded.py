"""Everything that processes of tests import; importing it starts no thread and computes nothing."""

import sklearn.linear_model  # noqa: F401
import torch
import torch.distributed
import torch.nn.parallel

import obowlab.evaluation
import obowlab.methods
import obowlab.training.__main__
import obowlab.training.final_evaluation  # noqa: F401

torch.set_num_threads(1)
