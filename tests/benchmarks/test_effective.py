"""The quality of a choice, as the gradients of the samples say it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from benchmarks.effective import effective, norms
from infobatch_stream import FullData, SoftPruning
from infobatch_stream.policies.budget import ProportionalPruning

SCORES = np.random.default_rng(0).standard_exponential(1000, dtype=np.float32)


def test_a_norm_is_that_of_the_gradient_of_one_sample_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    inputs, labels = torch.randn(300, 5), torch.randint(0, 3, (300,))
    found = norms(model, inputs, labels)
    assert model.training
    model.eval()
    for number in (0, 200, 299):
        loss = F.cross_entropy(model(inputs[number : number + 1]), labels[number : number + 1])
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        norm = torch.sqrt(sum(gradient.square().sum() for gradient in gradients))
        assert found[number] == pytest.approx(float(norm), rel=1e-4)


def test_all_data_are_as_good_as_all_data_and_a_choice_at_random_as_the_share_it_keeps():
    assert effective(FullData(), SCORES, SCORES.astype(float)) == (0, 1)
    found = effective(ProportionalPruning(0.4, 0.0, 0.1), SCORES, SCORES.astype(float))
    assert found == pytest.approx((0.4, 0.6), abs=1e-4)


@settings(deadline=None, max_examples=25)
@given(st.floats(0, 2), st.floats(0.01, 0.5))
def test_where_scores_are_the_sizes_nothing_is_better_than_to_keep_in_proportion(power, floor):
    sizes = SCORES.astype(float)
    best = effective(ProportionalPruning(0.5, 1.0, 2**-10), SCORES, sizes)[1]
    assert effective(ProportionalPruning(0.5, power, floor), SCORES, sizes)[1] <= best + 1e-3


def test_soft_pruning_that_halves_the_easy_ones_adds_the_variance_of_those():
    sizes = SCORES.astype(float)
    easy = sizes < sizes.mean()
    wanted = (sizes**2).sum() / ((sizes**2).sum() + (sizes[easy] ** 2).sum())
    assert effective(SoftPruning(0.5), SCORES, sizes)[1] == pytest.approx(wanted)
