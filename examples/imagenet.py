"""InfoBatch on ImageNet: ResNet-50, a ViT, or any other model of timm, on MDS shards or tars, under torchrun.

    infobatch-stream convert imagenet/train s3://bucket/train --format mds --resize 512 --quality 90 --workers 16
    infobatch-stream convert imagenet/val s3://bucket/val --format mds --workers 16
    torchrun --nproc-per-node 8 examples/imagenet.py --train s3://bucket/train --val s3://bucket/val \\
        --cache /local/imagenet --bf16
    torchrun --nproc-per-node 8 examples/imagenet.py ... --model vit_small_patch16_224 --optimizer adamw --lr 1e-3 \\
        --weight-decay 0.05 --epochs 300

Shards are folders or URLs; those of URLs ('s3://bucket/train/*.tar' for tars) are kept in --cache. The policy is by
default that of the paper's 40 % row: of the lowest fifth of the losses a quarter is kept, up to 85 % a half.

The same command goes on from the checkpoint in --out, on any number of GPUs: --global-batch is what an optimizer step
sees on all of them together. --evaluate measures a checkpoint and trains nothing.
"""

import argparse
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from process import Process, load, save
from recipe import add_policy_options, cosine, policy_of, set_rates

from infobatch_stream import IndexedWebDataset, InfoBatchLoader

NEEDS = "{}. What this example needs: pip install 'infobatch-stream[examples,mds,wds]'"

try:
    import timm
    from timm.optim import create_optimizer_v2
    from timm.utils import ModelEmaV3
    from torchvision.transforms import v2
except ModuleNotFoundError as error:
    raise SystemExit(NEEDS.format(error)) from error

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Batch:
    """Makes a batch of samples: float32[b, 3, size, size], normalised, and labels int64[b].

    Random crops and flips draw from torch's default generator, which the loader seeds for each batch.
    """

    def __init__(self, size: int, augment: bool) -> None:
        if augment:
            cut = [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()]
        else:
            cut = [v2.Resize(round(size * 256 / 224), antialias=True), v2.CenterCrop(size)]
        self._transform = v2.Compose(
            [v2.PILToTensor(), *cut, v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
        )

    def __call__(self, samples):
        pairs = [(sample["image"], sample["label"]) if isinstance(sample, dict) else sample for sample in samples]
        images = torch.stack([self._transform(image.convert("RGB")) for image, _ in pairs])
        return images, torch.tensor([int(label) for _, label in pairs])


def open_dataset(shards: str, cache: Path, limit: str | None):
    """The samples in a folder or at a URL, whichever kind the shards are."""
    if shards.endswith(".tar") or list(Path(shards).glob("*.tar")):
        dataset = IndexedWebDataset(shards, cache_dir=cache, cache_limit=limit)
        return dataset.decode("pil").to_tuple("jpg;jpeg;png", "cls")
    try:
        from streaming import StreamingDataset
    except ModuleNotFoundError as error:
        raise SystemExit(NEEDS.format(error)) from error

    if "://" in shards:
        return StreamingDataset(remote=shards, local=str(cache), cache_limit=limit)
    return StreamingDataset(local=shards)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="InfoBatch on ImageNet.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--train", required=True, metavar="SHARDS", help="folder or URL")
    parser.add_argument("--val", required=True, metavar="SHARDS", help="folder or URL")
    parser.add_argument("--cache", type=Path, default=Path("cache-imagenet"), help="folder for what comes from URLs")
    parser.add_argument("--cache-limit", metavar="SIZE", help="of the training shards in it, as 200gb; default: none")
    parser.add_argument("--out", type=Path, default=Path("imagenet-run"), help="folder of scores and checkpoint")
    parser.add_argument("--model", default="resnet50", help="any of timm")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--size", type=int, default=224, help="pixels")
    parser.add_argument("--epochs", type=int, default=90)
    parser.add_argument(
        "--global-batch", type=int, default=1024, help="of an optimizer step, on all processes together"
    )
    parser.add_argument("--accumulate", type=int, default=1, help="forward passes per optimizer step")
    parser.add_argument("--optimizer", default="sgd", help="any of timm: sgd, adamw, lars, lamb ...")
    parser.add_argument("--lr", type=float, default=0.4, help="the peak; for the global batch, it is not scaled")
    parser.add_argument("--weight-decay", type=float, default=1e-4)
    parser.add_argument("--warmup", type=float, default=0.05, help="share of the run")
    parser.add_argument("--label-smoothing", type=float, default=0.1)
    parser.add_argument("--ema", type=float, default=0.9999, help="decay of the averaged weights; 0 for none")
    parser.add_argument("--bf16", action="store_true", help="mixed precision in bfloat16")
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    parser.add_argument("--workers", type=int, default=8, help="processes that read, per process that trains")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--evaluate", action="store_true", help="measure the checkpoint in --out, and end")
    add_policy_options(parser, default="quantile")
    args = parser.parse_args()
    if args.evaluate and not (args.out / "checkpoint.pt").exists():
        parser.error(f"there is no checkpoint in {args.out} to evaluate: name another --out")
    return args


def main() -> None:
    args = options()
    process = Process(torch.bfloat16 if args.bf16 else None)
    parts = process.world_size * args.accumulate
    if args.global_batch % parts:
        raise SystemExit(
            f"--global-batch {args.global_batch} cannot be divided among {process.world_size} processes, "
            f"{args.accumulate} forward passes each: give a multiple of {parts}."
        )
    train = open_dataset(args.train, args.cache / "train", args.cache_limit)
    val = open_dataset(args.val, args.cache / "val", None)
    torch.manual_seed(args.seed)
    model = timm.create_model(args.model, num_classes=args.classes)
    model = model.to(process.device, memory_format=torch.channels_last)
    ema = ModelEmaV3(model, decay=args.ema, use_warmup=True) if args.ema else None
    optimizer = create_optimizer_v2(model, args.optimizer, lr=args.lr, weight_decay=args.weight_decay, momentum=0.9)
    checkpoint = args.out / "checkpoint.pt"
    saved = load(checkpoint) if checkpoint.exists() else None
    if saved:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        if ema:
            ema.module.load_state_dict(saved["ema"])
    steps = saved["steps"] if saved else 0
    batch = args.global_batch // parts

    def measure() -> str:
        judged = ema.module if ema else model
        right, count, _ = process.evaluate(judged, val, Batch(args.size, augment=False), batch, args.workers)
        return f"val {right}/{count} = {right / count:.2%}"

    if args.evaluate:
        found = measure()
        if process.leads:
            print(found)
        process.end()
        return
    wrapped = process.wrap(model)
    net = torch.compile(wrapped) if args.compile else wrapped
    args.out.mkdir(parents=True, exist_ok=True)
    with InfoBatchLoader(
        train,
        args.out / "scores.zarr",
        batch_size=batch,
        epochs=args.epochs,
        policy=policy_of(args),
        delta=args.delta,
        seed=args.seed,
        existing="overwrite",  # where there is a checkpoint, it is loaded
        collate_fn=Batch(args.size, augment=True),
        num_workers=args.workers,
        pin_memory=process.device.type == "cuda",
    ) as loader:
        if saved:
            loader.load_state_dict(saved["loader"])
        for epoch in range(loader.epoch, loader.epochs):
            start = time.monotonic()
            for (images, labels), picks in loader:
                last = (loader.step + 1) % args.accumulate == 0 or loader.step + 1 == len(loader)
                set_rates(optimizer, cosine(loader.progress, args.lr, args.warmup))
                # Gradients are exchanged once per optimizer step.
                with nullcontext() if last or process.world_size == 1 else wrapped.no_sync():
                    with process.autocast():
                        outputs = net(process.take(images, memory_format=torch.channels_last))
                    losses = F.cross_entropy(
                        outputs.float(), process.take(labels), reduction="none", label_smoothing=args.label_smoothing
                    )
                    loss = loader.update(losses, picks)
                    (loss / args.accumulate).backward()
                if last:
                    optimizer.step()
                    optimizer.zero_grad()
                    steps += 1
                    if ema:
                        ema.update(model, steps)
            stats, seconds, found = loader.stats, time.monotonic() - start, measure()
            state = loader.state_dict()  # of all ranks together; rank 0 has the scores
            if process.leads:
                saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "loader": state}
                saved |= {"steps": steps, "ema": ema.module.state_dict() if ema else None}
                save(checkpoint, saved)
                print(
                    f"epoch {epoch}: {stats['steps']} steps in {seconds:.1f} s, kept {stats['kept']}, "
                    f"saved {stats['saved']:.1%}, {found}",
                    flush=True,
                )
    process.end()


if __name__ == "__main__":
    main()
