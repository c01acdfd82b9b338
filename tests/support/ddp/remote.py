"""What ranks do with MDS shards at a server: ``remote.py OUT CASES``; what each case found goes to OUT/<rank>.json.

CASES: a JSON object of {name: [remote, options of the dataset]}. In each, the ranks train with 2 workers each.
"""

import gc
import json
import sys
import time
from pathlib import Path

import torch

from infobatch_stream import InfoBatchLoader
from support.ddp.data import loss_of
from support.ddp.launch import process_group
from support.ddp.mds import Augmented

RUN = {"batch_size": 4, "epochs": 2, "delta": 1, "shuffle_window": 32}
FORK = {"num_workers": 2, "multiprocessing_context": "fork"}


def train(dataset, store):
    """The indices of this rank, and the error that ended it, if one did: [type, text, seconds]."""
    indices, begin = [], time.monotonic()
    try:
        loader = InfoBatchLoader(dataset, store, **RUN, **FORK)
        for epoch in range(loader.epochs):
            for (numbers, _), picks in loader:
                assert numbers.tolist() == picks.index.tolist()
                loader.update(loss_of(picks.index, epoch), picks)
                if not epoch:
                    indices += picks.index.tolist()
    except Exception as error:
        return indices, [type(error).__name__, str(error), time.monotonic() - begin]
    return indices, None


def main(out, cases):
    with process_group(60) as (rank, _):
        found = {}
        for name, (remote, options) in json.loads(cases).items():
            gc.collect()  # of the case before: torch waits for its workers
            torch.distributed.barrier()  # an index that rank 0 fetches is waited for only as long as download_timeout
            dataset = Augmented(remote=remote, local=str(Path(out, name)), **options)
            found[name] = train(dataset, Path(out, f"{name}.zarr"))
        Path(out, f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
