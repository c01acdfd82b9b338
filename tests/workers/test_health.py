"""The pipe through which workers send their batches."""

import fcntl

import pytest
from support.ddp.data import Noisy
from torch.utils.data import DataLoader

from infobatch_stream import InfoBatchLoader
from infobatch_stream.workers.health import widen

# Python's own warning that forking a process with threads is risky; workers are forked here as users fork them.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


def room(dataloader):
    return fcntl.fcntl(dataloader._iterator._worker_result_queue._reader.fileno(), fcntl.F_GETPIPE_SZ)


@pytest.mark.skipif(not hasattr(fcntl, "F_SETPIPE_SZ"), reason="pipes have one size here")
def test_workers_send_through_a_wide_pipe(tmp_path):
    loader = InfoBatchLoader(
        Noisy(16), tmp_path / "scores.zarr", batch_size=8, epochs=1, num_workers=1, persistent_workers=True
    )
    assert len(list(loader)) == 2
    assert room(loader.dataloader) > 2**16


@pytest.mark.parametrize("options", [{}, {"num_workers": 1}], ids=str)
def test_where_the_system_refuses_all_stays_as_it_is(monkeypatch, options):
    def refused(*_):
        raise PermissionError(1, "Operation not permitted")

    batches = iter(DataLoader(Noisy(16), batch_size=8, **options))
    monkeypatch.setattr(fcntl, "fcntl", refused)
    widen(batches)
    assert len(list(batches)) == 2
