"""Which row of a batch is which sample, whatever collate_fn does; and which samples an error is about."""

import copy
import pickle
import random
from operator import itemgetter

import numpy as np
import pytest
import torch
from support.ddp.data import Noisy, loss_of, wds, write_wds
from torch.utils.data import Dataset, Subset, default_collate

from infobatch_stream import ConfigError, DataError, InfoBatchLoader, OutOfStepError, Picks, ScoreStore

N = 50
# Python's own warning that forking a process with threads is risky; workers are forked here as users fork them.
forks = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
WORKERS = [0, pytest.param(1, marks=forks)]


class Texts(Dataset):
    """(tokens, index), of lengths from 1 to 9 in an order that is not that of the indices; of 3 nothing is longer."""

    def __getitem__(self, index):
        return torch.arange(1 + index * 7 % 9) + index, index

    def __len__(self):
        return N


def length(sample):
    return -len(sample[0])


def padded(samples):
    tokens, index = zip(*samples, strict=True)
    return torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True), torch.tensor(index)


def sorted_in_place(samples):
    samples.sort(key=length)
    return padded(samples)


def sorted_copy(samples):
    return padded(sorted(samples, key=length))


def sorted_with_picks(samples, picks):
    order = sorted(range(len(samples)), key=lambda row: length(samples[row]))
    return padded([samples[row] for row in order]), picks[order]


def filtered_with_picks(samples, picks):
    rows = [row for row, sample in enumerate(samples) if sample[1] % 5]
    return padded([samples[row] for row in rows]), picks[rows]


@pytest.fixture
def make(tmp_path):
    def make(dataset=None, **options):
        options = {"batch_size": 8, "epochs": 4, **options}
        return InfoBatchLoader(dataset or Texts(), tmp_path / "scores.zarr", **options)

    return make


def train(loader, epochs=3):
    """Train with a loss that the data tell, and check the pairing of each batch; -> the scores."""
    for _ in range(epochs):
        for (_, index), picks in loader:
            assert torch.equal(index, picks.index)
            assert ((picks.weight == 2) <= (loss_of(index) < loader.stats["mean_score"])).all()
            loader.update(loss_of(index), picks)
    loader.commit()
    return ScoreStore.open(loader._run.scores.path).scores


# ---- the order of the rows


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize(
    "options", [{"collate_fn": sorted_in_place}, {"collate_with_picks": sorted_with_picks}], ids=["in place", "picks"]
)
def test_scores_and_weights_follow_the_samples_that_are_sorted(make, options, workers):
    scores = train(make(num_workers=workers, **options))
    assert np.array_equal(scores, loss_of(torch.arange(N)).numpy())


def test_rows_really_are_in_another_order(make):
    _, picks = make(collate_fn=sorted_in_place).peek()
    _, unsorted = make(collate_fn=padded).peek()
    assert picks.index.tolist() != unsorted.index.tolist()
    assert sorted(picks.index.tolist()) == sorted(unsorted.index.tolist())


@pytest.mark.parametrize("workers", WORKERS)
def test_a_sorted_copy_is_refused_before_anything_is_recorded(make, workers):
    loader = make(collate_fn=sorted_copy, num_workers=workers)
    with pytest.raises(ConfigError, match=r"not in the order of its samples.*samples\.sort.*collate_with_picks"):
        train(loader)
    assert np.isnan(ScoreStore.open(loader._run.scores.path).pending).all()


@pytest.mark.parametrize(
    "collate",
    [
        lambda samples: {"batch": {"labels": sorted(index for _, index in samples)}},
        lambda samples: padded([samples[row] for row in random.sample(range(len(samples)), len(samples))]),
        lambda samples: padded(samples[::-1]),
        lambda samples: [np.array([index for _, index in sorted(samples, key=length)])],
    ],
    ids=["lists in dicts", "shuffled", "reversed", "arrays"],
)
def test_other_orders_than_that_of_the_samples_are_refused(make, collate):
    with pytest.raises(ConfigError, match="not in the order of its samples"):
        next(iter(make(collate_fn=collate)))


def wrong_picks(samples, picks):
    return padded(sorted(samples, key=length)), picks


def test_picks_that_do_not_belong_to_the_rows_are_refused(make):
    with pytest.raises(ConfigError, match="collate_with_picks returned the same rows, but for other samples"):
        next(iter(make(collate_with_picks=wrong_picks)))


@pytest.mark.parametrize(
    "collate",
    [
        padded,
        list,
        tuple,
        lambda samples: [index for _, index in samples],
        # packed: one row, of all
        lambda samples: (torch.cat([tokens for tokens, _ in samples])[None], torch.arange(len(samples) + 1)),
        # no two calls give the same
        lambda samples: (torch.rand(len(samples)), torch.arange(len(samples))),
        # a pair of each sample and another of the batch
        lambda samples: (padded(samples), padded(random.sample(samples, len(samples)))[1]),
        # contrastive: the targets are the same for any batch
        lambda samples: (padded(samples), torch.eye(len(samples))),
        # and there is nothing else that has a row for each
        lambda samples: (torch.cat([tokens for tokens, _ in samples]), torch.arange(len(samples))),
        # two views of each
        lambda samples: torch.tensor([index for _, index in samples] * 2),
        # all the same
        lambda samples: torch.ones(len(samples)),
        lambda samples: None,
    ],
)
def test_what_keeps_the_order_or_has_no_rows_is_no_false_alarm(make, collate):
    assert len(list(make(collate_fn=collate))) == 7


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    "collate",
    [
        lambda samples: tuple(zip(*samples, strict=True)),
        lambda samples: (torch.stack([image for image, _ in samples]), torch.arange(len(samples))),
    ],
)
def test_samples_that_are_all_alike_are_no_false_alarm(make, collate, size):
    alike = [(torch.zeros(3, 4, 4), {"boxes": torch.zeros(1, 4)}) for _ in range(16)]  # to see whether it runs
    assert len(list(make(alike, batch_size=size, collate_fn=collate))) == 16 // size


def test_samples_that_are_changed_in_place_or_in_the_list_are_as_they_would_be(make):
    """The trial has copies, and the list may hold other objects after the call where the samples stood."""

    def collate(samples):
        for place, (tokens, index) in enumerate(samples):
            tokens += 1
            samples[place] = tokens, index
        return padded(samples)

    for (tokens, index), picks in make(collate_fn=collate):
        assert torch.equal(tokens[:, 0], picks.index + 1)
        assert torch.equal(index, picks.index)


def test_a_trial_draws_nothing_from_the_random_numbers_of_the_batch(make):
    def collate(samples):
        return [torch.rand(3), random.random(), np.random.rand()], torch.tensor([index for _, index in samples])

    tried, (peeked, _), _ = next(iter(make(collate_fn=collate)))[0][0], *make(collate_fn=collate).peek()
    assert torch.equal(tried[0], peeked[0])
    assert tried[1:] == peeked[1:]


@pytest.mark.parametrize("keep", [slice(0, 5), slice(0, 0)])
def test_a_list_of_which_samples_were_taken_is_refused(make, keep):
    def collate(samples):
        samples[:] = samples[keep]
        return samples.copy()

    with pytest.raises(ConfigError, match=r'collate_fn left \d of 8 samples.*on_error="replace"'):
        next(iter(make(collate_fn=collate)))


def test_a_list_that_was_sorted_and_filled_up_is_refused(make):
    def collate(samples):
        samples.sort(key=length)
        samples[-1] = samples[0]
        return padded(samples)

    with pytest.raises(ConfigError, match="moved samples within the list that it got, and put 1 others there"):
        next(iter(make(collate_fn=collate)))


def test_samples_that_are_one_object_are_followed_too(make):
    """As small numbers are, and what a dataset keeps in memory and gives for several indices."""
    values = [3, 1, 2, 1, 3, 2, 1, 1]

    def collate(samples):
        samples.sort()
        return torch.tensor(samples)

    loader = make(values, collate_fn=collate)
    for numbers, picks in loader:
        assert numbers.tolist() == sorted(values)
        assert [values[index] for index in picks.index.tolist()] == sorted(values)
        assert sorted(picks.index.tolist()) == list(range(8))


def test_weights_and_stand_ins_follow_a_sort(make):
    class Rotten(Texts):
        def __getitem__(self, index):
            if index % 7 == 3:
                raise OSError("rotten")
            return super().__getitem__(index)

    loader = make(Rotten(), collate_fn=sorted_in_place, on_error="replace")
    with pytest.warns(RuntimeWarning, match="rotten"):
        scores = train(loader)
    assert np.flatnonzero(np.isnan(scores)).tolist() == list(range(3, N, 7))


# ---- rows that are left out


def test_rows_that_collate_with_picks_leaves_out_have_no_score(make):
    scores = train(make(collate_with_picks=filtered_with_picks))
    assert np.flatnonzero(np.isnan(scores)).tolist() == list(range(0, N, 5))


def test_losses_of_fewer_samples_name_the_ways_out(make):
    loader = make(collate_fn=lambda samples: padded([sample for sample in samples if sample[1] % 5]))
    with pytest.raises(
        ConfigError, match=r"losses is .*\[[1-7]\].* leaves out some of the 8 samples.*on_error=\"replace\""
    ):
        for (_, index), picks in loader:
            loader.update(loss_of(index), picks)


@pytest.mark.parametrize(
    ("collate", "text"),
    [
        (lambda samples, picks: padded(samples), "a tuple of 2|returned"),
        (lambda samples, picks: (padded(samples), picks[[]]), "none of the samples"),
        (lambda samples, picks: [padded(samples), picks], r"returned list; it must return \(data, picks\)"),
    ],
)
def test_what_collate_with_picks_must_return(make, collate, text):
    with pytest.raises(ConfigError, match=text):
        next(iter(make(collate_with_picks=collate)))


def test_one_of_the_two_makes_a_batch(make):
    with pytest.raises(ConfigError, match="both given"):
        make(collate_fn=padded, collate_with_picks=sorted_with_picks)
    with pytest.raises(ConfigError, match="must be a function"):
        make(collate_with_picks=True)


def test_an_update_without_samples_is_refused(make):
    loader = make(collate_fn=padded)
    _, picks = next(iter(loader))
    with pytest.raises(ConfigError, match="of no sample"):
        loader.update(torch.zeros(0), picks[[]])


# ---- picks


@pytest.mark.parametrize(
    ("order", "rows"),
    [
        ([2, 0, -1], [2, 0, 7]),
        (torch.tensor([3, 3]), [3, 3]),
        (np.array([1]), [1]),
        (slice(None, None, -2), [7, 5, 3, 1]),
        (torch.arange(8) % 2 == 0, [0, 2, 4, 6]),
        ([False] * 7 + [True], [7]),
        ([], []),
    ],
)
def test_picks_of_other_rows(make, order, rows):
    _, picks = make(collate_fn=padded).peek()
    chosen = picks[order]
    assert type(chosen) is Picks
    for name in ("index", "weight", "_record"):
        assert torch.equal(getattr(chosen, name), getattr(picks, name)[rows])
    assert chosen._origin == picks._origin


@pytest.mark.parametrize(
    ("order", "error"),
    [
        (3, TypeError),
        ([[0, 1]], TypeError),
        ([8], IndexError),
        (torch.ones(8, dtype=torch.uint8), TypeError),
    ],
)
def test_places_that_are_none_of_several_rows(make, order, error):
    _, picks = make(collate_fn=padded).peek()
    with pytest.raises(error):
        picks[order]


def two(tmp_path, **options):
    """Two loaders of the same epoch."""
    return [InfoBatchLoader(Noisy(16), tmp_path / f"{name}.zarr", batch_size=8, epochs=3, **options) for name in "ab"]


@pytest.mark.parametrize(
    "travel",
    [lambda p: p, copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p)), lambda p: p.to("meta"), itemgetter([0])],
    ids=["as it is", "copied", "pickled", "moved", "chosen"],
)
def test_picks_of_another_loader_in_the_same_epoch_are_refused(tmp_path, travel):
    mine, other = two(tmp_path)
    (_, picks), _ = next(iter(mine)), next(iter(other))
    with pytest.raises(OutOfStepError, match="another loader's"):
        other.update(torch.ones(len(travel(picks))), travel(picks))
    assert other.step == 0


@forks
def test_picks_from_a_worker_are_their_loaders(tmp_path):
    mine, other = two(tmp_path, num_workers=1)
    (_, picks), _ = next(iter(mine)), next(iter(other))
    with pytest.raises(OutOfStepError, match="another loader's"):
        other.update(torch.ones(8), picks)
    mine.update(torch.ones(8), picks)
    assert mine.step == 1


def test_picks_of_before_load_state_dict_are_refused(tmp_path):
    loader, _ = two(tmp_path)
    _, picks = next(iter(loader))
    loader.load_state_dict(loader.state_dict())
    with pytest.raises(OutOfStepError, match="before load_state_dict"):
        loader.update(torch.ones(8), picks)
    _, picks = next(iter(loader))
    loader.update(torch.ones(8), picks)


# ---- samples and batches that cannot be made


class Bad(Noisy):
    """Of which sample 17 cannot be read."""

    def __getitem__(self, index):
        if index == 17:
            raise KeyError("no such file")
        return super().__getitem__(index)


def notes_of(error):
    return " ".join([str(error), *getattr(error, "__notes__", ())])


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize(
    ("dataset", "index"), [(Bad(N), "17 of the Bad"), (Subset(Bad(N), range(10, 30)), "7 of the Subset")]
)
def test_a_sample_that_cannot_be_read_is_named_by_its_index(make, dataset, index, workers):
    with pytest.raises(KeyError) as caught:
        list(make(dataset, num_workers=workers))
    assert f"sample {index} could not be read" in notes_of(caught.value)
    assert "no such file" in str(caught.value)


def test_a_sample_of_tars_that_cannot_be_decoded_is_named_by_its_index(make, tmp_path):
    write_wds(tmp_path / "wds")

    def fails(sample):
        raise ValueError("not a picture")

    with pytest.raises(ValueError, match="not a picture") as caught:
        next(iter(make(wds(tmp_path / "wds").map(fails), shuffle=False)))
    assert "sample 0 of the IndexedWebDataset" in notes_of(caught.value)


def test_a_sample_of_mds_that_cannot_be_transformed_is_named_by_its_index(make, shards):
    from streaming import StreamingDataset

    class Fails(StreamingDataset):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            if index == 5:
                raise ValueError("not a picture")
            return sample

    with pytest.raises(ValueError, match="not a picture") as caught:
        list(make(Fails(local=str(shards), batch_size=8)))
    assert "sample 5 of the Fails" in notes_of(caught.value)


def test_samples_that_do_not_go_together_are_named(make):
    shapes = [torch.zeros(2)] * 7 + [torch.zeros(3)]
    with pytest.raises(RuntimeError, match="equal size") as caught:
        next(iter(make(shapes, shuffle=False)))
    assert "with the indices 0, 1, 2, 3, 4, 5, 6, 7. Of these, 0 and 7 do not go together" in notes_of(caught.value)


def test_a_collate_fn_that_fails_names_the_samples(make):
    def collate(samples):
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine") as caught:
        next(iter(make(collate_fn=collate, shuffle=False, batch_size=20)))
    assert "20 samples, those with the indices 0, 1, 2" in notes_of(caught.value)
    assert "15, ..." in notes_of(caught.value)


def test_a_dataset_that_reads_many_at_once_must_give_them_all(make):
    class Filters(Noisy):
        def __getitems__(self, indices):
            return [self[index] for index in indices if index % 5]

    with pytest.raises(DataError, match="gave 6 samples for 8 indices"):
        next(iter(make(Filters(N), shuffle=False)))


def test_the_default_collate_is_not_tried(make):
    calls = []

    class Counted(Noisy):
        def __getitem__(self, index):
            calls.append(index)
            return super().__getitem__(index)

    list(make(Counted(16), collate_fn=default_collate))
    assert sorted(calls) == list(range(16))


def test_rows_of_any_type_are_told_apart(make):
    """Of a list of dicts with tensors, of arrays, of bfloat16 and of booleans."""

    def collate(samples):
        return [
            {"tokens": tokens.bfloat16(), "odd": np.array([index % 2 == 1]), "name": (str(index),)}
            for tokens, index in sorted(samples, key=length)
        ]

    with pytest.raises(ConfigError, match="not in the order of its samples"):
        next(iter(make(collate_fn=collate)))
    bits = [torch.rand(2000) > 0.5 for _ in range(N)]
    with pytest.raises(ConfigError, match="not in the order of its samples"):
        next(iter(make(bits, collate_fn=lambda samples: torch.stack(samples[::-1]))))
    assert next(iter(make(bits, existing="overwrite", collate_fn=torch.stack)))
