"""TRL's SFTTrainer over an InfoBatchLoader, and the Trainer for causal language models. torchrun runs this file too."""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support.ddp.launch import environment, process_group
from support.framework_runs import check_equal, check_example, loader_at, one_process, plain_run, ranks_of, report
from support.paths import ROOT

from infobatch_stream import ConfigError

pytestmark = [pytest.mark.ddp, one_process]

ROWS, BATCH, EPOCHS = 45, 8, 3  # with scores to begin with, of the epochs 0 and 1 are pruned
PAD, END = 256, 257  # the other tokens are bytes
KINDS = {
    "text": {},
    "completion": {},
    "assistant": {"assistant_only_loss": True},
    "packed": {"packing": True, "max_length": 96},
    "wrapped": {"packing": True, "packing_strategy": "wrapped", "max_length": 48},
    "flattened": {"padding_free": True, "max_length": None, "pad_to_multiple_of": 16},
}
CHAT = (
    "{% for message in messages %}{{ message.role }}:{% if message.role == 'assistant' %}{% generation %}"
    "{{ message.content }}{{ eos_token }}{% endgeneration %}{% else %}{{ message.content }}{% endif %}{% endfor %}"
)


@pytest.fixture(autouse=True)
def one_thread():
    """A model this small is slow on several, where other tests run beside it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def no_telemetry(monkeypatch):
    """TRL sends none in CI."""
    monkeypatch.setenv("CI", "1")


# ---- runs


def tokenizer_of():
    """Of bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<pad>", "<end>"]
    of_bytes = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    of_bytes.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=of_bytes, pad_token="<pad>", eos_token="<end>", chat_template=CHAT)


def rows_of(kind, first=0):
    """Lines of a Python source, of which the next one is to be told."""
    from datasets import Dataset

    lines = [line.strip()[:40] for line in Path(textwrap.__file__).read_text().splitlines() if len(line) > 10]
    pairs = [(lines[i] + "\n", lines[i + 1]) for i in range(first, first + 2 * ROWS, 2)]
    if kind in ("completion", "flattened"):
        return Dataset.from_list([{"prompt": prompt, "completion": answer} for prompt, answer in pairs])
    if kind == "assistant":
        roles = ("user", "assistant")
        chats = [[{"role": role, "content": text} for role, text in zip(roles, pair, strict=True)] for pair in pairs]
        return Dataset.from_list([{"messages": chat} for chat in chats])
    return Dataset.from_list([{"text": prompt + answer} for prompt, answer in pairs])


SIZES = {"vocab_size": END + 1, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128, "initializer_range": 0.3}


def model_of():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def lora():
    from peft import LoraConfig

    return LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj", "v_proj", "up_proj"])


def config_of(out, name, kind, **options):
    from trl import SFTConfig

    usual = {"num_train_epochs": EPOCHS, "per_device_train_batch_size": BATCH, "learning_rate": 0.01, "use_cpu": True}
    usual |= {"bf16": False, "gradient_checkpointing": False, "report_to": [], "disable_tqdm": True}
    usual |= {"save_strategy": "no", "logging_steps": 3, "max_grad_norm": 0}
    return SFTConfig(str(out / f"of-{name}"), **{**usual, **KINDS[kind], **options})


def trainer_of(out, kind, name="run", *, loader_options=None, seeded=True, model=None, **options):
    """A trainer, its loader, and the list of what each update was given."""
    from infobatch_stream.frameworks.trl import InfoBatchSFTTrainer

    made = []

    def loader_for(trainer):
        given = {"batch_size": BATCH, "epochs": EPOCHS, "delta": 0.875, "collate_fn": trainer.data_collator}
        given |= {"initial_scores": trainer.sample_losses()} if seeded else {}
        made.extend(loader_at(out / f"{name}.zarr", trainer.train_dataset, **given | (loader_options or {})))
        return made[0]

    keys = ("peft_config", "callbacks", "optimizers", "eval_dataset")
    more = {key: options.pop(key) for key in keys if key in options}
    trainer = InfoBatchSFTTrainer(
        model or model_of(),
        config_of(out, name, kind, **options),
        train_dataset=rows_of(kind),
        processing_class=tokenizer_of(),
        loader=loader_for,
        **more,
    )
    return trainer, *made


def fit(out, name, kind="completion", checkpoint=None, **options):
    """What a run reports, with a store of its own."""
    trainer, loader, seen = trainer_of(out, kind, name, **options)
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    return report(loader, seen, trainer.model, logs=trainer.state.log_history, kept=loader.stats["saved"])


def plain_loss(net, row):
    """Of a row of a prepared dataset, sequence by sequence, with the model's own logits."""
    ids, labels = (torch.tensor(row[key]) for key in ("input_ids", "labels"))
    total = count = 0
    first = 0
    for length in row.get("seq_lengths") or [len(ids)]:
        own, target = ids[None, first : first + length], labels[first + 1 : first + length]
        total += F.cross_entropy(net(input_ids=own).logits[0, :-1], target, reduction="sum")
        count += (target != -100).sum()
        first += length
    return total / count


def losses_of(net, rows):
    return torch.stack([plain_loss(net, row) for row in rows])


def recorded(seen, size):
    """float[size]: the losses of an epoch."""
    losses = torch.full((size,), float("nan"))
    for *_, index, weight, found in seen:
        losses[index[weight > 0]] = found[weight > 0]
    return losses


# ---- losses


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_a_sample_is_the_mean_over_its_labelled_tokens_as_a_plain_loop_has_it(tmp_path, kind):
    short = {"num_train_epochs": 1, "learning_rate": 0.0}
    trainer, loader, seen = trainer_of(tmp_path, kind, seeded=False, loader_options={"epochs": 1}, **short)
    expected = losses_of(trainer.model, trainer.train_dataset).detach()
    assert len(expected) == loader.num_samples > BATCH
    assert expected.std() > 0.05
    torch.testing.assert_close(torch.tensor(trainer.sample_losses()), expected, rtol=1e-5, atol=1e-5)
    trainer.train()
    torch.testing.assert_close(recorded(seen, len(expected)), expected, rtol=1e-5, atol=1e-5)


def sgd(parameters, *_):
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)


@pytest.mark.parametrize("constant_steps", [False, True])
@pytest.mark.parametrize("kind", ["completion", "packed"])
def test_a_pruned_epoch_moves_the_weights_as_a_plain_loop_does(tmp_path, kind, constant_steps):
    model, options = model_of(), {"epochs": 1, "delta": 1.0, "constant_steps": constant_steps}
    before = [weight.detach().clone() for weight in model.parameters()]
    more = {"num_train_epochs": 1, "gradient_accumulation_steps": 2, "optimizers": sgd(model.parameters())}
    trainer, loader, seen = trainer_of(tmp_path, kind, model=model, loader_options=options, **more)
    scores, rows = trainer.sample_losses(), trainer.train_dataset
    trainer.train()
    data = {"dataset": rows, "collate_fn": list, "batch_size": BATCH, "initial_scores": scores}
    run = {"model": model_of(), "losses_of": losses_of, "optimizer_of": sgd, "accumulate": 2, "by_number": True}
    plain = plain_run(tmp_path / "plain.zarr", **run, **data, **options)
    for mine, its in zip(seen, plain["seen"], strict=True):
        assert torch.equal(mine[2], its[2])
        assert torch.equal(mine[3], its[3])
    assert sum((step[3] > 0).sum() for step in seen) < loader.num_samples
    for start, mine, its in zip(before, model.parameters(), plain["weights"], strict=True):
        torch.testing.assert_close(mine.detach() - start, its - start, rtol=1e-3, atol=1e-6)


def test_under_dft_what_is_recorded_is_the_loss_without_its_factor(tmp_path):
    """DFT's own is low for tokens of low probability as well."""
    short = {"num_train_epochs": 1, "learning_rate": 0.0, "loss_type": "dft", "logging_steps": 1}
    trainer, loader, seen = trainer_of(tmp_path, "text", seeded=False, loader_options={"epochs": 1}, **short)
    trainer.train()
    scores = torch.tensor(loader.store.scores)
    torch.testing.assert_close(scores, losses_of(trainer.model, trainer.train_dataset).detach(), rtol=1e-5, atol=1e-5)
    row = trainer.train_dataset[int(seen[0][2][0])]
    tokens = F.cross_entropy(
        trainer.model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1],
        torch.tensor(row["labels"][1:]),
        reduction="none",
    )
    assert seen[0][4][0].item() == pytest.approx((tokens * (-tokens).exp()).mean().item(), rel=1e-4)


def test_the_loss_that_balances_experts_is_added_to_that_of_the_samples(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=2, router_aux_loss_coef=0.5))
    trainer, loader, _ = trainer_of(tmp_path, "text", seeded=False, model=model)
    data, picks = next(iter(loader))
    model.train()
    loss, outputs = trainer.compute_loss(model, {**data, "picks": picks}, return_outputs=True)
    rows = [trainer.train_dataset[row] for row in picks.index.tolist()]
    assert outputs.aux_loss > 0.5
    assert (loss - 0.5 * outputs.aux_loss).item() == pytest.approx(losses_of(model, rows).mean().item(), rel=1e-4)


# ---- runs that go on


CASES = {
    "published": {"kind": "completion"},
    "packed, with constant steps": {"kind": "packed", "loader_options": {"constant_steps": True}},
    "LoRA": {"kind": "assistant", "gradient_checkpointing": True, "peft_config": True},
    "LoRA, with constant steps": {
        "kind": "flattened",
        "gradient_checkpointing": True,
        "peft_config": True,
        "loader_options": {"constant_steps": True},
        "gradient_accumulation_steps": 2,
    },
}


def within_the_second_epoch(seen, accumulate):
    """An even number of updates after which that is begun and not over, and the steps until then."""
    first, second = (sum(step[0] == epoch for step in seen) for epoch in (0, 1))
    for steps in range(accumulate, second, accumulate):
        updates = -(-first // accumulate) + steps // accumulate
        if updates % 2 == 0:
            return updates, first + steps
    raise AssertionError(f"no such place in epochs of {first} and {second} steps")


@pytest.mark.parametrize("case", CASES)
def test_a_run_resumed_within_an_epoch_is_the_rest_of_the_one_that_was_not_stopped(tmp_path, case):
    options = dict(CASES[case])
    if options.get("peft_config"):
        options["peft_config"] = lora()
    whole = fit(tmp_path, "whole", save_strategy="steps", save_steps=2, **options)
    updates, done = within_the_second_epoch(whole["seen"], options.get("gradient_accumulation_steps", 1))
    rest = fit(tmp_path, "rest", checkpoint=tmp_path / "of-whole" / f"checkpoint-{updates}", **options)
    assert rest["seen"][0][0] == 1
    assert rest["seen"][0][1] > 0
    check_equal(whole, rest, skip=done)
    assert whole["epoch"] == rest["epoch"] == EPOCHS
    start = model_of().state_dict()
    assert not all(any(torch.equal(a, b) for b in start.values()) for a in whole["weights"])


def test_scores_of_a_reference_pass_prune_from_the_first_epoch_on(tmp_path):
    trainer, loader, seen = trainer_of(tmp_path, "completion")
    reference = torch.tensor(trainer.sample_losses())
    trainer.train()
    kept = [set(torch.cat([step[2][step[3] > 0] for step in seen if step[0] == epoch]).tolist()) for epoch in range(3)]
    assert [len(one) == ROWS for one in kept] == [False, False, True]
    skipped = sorted(set(range(ROWS)) - kept[0])
    assert reference[skipped].max() < reference.mean()
    assert loader.stats["saved"] == pytest.approx(1 - sum(map(len, kept)) / (3 * ROWS))


# ---- what TRL logs


@pytest.mark.parametrize("kind", ["completion", "packed"])
def test_evaluation_is_that_of_sfttrainer(tmp_path, kind):
    from trl import SFTTrainer

    held_out, model = rows_of(kind, first=90), model_of()
    plain = SFTTrainer(
        model, config_of(tmp_path, "plain", kind), train_dataset=held_out, eval_dataset=held_out,
        processing_class=tokenizer_of(),
    )  # fmt: skip
    expected = plain.evaluate()
    trainer, *_ = trainer_of(tmp_path, kind, eval_dataset=held_out)
    found = trainer.evaluate()
    for key in ("eval_loss", "eval_mean_token_accuracy", "eval_entropy"):
        assert found[key] == pytest.approx(expected[key], rel=1e-5)


@pytest.mark.parametrize("kind", ["completion", "flattened"])
def test_metrics_of_trl_are_those_of_the_batches_that_were_trained_on(tmp_path, kind):
    trainer, _, seen = trainer_of(tmp_path, kind, logging_steps=1, pad_to_multiple_of=None)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    tokens = sum(len(trainer.train_dataset[row]["input_ids"]) for step in seen for row in step[2].tolist())
    assert logs[-1]["num_tokens"] == tokens
    for log, step in zip(logs, seen, strict=True):
        assert 0 <= log["mean_token_accuracy"] <= 1
        assert log["loss"] == pytest.approx((step[3] * step[4]).mean().item(), abs=1e-3)
        assert log["kept_loss"] == pytest.approx(step[4][step[3] > 0].mean().item(), rel=1e-4)


# ---- what is refused


def refused(tmp_path, says, **options):
    with pytest.raises(ConfigError, match=says):
        trainer_of(tmp_path, "text", seeded=False, **options)


def test_arguments_that_do_not_go_with_the_loader_are_refused(tmp_path):
    refused(tmp_path, "num_train_epochs=2", num_train_epochs=2)
    refused(tmp_path, "max_steps out", max_steps=3)


def test_what_cannot_work_is_refused_before_the_model_goes_over_the_data(tmp_path, monkeypatch):
    import trl

    passes = []
    monkeypatch.setattr("infobatch_stream.frameworks.trl.InfoBatchSFTTrainer.sample_losses", passes.append)
    with pytest.raises(ConfigError, match="label_smoothing_factor"):
        trainer_of(tmp_path, "text", label_smoothing_factor=0.1)
    monkeypatch.setattr(trl, "__version__", "1.15.0")
    with pytest.raises(ConfigError, match=r"trl 1\.15\.0 .* 1\.16 or newer"):
        trainer_of(tmp_path, "text")
    assert not passes


def test_a_loader_of_another_dataset_is_refused(tmp_path):
    from infobatch_stream.frameworks.trl import InfoBatchSFTTrainer

    other = {"batch_size": BATCH, "epochs": EPOCHS}
    given = {"train_dataset": rows_of("packed"), "processing_class": tokenizer_of()}
    with pytest.raises(ConfigError, match=r"45 samples, the prepared dataset \d+: let loader="):
        InfoBatchSFTTrainer(
            model_of(),
            config_of(tmp_path, "other", "packed"),
            loader=lambda _: loader_at(tmp_path / "other.zarr", rows_of("packed"), **other)[0],
            **given,
        )


def test_streamed_datasets_are_refused(tmp_path):
    from infobatch_stream.frameworks.trl import InfoBatchSFTTrainer

    args = config_of(tmp_path, "streamed", "text", max_steps=3)
    given = {"train_dataset": rows_of("text").to_iterable_dataset(), "processing_class": tokenizer_of()}
    with pytest.raises(ConfigError, match="train_dataset is streamed"):
        InfoBatchSFTTrainer(model_of(), args, loader=lambda _: None, **given)


def test_flattened_batches_of_another_collator_are_refused(tmp_path):
    trainer, _, seen = trainer_of(tmp_path, "packed", seeded=False, loader_options={"collate_fn": flatten})
    with pytest.raises(ConfigError, match=r"collate_fn=trainer\.data_collator"):
        trainer.train()
    assert not seen


def flatten(samples):
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    return DataCollatorForLanguageModeling(pad_token_id=PAD, padding_free=True)(samples)


# ---- the Trainer of transformers


@pytest.mark.parametrize("constant_steps", [False, True])
def test_the_trainer_of_transformers_takes_causal_models(tmp_path, constant_steps):
    from transformers import DataCollatorForLanguageModeling, TrainingArguments

    from infobatch_stream.frameworks.transformers import InfoBatchTrainer, causal_lm_loss

    tokenizer = tokenizer_of()
    rows = [{"input_ids": tokenizer(text)["input_ids"]} for text in rows_of("text")["text"]]
    labelled = [{**row, "labels": row["input_ids"]} for row in rows]
    with torch.no_grad():
        expected = losses_of(model_of(), labelled)

    def run(name, checkpoint=None):
        options = {"batch_size": BATCH, "epochs": EPOCHS, "delta": 0.875, "constant_steps": constant_steps}
        options |= {"collate_fn": DataCollatorForLanguageModeling(tokenizer, mlm=False)}
        loader, seen = loader_at(tmp_path / f"{name}.zarr", rows, initial_scores=expected.numpy(), **options)
        args = TrainingArguments(
            str(tmp_path / name), num_train_epochs=EPOCHS, per_device_train_batch_size=BATCH, learning_rate=0.01,
            use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="steps", save_steps=4,
        )  # fmt: skip
        model = model_of()
        InfoBatchTrainer(model, args, loader=loader, sample_loss=causal_lm_loss).train(checkpoint)
        return report(loader, seen, model)

    whole, rest = run("whole"), run("rest", str(tmp_path / "whole" / "checkpoint-4"))
    check_equal(whole, rest, skip=4)
    first = whole["seen"][0]
    torch.testing.assert_close(first[4], expected[first[2]], rtol=1e-5, atol=1e-5)
    assert sum((step[3] > 0).sum() for step in whole["seen"] if step[0] == 0) < ROWS


def test_a_model_without_logits_is_refused():
    from infobatch_stream.frameworks.transformers import causal_lm_loss

    with pytest.raises(ConfigError, match="use_liger_kernel"):
        causal_lm_loss({"loss": torch.tensor(1.0)}, torch.zeros(2, 3, dtype=torch.int64))


# ---- several processes


def main(out):
    torch.set_num_threads(1)
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"  # else the Trainer cannot load its optimizer
    with process_group() as (rank, _):
        trainer, *_ = trainer_of(out, "packed", "scores", loader_options={"batch_size": BATCH})
        found = {"scores": torch.tensor(trainer.sample_losses())}
        found["plain"] = losses_of(trainer.model, trainer.train_dataset).detach()
        saved = {"save_strategy": "steps", "save_steps": 2, "peft_config": lora(), "gradient_checkpointing": True}
        found["whole"] = fit(out, "whole", "packed", **saved)
        found["rest"] = fit(out, "rest", "packed", out / "of-whole" / "checkpoint-2", **saved)
        torch.save(found, out / f"{rank}.pt")


def test_two_processes_share_the_samples_and_go_on_exactly(tmp_path):
    ranks = ranks_of(__file__, tmp_path)
    for scores, plain in zip(ranks["scores"], ranks["plain"], strict=True):
        torch.testing.assert_close(scores, plain, rtol=1e-5, atol=1e-5)
    for whole, rest in zip(ranks["whole"], ranks["rest"], strict=True):
        check_equal(whole, rest, skip=2)
    one, other = ([step[2][step[3] > 0] for step in whole["seen"]] for whole in ranks["whole"])
    for mine, its in zip(one, other, strict=True):
        assert not set(mine.tolist()) & set(its.tolist())


@pytest.mark.parametrize(
    ("ranks", "options"),
    [(1, ["--lora"]), pytest.param(2, ["--packing", "--constant-steps"], marks=pytest.mark.slow)],
)
def test_the_example_goes_on_with_its_checkpoint(tmp_path, ranks, options):
    from support.real_data import spam

    sizes = ["--samples", 80, "--epochs", 2, "--batch-size", 8, "--save-steps", 3]
    assert check_example("sft.py", tmp_path, ranks, [spam(), *sizes, *options], stop_after=3) >= 0


def test_every_example_of_the_page_runs(tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "trainers" / "trl.md").read_text(), re.M | re.S)
    assert len(blocks) == 4
    script = "".join(f"exec(compile({block!r}, 'block of trl.md', 'exec'), names)\n" for block in blocks)
    done = subprocess.run(
        [sys.executable, "-c", f"names = {{}}\n{script}"],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "of the samples were not trained on" in done.stdout


if __name__ == "__main__":
    main(Path(sys.argv[1]))
