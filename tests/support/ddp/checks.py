"""What must hold of runs, whoever made them."""

import torch

from support.ddp.data import loss_of


def check_run(ranks, alone, size=48):
    """The epochs that several ranks trained, against each other and one process with their global batch."""
    last = torch.full((size,), torch.nan)
    for *found, whole in zip(*ranks, alone, strict=True):
        assert {str(one["stats"]) for one in found} == {str(whole["stats"])}
        assert {one["len"] for one in found} == {whole["len"]}
        assert {len(one["steps"]) for one in found} == {whole["stats"]["steps"]}
        for *parts, both in zip(*(one["steps"] for one in found), whole["steps"], strict=True):
            for k in range(3):  # index, weight, recorded: each rank its part of the step
                assert torch.equal(torch.cat([part[k] for part in parts]), both[k])
            assert {len(part[0]) for part in parts} == {8 // len(ranks)}
            # Each rank augments in its own way.
            assert len({str(part[3].tolist()) for part in parts}) == len(parts)
            for index, weight, recorded, _ in parts:
                assert torch.equal(recorded, weight > 0)
                last[index[recorded]] = loss_of(index[recorded], whole["epoch"])
        for one in (*found, whole):
            assert torch.equal(one["scores"], last)
    assert alone[1]["stats"]["pruned"] > 0
