"""Train an image and a text tower on pairs, as open_clip does, and InfoBatch: one process or torchrun.

    python examples/contrastive.py PAIRS --stamps /usr/share/tuxpaint/stamps
    torchrun --nproc-per-node 2 examples/contrastive.py PAIRS --constant-steps

PAIRS holds train/*.tar and val/*.tar of pictures (png, jpg) with captions (txt). What cannot be read is replaced.
--stamps writes them first, of the pictures in a folder that have a description beside them (*.png, *.txt).
Run it again to go on from the checkpoint in --out; --stop-after N ends a run after N steps, to try that.
"""

import argparse
import math
from pathlib import Path
from zlib import crc32

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from process import Process, load, save
from torch import nn

from infobatch_stream import BudgetPruning, IndexedWebDataset, InfoBatchLoader

NEEDS = "{}. What this example needs: pip install 'infobatch-stream[tools,wds]'"

try:
    from PIL import Image
    from webdataset import TarWriter
except ModuleNotFoundError as error:
    raise SystemExit(NEEDS.format(error)) from error

SIDE, WORDS, KNOWN = 32, 16, 4096  # pixels, words of a caption, rows of the table of words


def write_pairs(stamps: Path, folder: Path, most: int) -> None:
    """Tars of the ``most`` smallest pictures in ``stamps`` that have a description; its first line is in English."""
    files = [file for file in sorted(stamps.rglob("*.png")) if file.with_suffix(".txt").exists()]
    files = sorted(files, key=lambda file: file.stat().st_size)[:most]
    if len(files) < 10:
        raise SystemExit(f"{stamps} has {len(files)} pictures with descriptions (*.png and *.txt); 10 are needed")
    texts = [file.with_suffix(".txt").read_text(errors="replace").partition("\n")[0] for file in files]
    for split, rest in (("train", (1, 2, 3, 4)), ("val", (0,))):
        (folder / split).mkdir(parents=True)
        with TarWriter(str(folder / split / "pairs-000000.tar")) as tar:
            for number, (file, text) in enumerate(zip(files, texts, strict=True)):
                if number % 5 in rest:
                    tar.write({"__key__": f"{number:06}", "png": file.read_bytes(), "txt": text})


def open_pairs(folder: Path) -> IndexedWebDataset:
    """(PIL picture, caption) of the tars in ``folder``."""
    return IndexedWebDataset(folder).decode("pil").to_tuple("png;jpg;jpeg", "txt").map_tuple(to_pixels, to_words)


def to_pixels(image: Image.Image) -> np.ndarray:
    image = image.convert("RGBA").resize((SIDE, SIDE))
    white = Image.new("RGBA", image.size, "white")
    return np.asarray(Image.alpha_composite(white, image).convert("RGB"), dtype=np.float32).transpose(2, 0, 1) / 255


def to_words(text: str) -> np.ndarray:
    """int64[WORDS]: each word as a row of the table; 0 where there is none."""
    rows = [1 + crc32(word.strip(".,()").encode()) % (KNOWN - 1) for word in text.lower().split()[:WORDS]]
    return np.array(rows + [0] * (WORDS - len(rows)))


class Towers(nn.Module):
    """Pictures and captions as unit vectors, and the scale of their products."""

    def __init__(self, size: int = 64) -> None:
        super().__init__()
        self.image = nn.Sequential(
            nn.Conv2d(3, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(64, 64, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 4 * 4, size),
        )  # fmt: skip
        self.words, self.text = nn.Embedding(KNOWN, size, padding_idx=0), nn.Linear(size, size)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, images, texts):
        words = self.words(texts).sum(1) / (texts > 0).sum(1, keepdim=True).clamp(min=1)
        return F.normalize(self.image(images), dim=1), F.normalize(self.text(words), dim=1), self.log_scale.exp()


class Gather(torch.autograd.Function):
    """Rows of all ranks, in their order; what these do with the rows of this one goes into its gradient."""

    @staticmethod
    def forward(context, mine):
        parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, mine.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(context, gradient):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


class Contrast:
    """InfoNCE by rows, over the pairs of all ranks: open_clip's ClipLoss is the mean of them if nothing is skipped.

    slots: of a rank, of which it may fill fewer; the loader's batch_size. local_loss: compute only the rows of this
    rank, instead of those of all. with_grad: through what other ranks sent too.
    weigh_negatives: count a pair as often as its weight says where it is a negative.
    """

    def __init__(self, slots: int, local_loss: bool = True, with_grad: bool = True, weigh_negatives: bool = True):
        self.slots, self.local_loss, self.with_grad = slots, local_loss, with_grad
        self.weigh_negatives = weigh_negatives
        self.ranks = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if self.ranks > 1 else 0

    def gather(self, mine):
        """Rows of all ranks, each filled up with zeros to ``slots``: with constant steps ranks may differ by a row."""
        mine = F.pad(mine, (0, 0) * (mine.ndim - 1) + (0, self.slots - len(mine)))
        if self.ranks == 1:
            return mine
        everyone = Gather.apply(mine if self.with_grad else mine.detach())
        if self.with_grad or self.local_loss:
            return everyone
        parts = list(everyone.chunk(self.ranks))
        parts[self.rank] = mine  # as open_clip does
        return torch.cat(parts)

    def rows(self, logits, places, weight):
        """Cross-entropy of each row, whose own pair stands at its place. Pairs of weight 0 are nobody's negatives."""
        count = weight if self.weigh_negatives else (weight > 0).float()
        count = count.log().repeat(len(logits), 1)  # a negative that counts double adds log 2 to its logit; 0, -inf
        count[torch.arange(len(logits)), places] = 0
        return F.cross_entropy(logits + count, places, reduction="none")

    def __call__(self, images, texts, scale, weight):
        """(losses of this rank's rows, float[b]; their scores; the loss to go backward from, or None).

        None: it is what ``loader.update`` returns for these losses. weight: float[b], of picks.
        """
        all_images, all_texts, weights = (self.gather(part) for part in (images, texts, weight))
        mine = self.rank * self.slots + torch.arange(len(images), device=images.device)
        if self.local_loss:
            across, down, places = images @ all_texts.T, texts @ all_images.T, mine
        else:
            across = all_images @ all_texts.T
            down, places = across.T, torch.arange(len(across), device=images.device)
        losses = (self.rows(scale * across, places, weights) + self.rows(scale * down, places, weights)) / 2
        own = losses if self.local_loss else losses[mine]
        pairs = (weights if self.weigh_negatives else (weights > 0).float()).sum()
        score = own.detach() / pairs.clamp(min=2).log()  # 1: as by chance, among however many
        return own, score, None if self.local_loss else (weights * losses).mean()


@torch.no_grad()
def recall(towers: Towers, pairs: IndexedWebDataset, device, most: int = 5) -> float:
    """Share of the captions whose picture is among the ``most`` that are nearest to them."""
    images, texts = (torch.tensor(np.stack(part)).to(device) for part in zip(*pairs, strict=True))
    images, texts, _ = towers(images, texts)
    ranks = (texts @ images.T > (texts * images).sum(1, keepdim=True)).sum(1)
    return (ranks < most).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description="Image and text towers on pairs, with InfoBatch.")
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--stamps", type=Path, help="write PAIRS first, of what is in this folder")
    parser.add_argument("--most", type=int, default=1000, help="of them, the smallest ones")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=64, help="per process")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--fraction", type=float, default=0.3, help="of all samples, to skip")
    parser.add_argument("--constant-steps", action="store_true", help="as many steps as if nothing were skipped")
    parser.add_argument("--global-loss", action="store_true", help="each rank computes the rows of all, not its own")
    parser.add_argument("--plain-negatives", action="store_true", help="do not weigh them")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("contrastive-run"), help="folder of scores and checkpoint")
    parser.add_argument("--stop-after", type=int, default=-1)
    args, process = parser.parse_args(), Process()
    if not args.pairs.exists() and args.stamps is None:
        raise SystemExit(f"{args.pairs} is not there: name a folder of train/*.tar and val/*.tar, or give --stamps")
    process.first(lambda: args.pairs.exists() or write_pairs(args.stamps, args.pairs, args.most))
    process.first(lambda: args.out.mkdir(parents=True, exist_ok=True))
    torch.manual_seed(0)
    towers = Towers().to(process.device)
    net = process.wrap(towers)
    optimizer = torch.optim.AdamW(towers.parameters(), lr=args.lr)
    contrast = Contrast(args.batch_size, local_loss=not args.global_loss, weigh_negatives=not args.plain_negatives)
    loader = InfoBatchLoader(
        open_pairs(args.pairs / "train"),
        args.out / "scores.zarr",
        batch_size=args.batch_size,
        epochs=args.epochs,
        policy=BudgetPruning(args.fraction, spread="even"),
        constant_steps=args.constant_steps,
        existing="overwrite",  # a checkpoint has the scores
        on_error="replace",
        num_workers=args.workers,
    )
    checkpoint, parts = args.out / "checkpoint.pt", {"towers": towers, "optimizer": optimizer, "loader": loader}
    for name, state in load(checkpoint).items() if checkpoint.exists() else ():
        parts[name].load_state_dict(state)
    for epoch in range(loader.epoch, loader.epochs):
        for batch, picks in loader:
            images, texts = map(process.take, batch)
            losses, score, loss = contrast(*net(images, texts), process.take(picks.weight))
            recorded = loader.update(losses, picks, score=score)
            optimizer.zero_grad()
            (recorded if loss is None else loss).backward()
            optimizer.step()
            towers.log_scale.data.clamp_(0, math.log(100))  # as CLIP does
            args.stop_after -= 1
            if args.stop_after == 0 or loader.step == len(loader):
                state = {name: part.state_dict() for name, part in parts.items()}  # on all ranks
                if process.leads:
                    save(checkpoint, state)
            if args.stop_after == 0:  # as a job does whose time is over
                raise SystemExit
        if process.leads:
            found, stats = recall(towers, open_pairs(args.pairs / "val"), process.device), loader.stats
            unread = f", {stats['unreadable']} could not be read" if stats["unreadable"] else ""
            print(
                f"epoch {epoch}: {len(loader)} steps, saved {stats['saved']:.1%}, recall {found:.3f}{unread}",
                flush=True,
            )
    loader.commit()
    process.end()


if __name__ == "__main__":
    main()
