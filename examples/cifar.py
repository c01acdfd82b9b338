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
from pathlib import Path

import torch
import torch.nn.functional as F
from cifar_data import DATASETS, NEEDS, Batch, Pictures, open_data
from process import Process, load, save
from recipe import add_policy_options, cosine, one_cycle, policy_of, set_rates
from torch import nn

from infobatch_stream import InfoBatchLoader

try:
    import timm
    from timm.optim import Lamb, Lars
except ModuleNotFoundError as error:
    raise SystemExit(NEEDS.format(error)) from error

MODELS = {"r18": "resnet18", "r50": "resnet50", "r101": "resnet101"}
TINY = {"num_epoch": 3, "batch_size": 16}  # the first and the last epoch see all samples


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
