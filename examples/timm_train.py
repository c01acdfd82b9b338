"""Train a model of timm with timm's own parts, as its train.py does, and InfoBatch: one process or torchrun.

    python examples/timm_train.py PICTURES --model resnet18 --cutmix 1.0
    torchrun --nproc-per-node 2 examples/timm_train.py PICTURES --constant-steps

PICTURES is what train.py takes: train/ and validation/, in each a folder of pictures for every class. Run it again to
go on from the checkpoint in --out; --stop-after N ends a run after N steps, to try that.
"""

import argparse
from pathlib import Path

import torch
from process import Process, load, save

from infobatch_stream import InfoBatchLoader

NEEDS = "{}. What this example needs: pip install 'infobatch-stream[examples]'"

try:
    from timm.data import Mixup, create_dataset, create_transform, resolve_data_config
    from timm.data.loader import PrefetchLoader, fast_collate
    from timm.models import create_model
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.utils import ModelEmaV3, random_seed
except ModuleNotFoundError as error:
    raise SystemExit(NEEDS.format(error)) from error

DEFAULTS = {
    "model": "resnet18", "size": 224, "epochs": 90, "batch-size": 128, "opt": "sgd", "lr": 0.1, "warmup-epochs": 5,
    "mixup": 0.0, "cutmix": 0.0, "mixup-mode": "batch", "smoothing": 0.1, "ema": 0.999, "workers": 0,
    "out": Path("timm-run"), "stop-after": -1,
}  # fmt: skip


class Target(tuple):
    """(labels, picks), as what PrefetchLoader takes for the target of a batch, and moves to the device."""

    def to(self, **where):
        return Target(part.to(**where) for part in self)


def mix(mixup, images):
    """Mix ``images`` in place; -> float[b, b]: how much each picture (row) has of each sample (column)."""
    # Mixup mixes the targets too: if each sample is a class of its own, these are the shares.
    shares = torch.eye(len(images), device=images.device)
    even = len(images) // 2 * 2  # it takes pairs: of an odd number the last one stays as it is
    shares[:even, :even] = mixup(images[:even], torch.arange(even, device=images.device))[1][:, :even]
    return shares


def losses_of(logits, labels, shares, smoothing):
    """(losses, scores), float[b] each: a sample's loss is what *its label* adds to the losses of all pictures."""
    log_p = logits.float().log_softmax(1)
    plain = -log_p[:, labels]  # [picture, sample]
    smooth = (1 - smoothing) * plain - smoothing * log_p.mean(1, keepdim=True)
    share, picture = shares.max(0)  # the picture that shows most of the sample; its loss is at best -log(share)
    return (shares * smooth).sum(0), (plain.gather(0, picture[None])[0] + share.log()).detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("pictures", type=Path)
    for name, default in DEFAULTS.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"default: {default}")
    parser.add_argument("--constant-steps", action="store_true", help="as many steps as if nothing were skipped")
    args, process = parser.parse_args(), Process()
    random_seed(0)
    train, val = (create_dataset("", root=args.pictures, split=split) for split in ("train", "validation"))
    model = create_model(args.model, num_classes=len(train.reader.class_to_idx)).to(process.device)
    config = resolve_data_config({"input_size": (3, args.size, args.size)}, model=model)
    train.transform = create_transform(**config, is_training=True, use_prefetcher=True)  # PrefetchLoader does the rest
    val.transform = create_transform(**config)
    args.out.mkdir(parents=True, exist_ok=True)
    run = {"batch_size": args.batch_size, "epochs": args.epochs, "constant_steps": args.constant_steps}
    inner = {"collate_fn": fast_collate, "num_workers": args.workers, "pin_memory": process.device.type == "cuda"}
    loader = InfoBatchLoader(train, args.out / "scores.zarr", existing="overwrite", **run, **inner)
    per_epoch = loader.unpruned_steps  # updates, for a schedule that fits both modes
    optimizer = create_optimizer_v2(model, args.opt, lr=args.lr, weight_decay=2e-5, momentum=0.9)
    plan = {"num_epochs": args.epochs, "warmup_epochs": args.warmup_epochs, "updates_per_epoch": per_epoch}
    scheduler, _ = create_scheduler_v2(optimizer, "cosine", step_on_epochs=False, **plan)
    ema, net = ModelEmaV3(model, decay=args.ema), process.wrap(model)
    mixup = Mixup(args.mixup, args.cutmix, mode=args.mixup_mode, label_smoothing=0, num_classes=args.batch_size)
    mixup.mixup_enabled = bool(args.mixup or args.cutmix)
    checkpoint = args.out / "checkpoint.pt"
    parts = {"model": model, "ema": ema.module, "optimizer": optimizer, "loader": loader}
    for name, state in load(checkpoint).items() if checkpoint.exists() else ():
        parts[name].load_state_dict(state)
    for epoch in range(loader.epoch, loader.epochs):
        batches = ((images, Target((labels, picks))) for (images, labels), picks in loader)
        for images, (labels, picks) in PrefetchLoader(batches, config["mean"], config["std"], device=process.device):
            updates = round(loader.progress * args.epochs * per_epoch)  # as if nothing were skipped
            scheduler.step_update(updates)
            random_seed(updates * process.world_size, process.rank)  # a resumed run draws the same
            shares = mix(mixup, images)
            losses, score = losses_of(net(images), labels, shares, args.smoothing)
            optimizer.zero_grad()
            loader.update(losses, picks, score=score).backward()
            optimizer.step()
            ema.decay = 1 - (1 - args.ema) * per_epoch / len(loader)  # over as much of an epoch in both modes
            ema.update(model, updates + 1)
            args.stop_after -= 1
            if args.stop_after == 0 or loader.step == len(loader):
                state = {name: part.state_dict() for name, part in parts.items()}  # on all ranks
                if process.leads:
                    save(checkpoint, state)
            if args.stop_after == 0:  # as a job does whose time is over
                raise SystemExit
        right, count, _ = process.evaluate(ema.module, val, None, args.batch_size)
        if process.leads:
            print(f"epoch {epoch}: {len(loader)} steps, saved {loader.stats['saved']:.1%}, {right} of {count} right")
    loader.commit()
    process.end()


if __name__ == "__main__":
    main()
