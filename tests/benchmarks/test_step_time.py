"""What constant steps save in time follows from the times of steps, and the table says them."""

import pytest
import torch

from benchmarks.lossless.models import transformer
from benchmarks.measure import Spread
from benchmarks.report import Figure
from benchmarks.step_time import saved, table


@pytest.mark.parametrize("skipped", [0.0, 0.3, 0.5])
def test_time_is_saved_only_as_far_as_a_step_of_a_smaller_batch_is_shorter(skipped):
    shares = (1.0, 0.75, 0.5, 0.25)
    assert saved(dict.fromkeys(shares, 8.0), skipped) == 0
    assert saved({share: 8.0 * share for share in shares}, skipped) == pytest.approx(skipped)
    assert saved({share: 8.0 * share + 8.0 for share in shares}, skipped) == pytest.approx(skipped / 2)


def test_the_table_has_a_row_for_each_model():
    figures = [
        Figure(0, "a net, batch 8: step", Spread(3.0, 2.0, 4.0), "ms", ""),
        Figure(0, "a net, batch 8: 1/2", Spread(0.5, 0.4, 0.75), "x", ""),
        Figure(0, "a net, batch 8: 50 % skipped", Spread(49.6, 25.0, 60.0), "%", ""),
    ]
    assert table(figures).splitlines() == [
        "| model | a step, ms | 1/2 | saved at 50 % |",
        "| --- | --- | --- | --- |",
        "| a net, batch 8 | 3.0 (2.0 to 4.0) | 0.50 (0.40 to 0.75) | 50 % (25 % to 60 %) |",
    ]


def test_a_transformer_makes_an_output_for_each_word():
    assert transformer(32, 1)(torch.zeros(2, 5, dtype=torch.long)).shape == (2, 5, 256)
