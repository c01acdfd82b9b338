"""Watch a run: a line on the terminal, and everything of ``loader.stats`` in TensorBoard.

    python examples/live.py && tensorboard --logdir runs

``loader.stats`` is a flat dict of numbers, so other loggers take it as it is: ``wandb.log(loader.stats)``,
``mlflow.log_metrics(loader.stats, step)``.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from infobatch_stream import InfoBatchLoader
from infobatch_stream.live import progress

NEEDS = "{}. What this example needs: pip install 'infobatch-stream[examples,live,tools]'"

try:
    from sklearn.datasets import load_digits
    from torch.utils.tensorboard import SummaryWriter
except ModuleNotFoundError as error:
    raise SystemExit(NEEDS.format(error)) from error


def main():
    parser = argparse.ArgumentParser(description="Watch a run.")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="of TensorBoard")
    parser.add_argument("--store", type=Path, default=Path("scores-live.zarr"))
    args = parser.parse_args()

    digits = load_digits()
    dataset = TensorDataset(torch.from_numpy(digits.data).float() / 16, torch.from_numpy(digits.target))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    seen = 0  # samples, by which runs that prune can be compared with runs that do not
    with (
        SummaryWriter(args.runs) as writer,
        InfoBatchLoader(
            dataset, args.store, batch_size=32, epochs=args.epochs, history=True, existing="overwrite"
        ) as loader,
    ):
        for _ in range(loader.epochs):
            for (images, labels), picks in progress(loader):
                loss = loader.update(F.cross_entropy(model(images), labels, reduction="none"), picks)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                seen += len(images)
            for name, value in loader.stats.items():
                writer.add_scalar(f"infobatch/{name}", value, seen)


if __name__ == "__main__":
    main()
