"""InfoBatch's CIFAR experiments: ResNets on CIFAR-10, CIFAR-100 or Fashion-MNIST, read from shards or memory.

    row="--data DIR --model r50 --optimizer lars --max-lr 5.2"
    python examples/cifar.py $row --delta 0.0                                # all data
    python examples/cifar.py $row --delta 0.0 --fp16                         # in mixed precision
    torchrun --nproc-per-node 2 examples/cifar.py $row --delta 0.0 --fp16 --use-ddp
    python examples/cifar.py $row --use-info-batch                           # InfoBatch
    torchrun --nproc-per-node 2 examples/cifar.py $row --use-info-batch --fp16 --use-ddp

DIR holds cifar-100-python (or cifar-10-batches-py, or Fashion-MNIST's idx files) as its authors' archive unpacks;
--download fetches it. It is converted to shards at the first start. Each row has a folder of its own in cifar-runs for
scores, checkpoint and result, unless --out names another. Defaults are those of the published script: ResNet-18, SGD,
one cycle up to 0.05, 200 epochs, batches of 128 per process. With --tiny a narrow model is trained on a few generated
pictures, in seconds on a CPU.
"""

import argparse
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from process import Process, load, save
from recipe import add_policy_options, cosine, one_cycle, policy_of, set_rates
from torch import nn

from infobatch_stream import IndexedWebDataset, InfoBatchLoader
from infobatch_stream.convert import convert, write_shards
from infobatch_stream.convert.readers import read_source

NEEDS = "{}. What this example needs: pip install 'infobatch-stream[examples,mds,wds]'"

try:
    import timm
    from timm.optim import Lamb, Lars
except ModuleNotFoundError as error:
    raise SystemExit(NEEDS.format(error)) from error

MODELS = {"r18": "resnet18", "r50": "resnet50", "r101": "resnet101"}
TINY = {"num_epoch": 3, "batch_size": 16}  # the first and the last epoch see all samples


@dataclass(frozen=True)
class Pictures:
    """folder: what the authors' archive unpacks to. mean, std: of each channel."""

    folder: str
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


DATASETS = {
    "cifar10": Pictures("cifar-10-batches-py", 10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": Pictures("cifar-100-python", 100, (0.5074, 0.4867, 0.4411), (0.2011, 0.1987, 0.2025)),
    "fashion-mnist": Pictures("FashionMNIST/raw", 10, (0.2860,), (0.3530,)),
}


class Batch:
    """Makes a batch of samples: float32[b, channels, side, side], normalised, and labels int64[b].

    For training, each picture is moved by up to 4 pixels (what comes in is mirrored at the edge) and flipped with
    probability 1/2, all of a batch at once. It draws from torch's default generator, which the loader seeds for each
    batch, so that a resumed run sees the same pictures.
    """

    def __init__(self, pictures: Pictures, augment: bool) -> None:
        self._mean, self._std = (torch.tensor(part).view(-1, 1, 1) for part in (pictures.mean, pictures.std))
        self._augment = augment

    def __call__(self, samples):
        pairs = [(sample["image"], sample["label"]) if isinstance(sample, dict) else sample for sample in samples]
        pixels = torch.from_numpy(np.stack([image for image, _ in pairs]))  # uint8[b, side, side] or [..., 3]
        images = pixels.view(*pixels.shape[:3], -1).permute(0, 3, 1, 2) / 255
        images = (images - self._mean) / self._std
        return self._moved(images) if self._augment else images, torch.tensor([int(label) for _, label in pairs])

    @staticmethod
    def _moved(images, most=4):
        count, _, height, width = images.shape
        padded = F.pad(images, (most,) * 4, mode="reflect")
        rows = torch.randint(2 * most + 1, (count, 1)) + torch.arange(height)
        columns = torch.randint(2 * most + 1, (count, 1)) + torch.arange(width)
        columns = torch.where(torch.rand(count, 1) < 0.5, columns.flip(1), columns)
        picture = torch.arange(count).view(-1, 1, 1)
        moved = padded.permute(0, 2, 3, 1)[picture, rows[:, :, None], columns[:, None, :]]
        return moved.permute(0, 3, 1, 2).contiguous()


def make_model(name: str, pictures: Pictures, narrow: bool) -> nn.Module:
    """timm's ResNet with the stem that is usual for small pictures: a 3x3 convolution, and no pooling."""
    width = {"channels": (8, 16, 32, 64)} if narrow else {}
    channels = len(pictures.mean)
    model = timm.create_model(
        MODELS[name], num_classes=pictures.classes, in_chans=channels, zero_init_last=False, **width
    )
    model.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def make_optimizer(args: argparse.Namespace, model: nn.Module) -> torch.optim.Optimizer:
    options = {"lr": args.lr, "weight_decay": args.weight_decay}
    if args.optimizer in ("sgd", "lars"):
        options["momentum"] = args.momentum
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "lars": Lars, "lamb": Lamb}
    return kind[args.optimizer](model.parameters(), **options)


def rates(args: argparse.Namespace, progress: float):
    """Learning rate and momentum; one cycle turns momentum the other way round, as torch's OneCycleLR does."""
    if args.schedule == "cosine":
        return cosine(progress, args.lr), None
    start = args.max_lr / args.div_factor
    return (
        one_cycle(progress, args.max_lr, start, start / args.final_div, args.pct_start),
        one_cycle(progress, 0.85, 0.95, 0.95, args.pct_start),
    )


# ---- data


def open_data(args: argparse.Namespace, process: Process, pictures: Pictures):
    """The training and the test set; rank 0 writes their shards if there are none yet."""
    if args.format == "map":
        if args.tiny:
            return generated(pictures, 128), generated(pictures, 41)
        test, train = read_source(source_of(args, pictures))
        return train, test
    shards = args.shards or Path(f"{'tiny-' if args.tiny else ''}{args.dataset}-{args.format}")

    def write() -> None:
        if (shards / "test").exists():
            return
        if args.tiny:
            for split, count in (("train", 128), ("test", 41)):
                write_shards(generated(pictures, count), shards / split, args.format, overwrite=True)
        else:
            convert(source_of(args, pictures), shards, args.format)

    process.first(write)
    return open_shards(shards / "train", args.format), open_shards(shards / "test", args.format)


def open_shards(folder: Path, format: str):
    if format == "wds":
        return IndexedWebDataset(folder).decode().to_tuple("npy", "cls")
    try:
        from streaming import StreamingDataset
    except ModuleNotFoundError as error:
        raise SystemExit(NEEDS.format(error)) from error

    return StreamingDataset(local=str(folder))


def source_of(args: argparse.Namespace, pictures: Pictures) -> Path:
    """The folder with the files of the dataset, which are fetched if --download says so."""
    folder = args.data / pictures.folder
    if args.download and not folder.exists():
        try:
            from torchvision import datasets
            from torchvision.datasets.utils import download_and_extract_archive
        except ModuleNotFoundError as error:
            raise SystemExit(NEEDS.format(error)) from error

        if args.dataset == "fashion-mnist":
            datasets.FashionMNIST(args.data, download=True)
        else:  # without making the dataset: torchvision would unpickle its files
            kind = datasets.CIFAR10 if args.dataset == "cifar10" else datasets.CIFAR100
            download_and_extract_archive(kind.url, args.data, filename=kind.filename, md5=kind.tgz_md5)
    return folder if folder.exists() else args.data


def generated(pictures: Pictures, count: int):
    """Noise, 8 pixels wide; of ten classes, each brighter than the one before."""
    noise = np.random.default_rng(count).integers(0, 60, (count, 8, 8, len(pictures.mean)), dtype=np.uint8)
    return [{"image": noise[n] + np.uint8(20 * (n % 10)), "label": n % 10} for n in range(count)]


# ---- the run


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="InfoBatch's CIFAR experiments.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the dataset's files")
    parser.add_argument("--dataset", choices=DATASETS, default="cifar100")
    parser.add_argument("--download", action="store_true", help="fetch the dataset into --data")
    parser.add_argument("--format", choices=("mds", "wds", "map"), default="mds", help="map: in memory, no shards")
    parser.add_argument("--shards", type=Path, help="folder of the shards; by default DATASET-FORMAT")
    parser.add_argument("--out", type=Path, help="folder of scores, checkpoint and result; by default cifar-runs/ROW")
    parser.add_argument("--resume", type=Path, metavar="CHECKPOINT", help="go on from it")
    parser.add_argument("--model", choices=MODELS, default="r18")
    parser.add_argument("--optimizer", choices=("sgd", "adam", "lars", "lamb"), default="sgd")
    parser.add_argument("--schedule", choices=("onecycle", "cosine"), default="onecycle")
    parser.add_argument("--lr", type=float, default=0.2, help="cosine: the peak")
    parser.add_argument("--max-lr", type=float, default=0.05, help="onecycle: the peak")
    parser.add_argument("--div-factor", type=float, default=25.0, help="onecycle: the peak over the start")
    parser.add_argument("--final-div", type=float, default=1e4, help="onecycle: the start over the end")
    parser.add_argument("--pct-start", type=float, default=0.3, help="onecycle: share of the run before the peak")
    parser.add_argument("--momentum", type=float, default=0.9, help="sgd, lars; onecycle turns it from 0.95 to 0.85")
    parser.add_argument("--weight-decay", type=float, default=5e-4)
    parser.add_argument("--label-smoothing", type=float, default=0.1)
    parser.add_argument("--batch-size", type=int, default=128, help="per process")
    parser.add_argument("--test-batch-size", type=int, default=512)
    parser.add_argument("--num-epoch", "--num_epoch", type=int, default=200)
    parser.add_argument("--fp16", action="store_true", help="mixed precision, with a scaled loss")
    parser.add_argument("--bf16", action="store_true", help="mixed precision in bfloat16")
    parser.add_argument("--use-info-batch", "--use_info_batch", action="store_true", help="short for --policy soft")
    parser.add_argument("--use-ddp", "--use_ddp", action="store_true", help="several processes, under torchrun")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0, help="processes that read, per process that trains")
    parser.add_argument("--tiny", action="store_true", help=f"a few generated pictures, a narrow model; {TINY}")
    add_policy_options(parser, default=None)
    args = parser.parse_args()
    if args.tiny:
        parser.set_defaults(**TINY)
        args = parser.parse_args()
    args.policy = args.policy or ("soft" if args.use_info_batch else "full")
    if args.fp16 and args.bf16:
        parser.error("--fp16 and --bf16 exclude each other")
    if not 0 < args.pct_start < 1:
        parser.error(f"--pct-start {args.pct_start} is no share of the run: give a number between 0 and 1")
    if args.use_ddp != ("WORLD_SIZE" in os.environ):
        parser.error("--use-ddp is for processes that torchrun starts, and they need it: torchrun ... --use-ddp")
    args.out = args.out or (args.resume.parent if args.resume else out_of(args))
    if not args.resume and (args.out / "checkpoint.pt").exists():
        parser.error(f"{args.out} holds a run: give --resume {args.out / 'checkpoint.pt'} or another --out")
    return args


def out_of(args: argparse.Namespace) -> Path:
    """A folder for each row of the table: all that makes one is in its name."""
    precision = "-fp16" if args.fp16 else "-bf16" if args.bf16 else ""
    processes = f"-{os.environ['WORLD_SIZE']}x" if args.use_ddp else ""
    tiny = "tiny-" if args.tiny else ""
    row = f"{tiny}{args.dataset}-{args.model}-{args.optimizer}-{args.policy}{precision}{processes}-seed{args.seed}"
    return Path("cifar-runs") / row


def main() -> None:
    args = options()
    process = Process(torch.float16 if args.fp16 else torch.bfloat16 if args.bf16 else None)
    pictures = DATASETS[args.dataset]
    train, test = open_data(args, process, pictures)
    torch.manual_seed(args.seed)
    model = make_model(args.model, pictures, narrow=args.tiny).to(process.device)
    optimizer = make_optimizer(args, model)
    net, scaler = process.wrap(model), process.scaler
    args.out.mkdir(parents=True, exist_ok=True)
    history = []
    with InfoBatchLoader(
        train,
        args.out / "scores.zarr",
        batch_size=args.batch_size,
        epochs=args.num_epoch,
        policy=policy_of(args),
        delta=args.delta,
        seed=args.seed,
        existing="overwrite",  # there is no checkpoint that needs it
        collate_fn=Batch(pictures, augment=True),
        num_workers=args.workers,
        pin_memory=process.device.type == "cuda",
    ) as loader:
        if args.resume:
            saved = load(args.resume)
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            scaler.load_state_dict(saved["scaler"])
            loader.load_state_dict(saved["loader"])
            history = saved["history"]
        for epoch in range(loader.epoch, loader.epochs):
            start = time.monotonic()
            for (images, labels), picks in loader:
                set_rates(optimizer, *rates(args, loader.progress))
                with process.autocast():
                    outputs = net(process.take(images))
                losses = F.cross_entropy(
                    outputs.float(),
                    process.take(labels),
                    reduction="none",
                    label_smoothing=args.label_smoothing,
                )
                loss = loader.update(losses, picks)
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
            seconds = time.monotonic() - start
            right, count, test_loss = process.evaluate(
                model, test, Batch(pictures, augment=False), args.test_batch_size
            )
            stats = loader.stats
            history.append({"epoch": epoch, "accuracy": right / count, "test_loss": test_loss, "seconds": seconds})
            history[-1] |= {name: stats[name] for name in ("steps", "kept", "saved")}
            state = loader.state_dict()  # of all ranks together; rank 0 has the scores
            if process.leads:
                saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "loader": state}
                saved |= {"scaler": scaler.state_dict(), "history": history}
                save(args.out / "checkpoint.pt", saved)
                (args.out / "result.json").write_text(json.dumps(history, indent=1))
                print(
                    f"epoch {epoch}: {stats['steps']} steps in {seconds:.1f} s, test {right}/{count} = "
                    f"{right / count:.2%}, saved {stats['saved']:.1%}",
                    flush=True,
                )
    process.end()


if __name__ == "__main__":
    main()
