"""An example that is run in this process as a script, with what each of its updates was given."""

import gc
import runpy
import sys
from unittest.mock import patch

import torch.distributed as dist

from infobatch_stream import InfoBatchLoader
from support.paths import ROOT


def example(name):
    """What is in an example, without running it."""
    sys.path.insert(0, str(ROOT / "examples"))  # as for a script that is run
    try:
        return runpy.run_path(str(ROOT / "examples" / f"{name}.py"))
    finally:
        sys.path.remove(str(ROOT / "examples"))


def recorded(name, *options):
    """[(epoch, step, index int64[b], weight float[b], losses float[b])] of this rank; the process group outlives it."""
    seen, update = [], InfoBatchLoader.update

    def recording(self, losses, picks, **score):
        place = self.epoch, picks._origin.step
        seen.append((*place, picks.index.clone(), picks.weight.clone(), losses.detach().clone()))
        return update(self, losses, picks, **score)

    with (
        patch.object(InfoBatchLoader, "update", recording),
        patch.object(dist, "init_process_group"),  # it is of all the runs of this process
        patch.object(dist, "destroy_process_group"),
        patch.object(sys, "argv", [name, *map(str, options)]),
        patch.object(sys, "path", [str(ROOT / "examples"), *sys.path]),
    ):
        try:
            runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
        except SystemExit as end:  # of --stop-after
            if end.code:
                raise
            end.with_traceback(None)
    gc.collect()  # the run lock goes with the loader
    return seen


def check_rest(whole, rest, done):
    """On each rank ``rest`` has the places, indices, weights and losses of ``whole`` after ``done`` steps."""
    for mine, its in zip(whole, rest, strict=True):
        assert len(its) == len(mine) - done
        for one, other in zip(mine[done:], its, strict=True):
            assert one[:2] == other[:2]
            assert one[2].equal(other[2])
            assert one[3].equal(other[3])
            assert one[4].equal(other[4])


def check_same_state(one, other):
    """Two checkpoints hold the same bits."""
    assert one.keys() == other.keys()
    for key, value in one.items():
        if isinstance(value, dict):
            check_same_state(value, other[key])
        elif hasattr(value, "numpy"):
            assert value.nan_to_num(-1).equal(other[key].nan_to_num(-1)), key
        else:
            assert value == other[key], key
