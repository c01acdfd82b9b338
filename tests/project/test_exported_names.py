"""The names and parameters that are promised: those of the API reference. A change of one is a change for users.

A parameter may be added: write it here too. One that is renamed, removed or given another default breaks users' code.
"""

import inspect
import pkgutil

import numpy as np
import pytest

import infobatch_stream
from infobatch_stream import InfoBatchError, convert, live, policies

EXPORTED = {
    infobatch_stream: (
        *("InfoBatchLoader", "IndexedWebDataset", "StreamedWebDataset", "ScoreStore", "Picks"),
        "augmentation_rng",
        *("SoftPruning", "QuantilePruning", "BudgetPruning", "FullData"),
        *("SetaPruning", "OrderPruning", "KakurenboPruning"),
        *("InfoBatchError", "ConfigError", "DataError", "StoreError", "OutOfStepError", "LostRanksError"),
        "MissingExtraError",
    ),
    policies: (
        *("SoftPruning", "QuantilePruning", "BudgetPruning", "FullData"),
        *("SetaPruning", "OrderPruning", "KakurenboPruning"),
        *("Policy", "Rule", "Schedule", "StepRule", "Moment"),
    ),
    convert: ("Conversion", "ShardSummary", "convert", "write_shards"),
    live: ("progress",),
}
PARAMETERS = {
    "InfoBatchLoader": "(dataset, store, *, batch_size, epochs, policy=SoftPruning(ratio=0.5), delta=0.875, seed=0, "
    "shuffle=True, shuffle_window=65536, canonical_nodes=None, drop_last=False, constant_steps=False, "
    "on_error='raise', existing='error', "
    "num_threads=0, predownload=64, history=False, process_group=None, collate_fn=None, collate_with_picks=None, "
    "include=None, sample_weight=None, initial_scores=None, **dataloader)",
    "InfoBatchLoader.peek": "(self)",
    "InfoBatchLoader.update": "(self, losses, picks, *, score=None)",
    "InfoBatchLoader.commit": "(self)",
    "InfoBatchLoader.state_dict": "(self)",
    "InfoBatchLoader.load_state_dict": "(self, state)",
    "Picks.to": "(self, device, non_blocking=False)",
    "Picks.pin_memory": "(self)",
    "IndexedWebDataset": "(urls, *, cache_dir=None, cache_limit=None)",
    "StreamedWebDataset": "(urls, counts=None, *, cache_dir=None, cache_limit=None)",
    "ScoreStore.create": "(path, num_samples, fingerprint='', *, scores=None, pending=None, epoch=0, replace=False)",
    "ScoreStore.open": "(path, mode='r+')",
    "ScoreStore.seed": "(path, scores, fingerprint=None, *, source=None, replace=False)",
    "ScoreStore.at": "(self, epoch)",
    "ScoreStore.record": "(self, index, loss)",
    "ScoreStore.commit": "(self, epoch=None, *, history=None)",
    "ScoreStore.discard_pending": "(self)",
    "SoftPruning": "(ratio=0.5)",
    "QuantilePruning": "(quantiles=(0.2, 0.85), keep=(0.25, 0.5, 1.0))",
    "BudgetPruning": "(fraction, power=0.5, floor=0.15, spread='middle')",
    "BudgetPruning.largest": "(self, epochs, delta=0.875, seeded=0.0)",
    "FullData": "()",
    "SetaPruning": "(ratio=0.1, groups=5, window=0.9, delta=0.875)",
    "OrderPruning": "(subset=0.75, top=0.85)",
    "KakurenboPruning": "(fraction=0.3, milestones=(0.3, 0.6, 0.8), factors=(1.0, 0.8, 0.6, 0.4))",
    "policies.Moment": "(epoch, epochs, annealing, entries, offered, skipped, seeded=0.0)",
    "policies.Policy.rule": "(self, summary)",
    "policies.Rule.__call__": "(self, scores)",
    "policies.Schedule.at": "(self, moment)",
    "policies.Schedule.check": "(self, moment)",
    "policies.StepRule": "(edges, keep, unseen=1.0, rescale=True)",
    "score_stats.Summary.quantiles": "(self, shares)",
    "score_stats.Summary.rank": "(self, score)",
    "store.history.epochs": "(path)",
    "convert.convert": "(src, dst, format, *, columns=None, encodings=None, extensions=None, keys=True, fill=None, "
    "seed=0, shuffle=None, shard_bytes=67108864, shard_samples=None, compression=None, hashes=('xxh64',), resize=None, "
    "quality=None, resize_columns=None, check=False, on_error='raise', allow_empty=False, overwrite=False, "
    "resume=False, workers=1, ray=None, on_progress=None)",
    "convert.write_shards": "(samples, dst, format, *, columns=None, classes=None, shard_bytes=67108864, "
    "compression=None, hashes=('xxh64',), overwrite=False)",
    "convert.readers.read_source": "(src, *, columns=None, encodings=None, extensions=None, keys=True, fill=None, "
    "skip=False, allow_empty=False)",
    "live.progress": "(loader, **options)",
    "frameworks.accelerate.AcceleratedLoader": "(loader, accelerator)",
    "frameworks.lightning.InfoBatchCallback": "(loader)",
    "frameworks.transformers.InfoBatchTrainer": "(*args, loader, sample_loss=None, **kwargs)",
    "frameworks.transformers.causal_lm_loss": "(outputs, labels)",
    "frameworks.trl.InfoBatchSFTTrainer": "(*args, loader, **kwargs)",
    "frameworks.trl.InfoBatchSFTTrainer.sample_losses": "(self)",
}
NEEDS = {
    "accelerate": "accelerate",
    "lightning": "lightning.pytorch",
    "transformers": "transformers",
    "trl": "trl",
}
ATTRIBUTES = {
    "InfoBatchLoader": (
        *("epoch", "epochs", "step", "progress", "kept_share", "stats", "store", "include"),
        *("constant_steps", "total_steps", "unpruned_steps"),
        *("spent", "num_samples", "process", "processes"),  # for adapters
    ),
    "Picks": ("index", "weight", "sample_weight"),
    "ScoreStore": ("path", "epoch", "num_samples", "scores", "pending", "seeded"),
    "convert.Conversion": ("parts", "classes", "skipped", "problems", "lost", "notes", "seconds"),
    "convert.ShardSummary": ("path", "samples", "shards", "bytes"),
    "score_stats.Summary": ("count", "mean", "largest", "tally"),
    "store.history.Epoch": (
        *("number", "entries", "kept", "trained", "threshold", "seconds", "mean", "quantiles", "histogram"),
    ),
}


def found(name):
    return pkgutil.resolve_name(f"infobatch_stream.{name}")


def parameters(of):
    """As users write them: without types."""
    signature = inspect.signature(of)
    plain = [one.replace(annotation=inspect.Parameter.empty) for one in signature.parameters.values()]
    return str(signature.replace(parameters=plain, return_annotation=inspect.Signature.empty))


@pytest.mark.parametrize("module", EXPORTED, ids=lambda module: module.__name__)
def test_a_module_exports_what_is_promised_and_no_more(module):
    assert sorted(module.__all__) == sorted(EXPORTED[module])


@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.filterwarnings("ignore")  # of frameworks, when they are imported
def test_parameters_and_their_defaults_are_those_that_are_promised(name):
    if name.startswith("frameworks."):
        pytest.importorskip(NEEDS[name.split(".")[1]])
    assert parameters(found(name)) == PARAMETERS[name]


@pytest.mark.parametrize(
    "name", [*PARAMETERS, *(f"{module.__name__}.{name}"[17:] for module in EXPORTED for name in EXPORTED[module])]
)
@pytest.mark.filterwarnings("ignore")
def test_what_is_promised_has_a_docstring_of_its_own(name):
    if name.startswith("frameworks."):
        pytest.importorskip(NEEDS[name.split(".")[1]])
    said = found(name).__doc__
    assert said
    assert not said.startswith(name.split(".")[-1] + "(")  # as dataclasses make one


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_attributes_are_there(name, tmp_path):
    of = found(name)
    if name == "ScoreStore":  # whose attributes only an object has
        of = of.create(tmp_path / "scores.zarr", 3)
    if name == "score_stats.Summary":
        of = of(np.ones(3, np.float32))
    assert {*dir(of), *getattr(of, "__dataclass_fields__", ())}.issuperset(ATTRIBUTES[name])


def test_every_error_is_caught_as_one_of_the_library():
    errors = [found(name) for name in EXPORTED[infobatch_stream] if name.endswith("Error")]
    assert all(issubclass(error, InfoBatchError) for error in errors)
