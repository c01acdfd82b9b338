"""Fine-tune a language model with InfoBatch: a sample's loss is the mean over the tokens of its answer.

    python examples/finetune.py --mails FOLDER                     # of e-mails as JSON: {"text": "From ...", ...}
    torchrun --nproc-per-node 2 examples/finetune.py --policy quantile

The prompt is the subject of an e-mail, the answer its first paragraph. Without a folder, sums are to be worked out.
Tokens are bytes, and a small GPT-2 begins from nothing, so that nothing is downloaded: for a model of yours take
AutoModelForCausalLM.from_pretrained and its tokenizer. Devices and checkpoints are in train.py.
"""

import argparse
import json
import math
import os
from email import message_from_string
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from recipe import add_policy_options, cosine, policy_of, set_rates
from torch import nn

from infobatch_stream import InfoBatchLoader

NEEDS = "{}. What this example needs: pip install 'infobatch-stream[examples]'"

try:
    from transformers import GPT2Config, GPT2LMHeadModel
except ModuleNotFoundError as error:
    raise SystemExit(NEEDS.format(error)) from error

LENGTH = 96  # tokens of a prompt and its answer
END = 256  # the token after an answer, and the padding
IGNORE = -100  # transformers' label of tokens that are not learnt


def losses_of(logits, labels):
    """float32[b], of float32[b, n, tokens] and int64[b, n]: the mean over the labels that are not IGNORE.

    The logits at position i are for the label at i + 1. 0 for a sample without labels.
    """
    labels = labels[:, 1:]
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels, ignore_index=IGNORE, reduction="none")
    return losses.sum(1) / (labels != IGNORE).sum(1).clamp(min=1)  # losses are 0 where ignored


def collate(pairs):
    """Token ids and labels, int64[b, n] both, of prompts and answers; n is that of the longest.

    The labels of prompts and padding are IGNORE: only the answers are learnt.
    """
    rows = [([*prompt, *answer, END][:LENGTH], len(prompt)) for prompt, answer in pairs]
    length = max(len(tokens) for tokens, _ in rows)
    ids = torch.full((len(rows), length), END)
    labels = torch.full((len(rows), length), IGNORE)
    for row, (tokens, prompt) in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        labels[row, prompt : len(tokens)] = torch.tensor(tokens[prompt:])
    return ids, labels


def read_pairs(folder):
    """[(prompt, answer)] as bytes: of the e-mails in a folder; of sums where there is none."""
    if folder is None:
        rng = np.random.default_rng(0)
        numbers = rng.integers(0, 10 ** rng.integers(1, 5, (4000, 1)), (4000, 2)).tolist()
        return [(f"{a}+{b}=".encode(), str(a + b).encode()) for a, b in numbers]
    pairs = []
    for path in sorted(folder.glob("*/*.json")):
        mail = message_from_string(json.loads(path.read_text())["text"])
        subject = " ".join(str(mail["subject"] or "").split())[:60]
        paragraphs = [] if mail.is_multipart() else mail.get_payload().split("\n\n")
        answer = next((text.strip() for text in paragraphs if len(text.strip()) >= 20), None)
        if subject and answer:
            pairs.append((f"{subject}\n".encode(errors="replace"), answer.encode(errors="replace")))
    if not pairs:
        raise SystemExit(f'{folder} has no e-mails that can be answered: <kind>/<name>.json, {{"text": "From ..."}}')
    np.random.default_rng(0).shuffle(pairs)  # folders are kinds of e-mails
    return pairs


@torch.no_grad()
def bits_per_token(model, pairs):
    """The mean over all tokens of all answers."""
    total = count = 0
    for batch in torch.utils.data.DataLoader(pairs, 64, collate_fn=collate):
        ids, labels = batch
        tokens = (labels[:, 1:] != IGNORE).sum(1)
        total += (losses_of(model(ids).logits, labels) * tokens).sum().item()
        count += tokens.sum().item()
    return total / count / math.log(2)


def main():
    parser = argparse.ArgumentParser(description="Fine-tune a language model with InfoBatch.")
    parser.add_argument("--mails", type=Path, help="folder of folders of JSON files")
    add_policy_options(parser, default="soft", fraction=0.25)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=32, help="of all processes together")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--store", type=Path, default=Path("scores-finetune.zarr"))
    parser.add_argument("--tiny", action="store_true", help="a run of seconds, to see that it works")
    args = parser.parse_args()

    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        dist.init_process_group("gloo")
    leads = ranks == 1 or dist.get_rank() == 0

    pairs = read_pairs(args.mails)
    train = [pair for number, pair in enumerate(pairs) if number % 10][: 256 if args.tiny else 2000]
    test = pairs[::10][: 64 if args.tiny else 500]
    torch.manual_seed(args.seed)
    size = {"n_embd": 64, "n_layer": 2, "n_head": 4, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=END + 1, n_positions=LENGTH, eos_token_id=END, **size))
    net = nn.parallel.DistributedDataParallel(model) if ranks > 1 else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)

    trained = 0
    with InfoBatchLoader(
        train,
        args.store,
        batch_size=args.batch_size // ranks,
        epochs=3 if args.tiny else args.epochs,
        policy=policy_of(args),
        delta=args.delta,
        seed=args.seed,
        existing="overwrite",
        collate_fn=collate,
    ) as loader:
        for epoch in range(loader.epochs):
            for (ids, labels), picks in loader:
                set_rates(optimizer, cosine(loader.progress, args.lr))
                # Padding stands at the end, where no token before it looks: it needs no attention mask.
                loss = loader.update(losses_of(net(input_ids=ids).logits, labels), picks)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            trained += loader.stats["kept"]
            if leads:
                print(f"epoch {epoch}: {loader.stats['kept']} of {len(train)} samples")
    if leads:
        saved = 1 - trained / (len(train) * loader.epochs)
        print(f"{bits_per_token(model, test):.3f} bits per token, trained on {trained} samples, saved {saved:.1%}")
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
