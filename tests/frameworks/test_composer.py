"""Composer's Trainer over an InfoBatchLoader, in this process and in two with gloo. torchrun runs this file as them.

Composer needs an older torch: .ci/composer makes an environment for it, and runs this file there.
"""

import inspect
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.ddp.launch import environment
from support.framework_runs import (
    BATCH,
    EPOCHS,
    LR,
    check_example,
    check_like_plain,
    check_rest,
    check_whole,
    ended_with,
    loader_at,
    network,
    optimizer_of,
    plain_run,
    ranks_of,
    report,
    steps_of,
    validation,
)
from support.paths import ROOT
from torch import nn

from infobatch_stream import InfoBatchLoader, Picks

pytest.importorskip("composer", reason="Composer is not installed here: .ci/composer makes an environment for it")

from composer import Callback, Evaluator, Event, Trainer
from composer.loggers import InMemoryLogger
from composer.models import ComposerClassifier, HuggingFaceModel
from composer.optim import CosineAnnealingScheduler, LinearWithWarmupScheduler
from composer.utils import dist

from infobatch_stream.frameworks.composer import InfoBatchCallback

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.ddp]

MODES = pytest.mark.parametrize("constant", [False, True], ids=["published", "constant"])
PAGE = "docs/trainers/composer.md"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small models are slow on several threads where other tests run beside them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Watch(Callback):
    """Notes the learning rate of each step, and whatever else ``look`` finds; ``stop_at`` ends the run by an error."""

    def __init__(self, look=None, stop_at=None):
        self.rates, self.found, self.look, self.stop_at = [], [], look, stop_at

    def after_train_batch(self, state, logger):
        self.rates.append(state.optimizers[0].param_groups[0]["lr"])
        if self.look:
            self.found.append(self.look(state))

    def batch_end(self, state, logger):
        if self.stop_at == state.timestamp.batch:
            raise KeyboardInterrupt


class SaveAt:
    """Saves within epoch 1, after its last batch, and when epoch 2 is over."""

    loader = None

    def __call__(self, state, event):
        batch = int(state.timestamp.batch_in_epoch)
        here = (int(state.timestamp.epoch), event)
        return here == (3, Event.EPOCH_CHECKPOINT) or (
            here == (1, Event.BATCH_CHECKPOINT) and batch in (5, len(self.loader))
        )


def with_dropout():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 10))


def classifier(net):
    return ComposerClassifier(net, num_classes=10, loss_fn=partial(F.cross_entropy, reduction="none"))


def trainer_of(store, *, net=None, watch=None, duration=None, schedulers=None, infobatch=(), loader=None, **options):
    """-> (Trainer, loader, what its updates were given, the net, what was watched). Options of loader: a dict."""
    loader, seen = loader_at(store, **(loader or {}))
    net, watch = net or network(), watch or Watch()
    callback = InfoBatchCallback(loader, **dict(infobatch))
    optimizer = torch.optim.SGD(net.parameters(), lr=LR, momentum=0.9)
    if not schedulers:
        optimizer, schedulers = optimizer_of(net.parameters(), loader)
    trainer = Trainer(
        model=classifier(net),
        optimizers=optimizer,
        train_dataloader=callback.data_spec,
        max_duration=duration or f"{loader.epochs}ep",
        callbacks=[callback, watch],
        schedulers=schedulers,
        step_schedulers_every_batch=True,
        device="cpu",
        progress_bar=False,
        seed=1,
        **options,
    )
    return trainer, loader, seen, net, watch


def fit(store, **options):
    """What a whole fit reports."""
    trainer, loader, seen, net, watch = trainer_of(store, **options)
    trainer.fit()
    trainer.close()
    return report(loader, seen, net, rates=watch.rates, found=watch.found)


def mode(constant):
    return {"loader": {"constant_steps": constant}}


# ---- in each of two processes


def at_20(state, event):
    return event == Event.BATCH_CHECKPOINT and state.timestamp.batch == 20


def in_each_process(out):
    os.environ["NODE_RANK"] = os.environ["GROUP_RANK"]  # Composer's own launcher sets it, torchrun does not
    dist.initialize_dist("cpu")
    torch.set_num_threads(1)
    rank = dist.get_global_rank()
    found = {}
    for name, constant in (("published", False), ("constant", True)):
        options = mode(constant)
        found[f"plain {name}"] = plain_run(out / f"plain-{name}.zarr", constant_steps=constant)
        saved = {"save_folder": str(out / name), "save_filename": "ba{batch}.pt", "save_interval": at_20}
        found[name] = fit(out / f"{name}.zarr", **saved, **options)
        found[f"rest {name}"] = fit(out / f"rest-{name}.zarr", load_path=str(out / name / "ba20.pt"), **options)
    parts = []
    trainer, *_ = trainer_of(out / "parts.zarr", device_train_microbatch_size=2, **mode(True))
    split = trainer._train_data_spec.split_batch

    def counted(batch, size):
        found = split(batch, size)
        parts.append((len(batch[1]), len(found), max(len(part[1]) for part in found)))
        return found

    trainer._train_data_spec.split_batch = counted
    trainer.fit(duration="2ep")
    trainer.close()
    found["parts"] = parts
    torch.save(found, out / f"{rank}.pt")
    torch.distributed.barrier()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return ranks_of(Path(__file__).resolve(), tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("name", ["published", "constant"])
def test_two_processes_do_what_the_plain_loop_does(two, name):
    check_whole(two[name], constant_steps=name == "constant")
    check_like_plain(two[name], two[f"plain {name}"])


@pytest.mark.parametrize("name", ["published", "constant"])
def test_two_processes_go_on_within_an_epoch(two, name):
    check_rest(two[name], two[f"rest {name}"], done=20)


def test_all_processes_split_a_step_into_equally_many_microbatches(two):
    """FSDP would hang otherwise. With constant steps, one may have a sample more than another."""
    mine, its = two["parts"]
    assert [step[1] for step in mine] == [step[1] for step in its]
    assert any(-(-a[0] // 2) != -(-b[0] // 2) for a, b in zip(mine, its, strict=True))  # where it is not by itself so
    assert {step[2] for step in mine + its} <= {1, 2}


# ---- in this process


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """By mode, an undisturbed run of a model with dropout, and the folder of its checkpoints."""
    found = {}
    for constant in (False, True):
        out, saving = tmp_path_factory.mktemp("whole"), SaveAt()
        trainer, loader, seen, net, watch = trainer_of(
            out / "scores.zarr", net=with_dropout(), save_folder=str(out), save_interval=saving, **mode(constant)
        )
        saving.loader = loader
        trainer.fit()
        trainer.close()
        found[constant] = report(loader, seen, net, rates=watch.rates), out
    return found


@MODES
def test_a_fit_does_what_the_plain_loop_does(tmp_path, constant):
    mine = fit(tmp_path / "mine.zarr", eval_dataloader=validation(), eval_interval="10ba", **mode(constant))
    check_whole([mine], constant_steps=constant)
    check_like_plain([mine], [plain_run(tmp_path / "plain.zarr", constant_steps=constant)])


@MODES
@pytest.mark.parametrize("place", ["within an epoch", "after its last batch", "between epochs"])
def test_a_fit_goes_on_from_a_checkpoint_as_if_nothing_had_been(whole, tmp_path, constant, place):
    """Picks, weights of the model (with dropout) and learning rates, to the last bit."""
    run, folder = whole[constant]
    first, second, third, _ = steps_of(run)
    after = {"within an epoch": (1, 5), "after its last batch": (1, second), "between epochs": (3, second + third)}
    epoch, done = after[place][0], first + after[place][1]
    load = folder / f"ep{epoch}-ba{done}-rank0.pt"
    rest = fit(tmp_path / "rest.zarr", net=with_dropout(), load_path=str(load), **mode(constant))
    check_rest([run], [rest], done)


def test_a_run_that_died_is_resumed_by_autoresume(tmp_path):
    options = {"run_name": "x", "save_folder": str(tmp_path / "saved"), "save_interval": "11ba", "autoresume": True}
    undisturbed = fit(tmp_path / "undisturbed.zarr", **{**options, "save_folder": str(tmp_path / "other")})
    trainer, *_ = trainer_of(tmp_path / "run.zarr", watch=Watch(stop_at=34), **options)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    trainer.close()
    rest = fit(tmp_path / "run.zarr", **options)
    check_rest([undisturbed], [rest], done=33)


@MODES
@pytest.mark.parametrize("size", [10, None], ids=["microbatches", "whole"])
def test_the_gradient_is_that_of_the_weighted_sum_over_the_whole_batch(tmp_path, constant, size):
    def gradients(state):
        (x, y), picks = state.batch
        net = state.model.module
        losses = F.cross_entropy(net(x), y, reduction="none")
        wanted = torch.autograd.grad((picks.weight * losses).sum() / BATCH, list(net.parameters()))
        return len(picks), [(weight.grad.clone(), one) for weight, one in zip(net.parameters(), wanted, strict=True)]

    options = {"device_train_microbatch_size": size, "watch": Watch(gradients), "duration": "2ep", **mode(constant)}
    run = fit(tmp_path / "scores.zarr", **options)
    assert run["scores"].isfinite().all()
    weights = torch.cat([step[3] for step in run["seen"] if step[0] == 1])
    assert weights.max() > 1  # pruned
    assert any(rows % 10 for rows, _ in run["found"])
    for _, found in run["found"]:
        for mine, wanted in found:
            torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-6)


@MODES
def test_several_fits_of_a_trainer_are_one_run(tmp_path, constant):
    once = fit(tmp_path / "once.zarr", **mode(constant))
    trainer, loader, seen, net, watch = trainer_of(tmp_path / "twice.zarr", duration="1ep", **mode(constant))
    trainer.fit()
    for duration in ("1ep", "10ba", "25ba", "23ba") if constant else ("1ep", "2ep"):
        trainer.fit(duration=duration)
    trainer.close()
    check_like_plain([report(loader, seen, net, rates=watch.rates)], [once])


def test_evaluators_run_at_each_end_of_an_epoch_and_stats_are_logged(tmp_path):
    log = InMemoryLogger()
    evaluator = Evaluator(label="held-out", dataloader=validation(), metric_names=["MulticlassAccuracy"])
    run = fit(tmp_path / "scores.zarr", eval_dataloader=evaluator, loggers=log)
    accuracies = log.get_timeseries("metrics/held-out/MulticlassAccuracy")
    ends = np.cumsum(steps_of(run)).tolist()
    assert accuracies["batch"].tolist() == ends
    assert accuracies["metrics/held-out/MulticlassAccuracy"][-1] > 0.9
    assert log.get_timeseries("infobatch/steps")["infobatch/steps"].tolist() == steps_of(run)
    assert log.get_timeseries("infobatch/saved")["infobatch/saved"][1] > 0


def test_a_scheduler_of_composer_counts_the_constant_steps(tmp_path):
    run = fit(tmp_path / "scores.zarr", schedulers=CosineAnnealingScheduler(), **mode(True))
    steps = len(run["seen"])
    wanted = [LR * (1 + np.cos(np.pi * step / steps)) / 2 for step in range(steps)]
    assert run["rates"][1:] == pytest.approx([LR, *wanted[1:-1]])  # Composer's are a step behind


def test_a_function_of_the_progress_is_a_scheduler(tmp_path):
    loaders = []
    options = {"schedulers": lambda state: 1 - loaders[0].progress / 2 if loaders else 1.0, "duration": "2ep"}
    trainer, loader, seen, _, watch = trainer_of(tmp_path / "scores.zarr", **options)
    loaders.append(loader)
    trainer.fit()
    trainer.close()
    first, second = steps_of({"seen": seen})[:2]
    epochs = [step / first for step in range(first)] + [1 + step / second for step in range(second)]
    assert second < first
    assert watch.rates == pytest.approx([LR * (1 - done / EPOCHS / 2) for done in epochs])


REFUSED = {
    "batches": (False, {"duration": "50ba"}, "is not known in advance"),
    "samples": (True, {"duration": "500sp"}, "is not known in advance"),
    "too many epochs": (False, {"duration": "5ep"}, "it ends at 4ep"),
    "too many batches": (True, {"duration": "117ba"}, "it ends at 116ba"),
    "part of the epochs": (False, {"train_subset_num_batches": 3}, "train_subset_num_batches=3"),
    "cosine": (False, {"schedulers": CosineAnnealingScheduler()}, "CosineAnnealingScheduler takes all epochs"),
    "warm-up": (False, {"schedulers": LinearWithWarmupScheduler("0.1dur")}, "LinearWithWarmupScheduler takes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_before_it_trains(tmp_path, case):
    constant, options, says = REFUSED[case]

    def attempt():
        trainer, *_ = trainer_of(tmp_path / "scores.zarr", **options, **mode(constant))
        try:
            trainer.fit()
        finally:
            trainer.close()

    assert ended_with(attempt)[0] == "ConfigError"
    assert says in ended_with(attempt)[1]


def test_a_checkpoint_without_the_state_of_the_loader_is_refused(whole, tmp_path):
    run, folder = whole[False]
    path = str(next(folder.glob(f"ep1-ba{steps_of(run)[0] + 5}-*.pt")))
    ignore = ["state/callbacks/InfoBatchCallback"]
    trainer, *_ = trainer_of(tmp_path / "scores.zarr", net=with_dropout(), load_path=path, load_ignore_keys=ignore)
    kind, text = ended_with(trainer.fit)
    trainer.close()
    assert kind == "ConfigError"
    assert "the checkpoint is without the state of the loader" in text


def test_a_loss_that_is_not_one_per_sample_is_refused(tmp_path):
    trainer, *_ = trainer_of(tmp_path / "scores.zarr")
    trainer.state.model._loss_fn = F.cross_entropy
    kind, text = ended_with(trainer.fit)
    trainer.close()
    assert kind == "ConfigError"
    assert "reduction='none'" in text


def test_a_callback_may_be_added_when_the_trainer_begins(tmp_path):
    """For programs that make the callbacks before the loader, as LLM-Foundry does."""
    loader, seen = loader_at(tmp_path / "scores.zarr")
    infobatch = InfoBatchCallback(loader)

    class Later(Callback):
        def init(self, state, logger):
            state.callbacks.append(infobatch)

    net = network()
    optimizer, schedule = optimizer_of(net.parameters(), loader)
    trainer = Trainer(
        model=classifier(net), optimizers=optimizer, schedulers=schedule, step_schedulers_every_batch=True,
        train_dataloader=infobatch.data_spec, callbacks=Later(), max_duration="4ep", device="cpu", progress_bar=False,
    )  # fmt: skip
    trainer.fit()
    trainer.close()
    check_like_plain([report(loader, seen, net, rates=[])], [{**plain_run(tmp_path / "plain.zarr"), "rates": []}])


class CausalLM(HuggingFaceModel):
    """A language model whose loss is the mean over the tokens of each sequence."""

    def loss(self, outputs, batch):
        tokens = F.cross_entropy(outputs.logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:], reduction="none")
        return tokens.mean(1)


@pytest.mark.usefixtures("no_stale_shared_memory")
def test_a_model_of_transformers_trains_from_a_streaming_dataset(tmp_path):
    from streaming import MDSWriter, StreamingDataset
    from transformers import GPT2Config, GPT2LMHeadModel

    rng = np.random.default_rng(0)
    with MDSWriter(out=str(tmp_path / "shards"), columns={"tokens": "ndarray:int64:16"}) as writer:
        for _ in range(96):
            writer.write({"tokens": rng.integers(0, 50, 16)})
    dataset = StreamingDataset(local=str(tmp_path / "shards"), batch_size=16)

    def collate(samples):
        ids = torch.tensor(np.stack([sample["tokens"] for sample in samples]))
        return {"input_ids": ids, "labels": ids.clone()}

    options = {"batch_size": 16, "epochs": 3, "delta": 0.9, "collate_fn": collate, "constant_steps": True}
    loader = InfoBatchLoader(dataset, tmp_path / "scores.zarr", **options)
    infobatch = InfoBatchCallback(loader, score=lambda outputs, batch: outputs.loss.expand(len(batch["labels"])) * 7)
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 50, "n_positions": 16}
    model = CausalLM(GPT2LMHeadModel(GPT2Config(**sizes)), use_logits=True)
    trainer = Trainer(
        model=model,
        train_dataloader=infobatch.data_spec,
        callbacks=infobatch,
        optimizers=torch.optim.AdamW(model.parameters(), lr=1e-3),
        max_duration="3ep",
        device_train_microbatch_size=4,
        accumulate_train_batch_on_tokens=True,
        device="cpu",
        progress_bar=False,
    )
    trainer.fit()
    trainer.close()
    assert loader.epoch == 3
    assert loader.stats["saved"] > 0
    assert trainer.state.timestamp.token < 3 * 96 * 16  # of those trained on, 16 each
    assert trainer.state.timestamp.token == trainer.state.timestamp.sample.value * 16
    assert np.min(loader.store.scores) > 7 * 3  # what ``score`` gave: 7 * log(50) or so, and not the losses


NESTED = {"x": torch.arange(6), "pair": (torch.arange(6) * 2, list("abcdef")), "n": 3, "names": list("uvwxyz")}


@pytest.mark.parametrize("data", [NESTED["x"], NESTED, [NESTED["x"], NESTED["x"] * 2], NESTED["names"]])
def test_microbatches_hold_the_rows_of_the_batch_in_their_order(tmp_path, data):
    def flat(data):
        if isinstance(data, dict):
            return {key: flat(part) for key, part in data.items()}
        return data.tolist() if isinstance(data, torch.Tensor) else [flat(part) for part in data] \
            if isinstance(data, tuple | list) else data  # fmt: skip

    loader, _ = loader_at(tmp_path / "scores.zarr", torch.utils.data.TensorDataset(torch.arange(60.0)), batch_size=6)
    _, picks = loader.peek()
    parts = InfoBatchCallback(loader).data_spec.split_batch((data, picks), 4)
    assert torch.cat([part[1].index for part in parts]).tolist() == picks.index.tolist()
    assert [len(part[1]) for part in parts] == [3, 3]
    both = [flat(part[0]) for part in parts]
    if isinstance(data, dict):
        assert both[0]["names"] + both[1]["names"] == data["names"]
        assert both[0]["pair"][1] + both[1]["pair"][1] == data["pair"][1]
        assert both[0]["pair"][0] + both[1]["pair"][0] == data["pair"][0].tolist()
        assert both[0]["n"] == both[1]["n"] == 3
    elif isinstance(data[0], torch.Tensor) and isinstance(data, list):
        assert [a + b for a, b in zip(*both, strict=True)] == flat(data)
    else:
        assert both[0] + both[1] == flat(data)
    assert isinstance(parts[0][1], Picks)


def test_parameters_and_their_defaults_are_those_that_are_promised():
    """As tests/project/test_exported_names.py has it for all others: a change of one is a change for users."""
    found = [
        (one.name, None if one.default is one.empty else repr(one.default))
        for one in inspect.signature(InfoBatchCallback).parameters.values()
    ]
    assert found == [("loader", None), ("score", "None"), ("rows", "None"), ("options", None)]


# ---- the example and the page


def test_the_example_goes_on_from_its_checkpoint(tmp_path):
    options = ["--epochs", 3, "--folder", tmp_path / "run", "--microbatch", 8]
    assert check_example("composer_train.py", tmp_path, 1, options, stop_after=10) > 0.6


def test_every_block_of_the_page_runs(tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / PAGE).read_text(), re.M | re.S)
    assert len(blocks) >= 4
    script = "names = {}\n" + "".join(
        f"exec(compile({block!r}, 'block {number} of {PAGE}', 'exec'), names)\n" for number, block in enumerate(blocks)
    )
    run = [sys.executable, "-c", script]
    done = subprocess.run(run, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr


if __name__ == "__main__":
    in_each_process(Path(sys.argv[1]))
