"""The score store: as Zarr, under kill -9, and with everything that is not a store."""

import errno
import functools
import json
import os
import shutil
import subprocess
import tracemalloc
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import zarr

from infobatch_stream import _files
from infobatch_stream.errors import ConfigError, StoreError
from infobatch_stream.store import layout, mapped_array
from infobatch_stream.store import score_store as store_module
from infobatch_stream.store.header import MAX_EPOCH, MAX_SAMPLES, checksum, read_header, write_header
from infobatch_stream.store.score_store import ScoreStore

CHUNK = 1 << 22
FILLED = np.array([1, 2, np.nan, 4, 5, 6, np.nan, 8, 9, 10], dtype=np.float32)
RECORDED = np.array([np.nan, 20, 30, np.nan, 50, np.nan, np.nan, 80, np.nan, 100], dtype=np.float32)
COMMITTED = np.where(np.isnan(RECORDED), FILLED, RECORDED)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "scores.zarr"


def filled(path, epoch=3):
    """A store of 10 samples in the middle of an epoch."""
    return ScoreStore.create(path, 10, "digits", scores=FILLED, pending=RECORDED, epoch=epoch)


def same(one, two):
    np.testing.assert_array_equal(np.asarray(one), np.asarray(two))


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def contents(folder):
    return {file: file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


# --- what it is for


def test_a_new_store_has_seen_nothing(path):
    store = ScoreStore.create(path, 5, "digits")
    assert (store.path, store.num_samples, store.fingerprint, store.epoch) == (path, 5, "digits", 0)
    same(store.scores, np.full(5, np.nan))
    same(store.pending, np.full(5, np.nan))
    assert "scores.zarr" in repr(store)


def test_losses_become_scores_at_the_commit_and_not_before(path):
    store = ScoreStore.create(path, 4)
    view = store.scores
    assert store.record(np.array([2, 0]), np.array([0.5, 0.25])) == 0
    same(store.scores, [np.nan] * 4)
    same(store.pending, [0.25, np.nan, 0.5, np.nan])
    store.commit()
    assert store.epoch == 1
    same(store.scores, [0.25, np.nan, 0.5, np.nan])
    same(view, store.scores)
    same(store.pending, [np.nan] * 4)


def test_a_sample_without_a_new_loss_keeps_its_score(path):
    store = filled(path)
    store.commit()
    same(store.scores, COMMITTED)
    store.commit()
    same(store.scores, COMMITTED)
    assert store.epoch == 5


def test_a_commit_takes_every_bit_of_what_was_seen_and_leaves_the_rest(path):
    """In blocks of which nothing, all, a part was seen; of scores and losses of every kind that is finite."""
    block, rng = mapped_array._BLOCK, np.random.default_rng(3)
    size = 4 * block + 5
    bits = rng.integers(0, 2**32, (2, size), dtype=np.uint32).view(np.float32)
    old, new = np.where(np.isfinite(bits), bits, np.float32(-0.0))
    old[rng.random(size) < 0.3] = new[:block] = new[2 * block :][rng.random(2 * block + 5) < 0.3] = np.nan
    store = ScoreStore.create(path, size, scores=old, pending=new)
    store.commit()
    expected = np.where(np.isnan(new), old, new)
    seen = ~np.isnan(expected)
    assert seen[block : 2 * block].all()
    assert np.array_equal(np.isnan(store.scores), ~seen)
    same(store.scores[seen].view(np.uint32), expected[seen].view(np.uint32))


def test_pending_losses_can_be_discarded(path):
    store = filled(path)
    store.discard_pending()
    same(store.pending, np.full(10, np.nan))
    same(store.scores, FILLED)
    assert store.epoch == ScoreStore.open(path).epoch == 3


def test_the_last_of_two_losses_of_one_sample_counts(path):
    store = ScoreStore.create(path, 3)
    store.record(np.array([1, 1, 0, 1]), np.array([5.0, 6.0, 1.0, 7.0]))
    same(store.pending, [1, 7, np.nan])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.longdouble, np.int32])
def test_losses_of_any_real_kind_are_recorded_as_float32(path, dtype):
    store = ScoreStore.create(path, 4)
    assert store.record(np.array([3, 1]), np.array([2, 3], dtype=dtype)) == 0
    same(store.pending, [np.nan, 3, np.nan, 2])
    assert store.pending.dtype == np.float32


def test_losses_that_are_not_finite_are_counted_and_not_recorded(path):
    store = ScoreStore.create(path, 6)
    store.record(np.array([0]), np.array([7.0]))
    losses = np.array([np.nan, np.inf, -np.inf, 1e39, -1e300, 3.0])
    assert store.record(np.arange(6), losses) == 5
    same(store.pending, [7, np.nan, np.nan, np.nan, np.nan, 3])
    assert store.record(np.arange(2), np.array([np.inf, 1], dtype=np.float16)) == 1


def test_recording_nothing_does_nothing(path):
    assert ScoreStore.create(path, 3).record(np.empty(0, np.int64), np.empty(0, np.float32)) == 0


# --- on disk


@pytest.mark.parametrize("size", [1, 10, CHUNK, CHUNK + 1, 5_000_000])
def test_plain_zarr_reads_it_whole_and_in_parts(path, size):
    rng = np.random.default_rng(size)
    scores, losses = rng.random(size, dtype=np.float32), rng.random(size, dtype=np.float32)
    store = ScoreStore.create(path, size, "digits", scores=scores)
    seen = rng.permutation(size)[: size // 2 + 1]
    store.record(seen, losses[seen])
    pending = np.full(size, np.nan, np.float32)
    pending[seen] = losses[seen]
    group = zarr.open_group(path, mode="r", zarr_format=3)
    assert group.attrs["infobatch_stream"]["num_samples"] == size
    for name, expected in [("scores", scores), ("pending", pending)]:
        same(getattr(store, name), expected)
        same(group[name][:], expected)
        for start in {0, size // 3, max(0, size - 3), max(0, min(size, CHUNK) - 2)}:
            same(group[name][start : start + 5], expected[start : start + 5])
        assert group[name].metadata.fill_value != group[name].metadata.fill_value


@pytest.mark.parametrize("size", [1, 10, 5_000_000])
def test_every_byte_is_allocated(path, size):
    """A sparse file would end the run by SIGBUS once the disk is full."""
    plain = path.with_name("plain")
    with plain.open("wb") as file:
        file.write(np.full(size, np.nan, np.float32).tobytes())
        os.fsync(file.fileno())
    if plain.stat().st_blocks * 512 < plain.stat().st_size:
        pytest.skip("this file system compresses, or does not tell what it allocates")
    ScoreStore.create(path, size)
    for name in ("scores", "pending"):
        facts = (path / name / "c" / "0").stat()
        assert facts.st_size == layout.file_size(size) >= 4 * size
        assert facts.st_blocks * 512 >= facts.st_size


def test_the_epoch_and_the_fingerprint_outlive_the_process(path):
    filled(path, epoch=6).commit()
    again = ScoreStore.open(path)
    assert (again.epoch, again.fingerprint, again.num_samples) == (7, "digits", 10)
    same(again.scores, COMMITTED)


def test_attributes_of_others_are_kept(path):
    store = filled(path)
    zarr.open_group(path, mode="r+", zarr_format=3).attrs["mine"] = {"note": "run 7"}
    store.commit()
    assert zarr.open_group(path, mode="r", zarr_format=3).attrs["mine"] == {"note": "run 7"}
    assert ScoreStore.open(path).epoch == 4


def test_a_store_may_stand_in_a_new_folder_and_be_named_by_text(tmp_path):
    store = ScoreStore.create(str(tmp_path / "runs" / "7" / "scores.zarr"), 3)
    assert ScoreStore.open(str(store.path)).num_samples == 3
    assert names(tmp_path / "runs" / "7") == ["scores.zarr"]


# --- several processes


def test_processes_that_record_at_once_lose_nothing(path, bare_python):
    """Each of four processes opens the store and records its own samples, interleaved with the others' ones."""
    size = 40_000
    store = ScoreStore.create(path, size)
    code = """
import os
import numpy as np
from infobatch_stream.store.score_store import ScoreStore
path, size = sys.argv[1], int(sys.argv[2])
for rank in range(4):
    if os.fork() == 0:
        store = ScoreStore.open(path)
        own = np.random.default_rng(rank).permutation(np.arange(rank, size, 4))
        for batch in np.array_split(own, 200):
            store.record(batch, batch.astype(np.float32) + 0.5)
        os._exit(0)
for _ in range(4):
    assert os.wait()[1] == 0
"""
    bare_python(code, path, size)
    same(store.pending, np.arange(size, dtype=np.float32) + 0.5)
    store.commit()
    same(store.scores, np.arange(size, dtype=np.float32) + 0.5)


def test_another_handle_sees_a_commit_once_refreshed(path):
    one, two = filled(path), ScoreStore.open(path)
    one.commit()
    assert two.epoch == 3
    two.refresh()
    assert two.epoch == 4
    same(two.scores, COMMITTED)
    two.commit()
    assert two.epoch == 5


def test_two_runs_on_one_store_are_told_apart(path):
    one, two = filled(path), ScoreStore.open(path)
    one.commit()
    with pytest.raises(StoreError, match=r"stands at epoch 4 \(ready\), not at epoch 3.*another run.*its own"):
        two.commit()
    same(one.scores, COMMITTED)


# --- killed


# Kills a copy of a store at every line (or every few) of a commit, or of an open that repairs. The copies stay.
KILL_EVERYWHERE = """
import os, shutil, signal
import infobatch_stream.store.score_store as module
from infobatch_stream import _files
from infobatch_stream.store import header, layout, mapped_array
action, template, folder, stride = sys.argv[1:]
mapped_array._BLOCK = 4
files = [module.__file__, layout.__file__, header.__file__, mapped_array.__file__, _files.__file__]
reads = {"_check_depth", "_once", "_whole", "_found_array", "_expected_array", "<listcomp>", "<dictcomp>", "<genexpr>"}
number = 0
while True:
    path = os.path.join(folder, str(number))
    shutil.copytree(template, path)
    child = os.fork()
    if child == 0:
        left = number
        def trace(frame, event, argument):
            global left
            if frame.f_code.co_filename not in files or frame.f_code.co_name in reads:
                return None
            if event == "line":
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
            return trace
        act = module.ScoreStore.open(path).commit if action == "commit" else lambda: module.ScoreStore.open(path)
        sys.settrace(trace)
        act()
        sys.settrace(None)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if status == 0:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL
    number += int(stride)
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory, bare_python):
    """Copies of `filled`, each killed at another line of its commit; and the last, which was not killed."""
    folder = tmp_path_factory.mktemp("killed")
    filled(folder / "template")
    (folder / "copies").mkdir()
    bare_python(KILL_EVERYWHERE, "commit", folder / "template", folder / "copies", 1)
    return sorted((folder / "copies").iterdir(), key=lambda copy: int(copy.name))


def assert_before_or_after(path):
    """-> which of the two: `filled` at epoch 3 as it was, or committed at epoch 4."""
    store = ScoreStore.open(path)
    assert store.epoch in (3, 4)
    same(store.scores, FILLED if store.epoch == 3 else COMMITTED)
    same(store.pending, RECORDED if store.epoch == 3 else np.full(10, np.nan))
    assert read_header(path).state == "ready"
    return store.epoch


def copy_of(store, folder):
    return Path(shutil.copytree(store, folder / store.name))


def test_a_commit_killed_anywhere_leaves_the_epoch_before_or_after(killed, tmp_path):
    assert len(killed) > 50
    states = {read_header(store).state for store in killed}
    assert states == {"ready", "apply", "reset"}
    epochs = [assert_before_or_after(copy_of(store, tmp_path)) for store in killed]
    assert epochs == sorted(epochs)
    assert set(epochs) == {3, 4}


def test_a_store_killed_in_its_commit_goes_on(killed, tmp_path):
    for store in killed[::7]:
        again = ScoreStore.open(copy_of(store, tmp_path))
        before, epoch = np.array(again.scores), again.epoch
        pending = np.array(again.pending)
        again.commit()
        assert again.epoch == epoch + 1
        same(again.scores, np.where(np.isnan(pending), before, pending))


@pytest.mark.parametrize("state", ["apply", "reset"])
def test_a_repair_killed_anywhere_is_repeated(killed, tmp_path, bare_python, state):
    begun = [store for store in killed if read_header(store).state == state]
    bare_python(KILL_EVERYWHERE, "open", begun[len(begun) // 2], tmp_path, 7)
    copies = sorted(tmp_path.iterdir())
    assert len(copies) > 20
    assert {assert_before_or_after(copy) for copy in copies} == {4}


def test_opening_for_reading_shows_a_cut_off_commit_as_finished(killed):
    for path in killed:
        store, state = ScoreStore.open(path, "r"), read_header(path).state
        assert store.epoch in (3, 4)
        assert state != "apply" or store.epoch == 4
        same(store.scores, FILLED if store.epoch == 3 else COMMITTED)
        same(store.pending, RECORDED if store.epoch == 3 else np.full(10, np.nan))


def test_a_store_moved_aside_by_a_replacement_that_was_killed_is_put_back(path):
    filled(path)
    aside = path.with_name(".scores.zarr.old-1234567a")
    path.rename(aside)
    holder = _files.hold(aside)  # as the replacing process does while it lives
    with pytest.raises(StoreError, match="No such file"):
        ScoreStore.open(path)
    os.close(holder)
    same(ScoreStore.open(path).scores, FILLED)
    assert names(path.parent) == ["scores.zarr"]


def test_opening_for_reading_repairs_nothing(killed):
    for store in killed[::10]:
        before = contents(store)
        same(ScoreStore.open(store, "r").num_samples, 10)
        assert contents(store) == before


def test_a_killed_commit_leaves_no_temporary_file_once_the_store_was_opened(killed, tmp_path):
    for store in killed:
        again = ScoreStore.open(copy_of(store, tmp_path))
        assert names(again.path) == ["pending", "scores", "zarr.json"]


def test_each_step_of_a_commit_is_on_the_disk_before_the_next_begins(path, monkeypatch):
    """A machine that goes down must not find the header ahead of the data."""
    events = []
    store = filled(path)
    flush, fsync, replace, write = np.memmap.flush, os.fsync, Path.replace, write_header
    monkeypatch.setattr(np.memmap, "flush", lambda map: (events.append(Path(map.filename).parts[-3]), flush(map))[1])
    monkeypatch.setattr(os, "fsync", lambda file: (events.append("fsync"), fsync(file))[1])
    monkeypatch.setattr(Path, "replace", lambda *at: (events.append("rename"), replace(*at))[1])
    monkeypatch.setattr(store_module, "write_header", lambda at, new: (events.append(new.state), write(at, new))[1])
    store.commit()
    header = ["fsync", "rename", "fsync"]
    assert events == ["pending", "apply", *header, "scores", "reset", *header, "pending", "ready", *header]


# --- a path that is taken, a disk that is full


def put_file(path):
    path.write_text("mine")


def put_folder(path):
    path.mkdir()
    (path / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {"mine": 1}}')


def put_empty_folder(path):
    path.mkdir()


foreign = pytest.mark.parametrize("put", [put_file, put_folder, put_empty_folder])


@pytest.mark.parametrize("put", [put_file, put_folder, put_empty_folder, filled])
def test_an_existing_path_is_refused_and_left_alone(path, put):
    put(path)
    before = contents(path.parent)
    with pytest.raises(StoreError, match=r"exists.*ScoreStore\.open"):
        ScoreStore.create(path, 5)
    assert contents(path.parent) == before
    assert names(path.parent) == [path.name]


@foreign
def test_only_a_store_is_replaced(path, put):
    put(path)
    before = contents(path.parent)
    with pytest.raises(StoreError, match="is not a score store"):
        ScoreStore.create(path, 5, replace=True)
    assert contents(path.parent) == before
    assert names(path.parent) == [path.name]


def test_replacing_a_store_leaves_one_store_and_detaches_who_had_the_old_one_open(path):
    old = filled(path, epoch=0)
    new = ScoreStore.create(path, 10, "other", replace=True)
    assert names(path.parent) == [path.name]
    assert (new.num_samples, new.fingerprint) == (10, "other")
    same(new.scores, np.full(10, np.nan))
    for act in (old.commit, old.refresh):
        with pytest.raises(StoreError, match="replaced by another program"):
            act()


def test_a_replacement_that_cannot_be_moved_into_place_leaves_the_old_store(path, monkeypatch):
    filled(path)
    rename = Path.rename

    def faulty(self, target):
        if ".new-" in self.name:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", faulty)
    with pytest.raises(StoreError, match="Input/output error"):
        ScoreStore.create(path, 5, "other", replace=True)
    assert names(path.parent) == [path.name]
    same(ScoreStore.open(path).scores, FILLED)


def test_a_store_that_appears_meanwhile_is_not_replaced(path, monkeypatch):
    """Two runs that create the same store at once: one of them is told."""
    write_new = layout.write_new

    def slow(*arguments):
        write_new(*arguments)
        monkeypatch.setattr(layout, "write_new", write_new)
        filled(path)

    monkeypatch.setattr(layout, "write_new", slow)
    with pytest.raises(StoreError, match="exists"):
        ScoreStore.create(path, 10, "late")
    assert ScoreStore.open(path).fingerprint == "digits"


@pytest.mark.parametrize("replace", [False, True])
def test_a_symbolic_link_leaves_nothing_behind(path, replace):
    if replace:
        filled(path.with_name("real"))
    path.symlink_to("real")
    try:
        ScoreStore.create(path, 5, replace=replace)
    except StoreError:
        pass
    else:
        assert ScoreStore.open(path).num_samples == 5
    assert set(names(path.parent)) <= {path.name, "real"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_samples": 0},
        {"num_samples": -3},
        {"num_samples": 2.5},
        {"epoch": -1},
        {"epoch": 2**48},
        {"fingerprint": None},
        {"scores": np.zeros(9, np.float32)},
        {"scores": np.zeros((10, 1), np.float32)},
        {"pending": np.zeros(10, np.float64)},
    ],
    ids=str,
)
def test_impossible_arguments_make_nothing(path, wrong):
    with pytest.raises(ConfigError) as caught:
        ScoreStore.create(path, **{"num_samples": 10, **wrong})
    (value,) = wrong.values()
    found = str(value.dtype) if isinstance(value, np.ndarray) else str(value)
    assert found in str(caught.value)
    assert names(path.parent) == []


def test_a_number_of_samples_may_be_a_numpy_integer(path):
    assert ScoreStore.create(path, np.int64(10), epoch=np.int64(2)).num_samples == 10
    assert ScoreStore.open(path).epoch == 2


def test_a_name_that_no_disk_takes_is_a_store_error(tmp_path):
    with pytest.raises(StoreError, match="too long"):
        ScoreStore.create(tmp_path / ("x" * 300), 5)


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a file system of so many KiB; -> its folder."""
    mounted = []

    def mount(size):
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(folder)]
        if os.geteuid() or shutil.which("mount") is None:
            pytest.skip("only root can mount a small disk")
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("mounting is not permitted here")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("size", [1024, 6000], ids=["too small for scores", "too small for pending"])
def test_a_full_disk_makes_nothing(small_disk, size):
    disk = small_disk(size)
    with pytest.raises(StoreError, match=r"cannot create.*No space left.*needs 8,000,040 bytes"):
        ScoreStore.create(disk / "scores.zarr", 1_000_000)
    assert names(disk) == []
    assert ScoreStore.create(disk / "scores.zarr", 1000).num_samples == 1000


def test_a_failed_replacement_leaves_the_store_that_was_there(small_disk):
    disk = small_disk(1024)
    filled(disk / "scores.zarr")
    with pytest.raises(StoreError, match="No space left"):
        ScoreStore.create(disk / "scores.zarr", 1_000_000, replace=True)
    assert names(disk) == ["scores.zarr"]
    same(ScoreStore.open(disk / "scores.zarr").scores, FILLED)


def test_a_commit_on_a_full_disk_says_so_and_can_be_repeated(small_disk):
    disk = small_disk(512)
    store = filled(disk / "scores.zarr")
    with pytest.raises(OSError, match="No space left"), (disk / "other").open("wb", buffering=0) as other:
        while True:
            other.write(bytes(4096))
    with pytest.raises(StoreError, match="No space left"):
        store.commit()
    assert names(store.path) == ["pending", "scores", "zarr.json"]
    (disk / "other").unlink()
    store.commit()
    assert store.epoch == 4
    same(store.scores, COMMITTED)


def test_a_commit_whose_disk_fills_up_half_way_can_be_repeated(path, monkeypatch):
    store = filled(path)
    write = write_header

    def full(at, header):
        if header.state == "reset":
            raise OSError(28, "No space left on device")
        write(at, header)

    with monkeypatch.context() as patched:
        patched.setattr(store_module, "write_header", full)
        with pytest.raises((StoreError, OSError), match="No space left"):
            store.commit()
    store.commit()
    assert store.epoch == 4
    same(store.scores, COMMITTED)


@pytest.fixture
def read_only(small_disk, tmp_path):
    """Makes the folder that holds a store one that cannot be written; -> the store's path."""

    def make(fill):
        if os.geteuid():
            folder = tmp_path / "folder"
            folder.mkdir()
            fill(folder / "scores.zarr")
            for file in [*folder.rglob("*"), folder]:
                file.chmod(0o500 if file.is_dir() else 0o400)
        else:
            folder = small_disk(1024)
            fill(folder / "scores.zarr")
            subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        return folder / "scores.zarr"

    return make


def test_a_parent_that_cannot_be_written_makes_nothing(read_only):
    path = read_only(lambda path: None)
    with pytest.raises(StoreError, match=r"cannot create.*(Read-only|Permission denied).*can be written"):
        ScoreStore.create(path, 10)
    with pytest.raises(StoreError, match="cannot create"):
        ScoreStore.create(path / "deeper" / "scores.zarr", 10)
    assert names(path.parent) == []


def test_a_store_that_cannot_be_written_is_read(read_only):
    path = read_only(filled)
    same(ScoreStore.open(path, "r").scores, FILLED)
    with pytest.raises(StoreError, match=r"Read-only|Permission denied"):
        ScoreStore.open(path)


# --- what is not a store


def edit(path, file, change):
    """Rewrites a JSON file of a store by ``change``, a function of what it holds."""
    found = json.loads((path / file).read_text())
    (path / file).write_text(json.dumps(change(found) or found))


def header_of(group):
    return group["attributes"]["infobatch_stream"]


def header(**changes):
    """Changes the header, and its checksum to suit: by a program, not by a disk."""

    def change(group):
        fields = header_of(group)
        fields.update(changes)
        fields["checksum"] = checksum(fields)

    return lambda path: edit(path, "zarr.json", change)


def flip(**changes):
    """Changes the header and not its checksum."""
    return lambda path: edit(path, "zarr.json", lambda group: header_of(group).update(changes))


def without_checksum(group):
    del header_of(group)["checksum"]


def as_format_1(group):
    without_checksum(group)
    header_of(group)["format"] = 1


def header_text(old, new):
    def damage(path):
        text = (path / "zarr.json").read_text()
        assert old in text
        (path / "zarr.json").write_text(text.replace(old, new))

    return damage


def claim(samples):
    """A store of 10 samples whose metadata all agree on another number."""

    def damage(path):
        header(num_samples=samples)(path)
        size = min(samples, CHUNK)
        for name in ("scores", "pending"):
            edit(path, f"{name}/zarr.json", lambda found: found.update(shape=[samples]))
            edit(path, f"{name}/zarr.json", lambda found: sharding(found).update(chunk_shape=[size]))
            grid = {"name": "regular", "configuration": {"chunk_shape": [-(-samples // size) * size]}}
            edit(path, f"{name}/zarr.json", lambda found: found.update(chunk_grid=grid))  # noqa: B023

    return damage


def instead(file, put):
    def damage(path):
        (path / file).unlink()
        put(path / file)

    return damage


CHANGED = ["does not have the checksum", "a byte was changed on disk", "load_state_dict", "existing='overwrite'"]


def array(change, name="scores"):
    return lambda path: edit(path, f"{name}/zarr.json", change)


def put(file, data):
    return lambda path: (path / file).write_bytes(data)


def resize(change, name="scores"):
    def damage(path):
        file = path / name / "c" / "0"
        os.truncate(file, file.stat().st_size + change)

    return damage


def sharding(found):
    return found["codecs"][0]["configuration"]


def break_shard_index(path):
    with (path / "pending" / "c" / "0").open("r+b") as file:
        file.seek(-7, os.SEEK_END)
        file.write(b"\x01")


def rewrite_as_fill_values(path):
    zarr.open_group(path, mode="r+", zarr_format=3)["pending"][:] = np.nan


DAMAGE = {
    "truncated": (resize(-1), ["scores/c/0 was truncated", "59 bytes", "10 samples take 60", "overwrite"]),
    "emptied": (resize(-60), ["truncated", "0 bytes"]),
    "extended": (resize(5, "pending"), ["pending/c/0 was extended", "65 bytes"]),
    "shard gone": (lambda path: (path / "pending/c/0").unlink(), ["pending/c/0", "No such file"]),
    "array gone": (lambda path: shutil.rmtree(path / "pending"), ["pending/zarr.json"]),
    "array metadata gone": (lambda path: (path / "scores/zarr.json").unlink(), ["scores/zarr.json"]),
    "group metadata gone": (lambda path: (path / "zarr.json").unlink(), ["not a score store", "InfoBatchLoader"]),
    "shard index broken": (break_shard_index, ["pending/c/0", "shard index", "another program"]),
    "only fill values written": (rewrite_as_fill_values, ["pending/c/0"]),
    "cut JSON": (put("zarr.json", b'{"attributes": {'), ["not a score store", "zarr.json cannot be read"]),
    "no text": (put("zarr.json", b"\xff\xfe\x00"), ["not a score store", "zarr.json cannot be read"]),
    "empty JSON file": (put("zarr.json", b""), ["not a score store"]),
    "no object": (put("zarr.json", b"[1, 2]"), ["holds no JSON object"]),
    "deep JSON": (put("zarr.json", b"[" * 200_000), ["not a score store"]),
    "large number": (put("zarr.json", b'{"attributes": ' + b"9" * 5000 + b"}"), ["not a score store"]),
    "huge JSON": (put("zarr.json", b" " * (2 << 20) + b"{}"), ["larger than 1,048,576 bytes"]),
    "huge array metadata": (put("scores/zarr.json", b" " * (2 << 20) + b"{}"), ["larger than 1,048,576 bytes"]),
    "another Zarr group": (put("zarr.json", b'{"attributes": {"mine": 1}}'), ["'infobatch_stream'"]),
    "no attributes": (put("zarr.json", b"{}"), ["'infobatch_stream'"]),
    "attributes a list": (put("zarr.json", b'{"attributes": [1]}'), ["'infobatch_stream'"]),
    "newer format": (header(format=3), ["format 3", "reads formats 1 to 2", "Install"]),
    "no format": (header(format=None), ["format None"]),
    "format true": (header(format=True), ["format True"]),
    "format 2.0": (header(format=2.0), ["format 2.0"]),
    "epoch flipped": (flip(epoch=2), CHANGED),
    "size flipped": (flip(num_samples=11), CHANGED),
    "fingerprint flipped": (flip(fingerprint="dibits"), CHANGED),
    "state flipped": (flip(state="apply"), CHANGED),
    "format flipped": (flip(format=1), CHANGED),
    "another field flipped": (flip(fresh=1), CHANGED),
    "checksum flipped": (flip(checksum=1), CHANGED),
    "checksum true": (flip(checksum=True), CHANGED),
    "checksum gone": (lambda path: edit(path, "zarr.json", without_checksum), CHANGED),
    "format 1 and out of range": (
        lambda path: (edit(path, "zarr.json", as_format_1), flip(epoch=-1)(path)),
        ["epoch -1", "out of range"],
    ),
    "a field twice": (header_text('"epoch": 3', '"epoch": 3, "epoch": 4'), ["a key occurs twice"]),
    "epoch NaN": (flip(epoch=float("nan")), CHANGED),
    "epoch NaN, format 1": (
        lambda path: (edit(path, "zarr.json", as_format_1), flip(epoch=float("nan"))(path)),
        ["'epoch'", "nan"],
    ),
    "epoch of 100,000 digits": (header_text('"epoch": 3', f'"epoch": {"1" * 10**5}'), ["a number of 100,000 digits"]),
    "epoch of 900 digits": (header(epoch=10**900), ["epoch 1000", "...", "out of range"]),
    "epoch past 48 bits": (header(epoch=MAX_EPOCH + 1), ["epoch", "out of range"]),
    "nested JSON": (header_text('"digits"', "[" * 500 + "]" * 500), ["nested deeper than 64"]),
    "metadata a folder": (instead("zarr.json", Path.mkdir), ["not a regular file"]),
    "metadata a pipe": (instead("zarr.json", os.mkfifo), ["not a regular file"]),
    "array metadata a pipe": (instead("pending/zarr.json", os.mkfifo), ["not a regular file"]),
    "shard a pipe": (instead("pending/c/0", os.mkfifo), ["pending/c/0", "not a regular file"]),
    "shard a folder": (instead("scores/c/0", Path.mkdir), ["scores/c/0", "not a regular file"]),
    "shard a device": (
        instead("scores/c/0", lambda file: file.symlink_to("/dev/zero")),
        ["scores/c/0", "a symbolic link"],
    ),
    "shard with two names": (
        lambda path: (path / "copy").hardlink_to(path / "scores/c/0"),
        ["scores/c/0 has 2 names", "hard links", "cp "],
    ),
    "shape true": (array(lambda a: a.update(shape=[10.0])), ["shape", "[10.0]"]),
    "a large shape": (array(lambda a: a.update(shape=[1] * 10**5)), ["shape", "..."]),
    "size a text": (header(num_samples="10"), ["'num_samples'", "'10'", "int"]),
    "size true": (header(num_samples=True), ["'num_samples'", "True"]),
    "size 0": (header(num_samples=0), ["num_samples 0", "out of range"]),
    "another size": (header(num_samples=11), ["shape", "[10]", "[11]"]),
    "absurd size": (claim(2**62), ["num_samples 4611686018427387904", "out of range"]),
    "large size": (claim(MAX_SAMPLES), ["truncated", "60 bytes", "take 4,398,050,705,412"]),
    "epoch below 0": (header(epoch=-1), ["out of range", "-1"]),
    "epoch a float": (header(epoch=1.5), ["'epoch'", "1.5"]),
    "unknown state": (header(state="half"), ["out of range", "half"]),
    "fingerprint a list": (header(fingerprint=[]), ["'fingerprint'", "[]"]),
    "another dtype": (array(lambda a: a.update(data_type="float64")), ["data_type", "float64", "float32"]),
    "another shape": (array(lambda a: a.update(shape=[5, 2])), ["shape", "[5, 2]"]),
    "chunked otherwise": (array(lambda a: sharding(a).update(chunk_shape=[5])), ["codec", "[5]"]),
    "compressed": (array(lambda a: sharding(a)["codecs"].append({"name": "zstd"})), ["codec", "zstd"]),
    "big endian": (
        array(lambda a: sharding(a)["codecs"][0]["configuration"].update(endian="big")),
        ["endian", "big"],
    ),
    "index in front": (array(lambda a: sharding(a).update(index_location="start")), ["codec", "start"]),
    "no shards": (array(lambda a: a.update(codecs=[{"name": "bytes"}])), ["scores", "metadata"]),
    "no codecs": (array(lambda a: a.pop("codecs") and a, "pending"), ["pending", "codecs"]),
    "codecs a number": (array(lambda a: a.update(codecs=3)), ["scores", "metadata"]),
    "keys a text": (array(lambda a: a.update(chunk_key_encoding="default")), ["scores", "metadata"]),
    "other separator": (
        array(lambda a: a["chunk_key_encoding"].update(configuration={"separator": "."})),
        ["chunk_key", "'.'"],
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
@pytest.mark.parametrize("mode", ["r", "r+"])
def test_a_damaged_store_is_refused_with_what_was_found(path, name, mode):
    damage, words = DAMAGE[name]
    filled(path)
    damage(path)
    before = contents(path)
    with pytest.raises(StoreError) as caught:
        ScoreStore.open(path, mode)
    assert [word for word in [str(path), *words] if word not in str(caught.value)] == []
    assert contents(path) == before


def test_a_damaged_array_metadata_is_refused_or_read_as_it_was_whichever_bit_was_flipped(path):
    filled(path)
    file = path / "scores" / "zarr.json"
    whole = file.read_bytes()
    refused = 0
    for damaged in flipped(whole, bits=(0, 5)):
        file.write_bytes(damaged)
        with suppress(StoreError):
            layout.check_files(path, 10)
            continue
        refused += 1
    assert refused > len(whole) / 2  # what readers do not depend on is not compared


def flipped(whole, bits=range(8)):
    for place in range(len(whole)):
        for bit in bits:
            yield whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :]


def test_no_flipped_bit_of_the_header_is_believed(path):
    filled(path)
    expected = read_header(path)
    whole = (path / "zarr.json").read_bytes()
    refused = 0
    for damaged in flipped(whole):
        (path / "zarr.json").write_bytes(damaged)
        try:
            assert read_header(path) == expected
        except StoreError:
            refused += 1
    assert refused > 4 * len(whole)  # the others are in blanks, and in words that mean nothing to us


def test_a_store_of_format_1_is_read_and_becomes_format_2_at_its_next_commit(path):
    filled(path)
    edit(path, "zarr.json", as_format_1)
    same(ScoreStore.open(path, "r").scores, FILLED)
    store = ScoreStore.open(path)
    assert header_of(json.loads((path / "zarr.json").read_text()))["format"] == 1
    store.commit()
    fields = header_of(json.loads((path / "zarr.json").read_text()))
    assert fields == {
        "format": 2,
        "num_samples": 10,
        "fingerprint": "digits",
        "epoch": 4,
        "state": "ready",
        "checksum": checksum(fields),
    }
    same(ScoreStore.open(path).scores, COMMITTED)


def test_a_store_whose_header_is_damaged_can_be_replaced(path):
    """As the error says; what is no store, or of a newer format, cannot."""
    filled(path)
    flip(epoch=7)(path)
    with pytest.raises(StoreError, match="existing='overwrite'"):
        ScoreStore.open(path)
    assert ScoreStore.create(path, 5, replace=True).epoch == 0
    header(format=3)(path)
    with pytest.raises(StoreError, match="format 3"):
        ScoreStore.create(path, 5, replace=True)


def test_damage_is_found_in_little_memory(path):
    """Before a size that a file only claims is held in memory."""
    filled(path)
    claim(MAX_SAMPLES)(path)
    tracemalloc.start()
    with pytest.raises(StoreError, match="truncated"):
        ScoreStore.open(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 << 20


def test_a_fingerprint_that_no_header_holds_makes_nothing(path):
    with pytest.raises(ConfigError, match=r"fingerprint 'xxx.*out of range"):
        ScoreStore.create(path, 10, "x" * 70_000)
    assert names(path.parent) == []


@pytest.mark.parametrize("mode", ["r", "r+"])
@foreign
def test_what_is_not_a_store_is_refused(path, put, mode):
    put(path)
    with pytest.raises(StoreError, match=r"is not a score store.*InfoBatchLoader"):
        ScoreStore.open(path, mode)


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_a_missing_store_is_refused_and_not_made(path, mode):
    with pytest.raises(StoreError, match=r"is not a score store.*No such file.*InfoBatchLoader"):
        ScoreStore.open(path, mode)
    assert not path.exists()


@pytest.mark.parametrize("mode", ["w+", "c", "a", "rb", "readonly"])
def test_an_unknown_mode_is_refused_and_harms_nothing(path, mode):
    filled(path)
    before = contents(path)
    with pytest.raises(ConfigError, match=f"{mode}"):
        ScoreStore.open(path, mode)
    assert contents(path) == before


# --- files that change under the map


@pytest.mark.parametrize("name", ["scores", "pending"])
@pytest.mark.parametrize("act", ["commit", "refresh"])
def test_a_store_rewritten_by_plain_zarr_while_it_is_in_use_is_told(path, name, act):
    store = filled(path)
    zarr.open_group(path, mode="r+", zarr_format=3)[name][:] = 0
    with pytest.raises(StoreError, match=r"replaced by another program.*Do not write"):
        getattr(store, act)()
    assert ScoreStore.open(path).epoch == 3


@pytest.mark.parametrize("act", ["commit", "refresh"])
@pytest.mark.parametrize("gone", ["", "scores/c/0"])
def test_a_store_removed_while_it_is_in_use_is_told(path, act, gone):
    store = filled(path)
    shutil.rmtree(path) if not gone else (path / gone).unlink()
    with pytest.raises(StoreError, match=r"No such file|cut or removed"):
        getattr(store, act)()


@pytest.mark.parametrize("array", ["scores", "pending"])
@pytest.mark.parametrize(
    "change",
    [
        lambda file: os.truncate(file, 30),
        lambda file: os.truncate(file, 100),
        lambda file: Path(shutil.copy(file, f"{file}.new")).replace(file),
    ],
    ids=["truncated", "extended", "replaced"],
)
def test_a_file_that_changed_under_its_map_has_another_identity(path, array, change):
    filled(path)
    other = "scores" if array == "pending" else "pending"
    before, of_other = layout.identity(path, array), layout.identity(path, other)
    assert layout.identity(path, array) == before
    change(path / array / "c" / "0")
    assert layout.identity(path, array) != before
    assert layout.identity(path, other) == of_other


def test_a_file_that_is_gone_has_no_identity(path):
    filled(path)
    (path / "pending" / "c" / "0").unlink()
    with pytest.raises(StoreError, match=r"pending/c/0 is gone"):
        layout.identity(path, "pending")
    assert layout.identity(path, "scores")


# --- what may not be recorded


@pytest.mark.parametrize(
    ("index", "loss", "words"),
    [
        ([0, 10], [1.0, 2.0], ["from 0 to 10", "0 to 9"]),
        ([-1, 3], [1.0, 2.0], ["from -1 to 3", "0 to 9"]),
        ([2**40], [1.0], [str(2**40), "0 to 9"]),
        (np.array([1, 2], np.int32), [1.0, 2.0], ["index int64[k]", "int32[2]"]),
        (np.array([1, 2], np.uint64), [1.0, 2.0], ["uint64[2]"]),
        (np.array([1.0, 2.0]), [1.0, 2.0], ["float64[2]"]),
        (np.array([True, False]), [1.0, 2.0], ["bool[2]"]),
        ([1, 2], [1.0], ["int64[2]", "float32[1]"]),
        ([1], [1.0, 2.0], ["int64[1]", "float32[2]"]),
        ([1, 2], 1.0, ["int64[2]", "float32[]"]),
        ([[1], [2]], [[1.0], [2.0]], ["int64[2, 1]"]),
        ([1], ["high"], ["loss"]),
        ([1], [1j], ["complex"]),
    ],
)
def test_a_wrong_record_changes_nothing(path, index, loss, words):
    store = filled(path)
    with pytest.raises(ConfigError) as caught:
        store.record(np.asarray(index), np.asarray(loss))
    assert [word for word in words if word not in str(caught.value)] == []
    same(store.pending, RECORDED)


def test_a_store_opened_for_reading_is_not_changed(path):
    filled(path)
    before = contents(path)
    store = ScoreStore.open(path, "r")
    for act in (
        functools.partial(store.record, np.array([1]), np.array([1.0])),
        store.commit,
        store.discard_pending,
    ):
        with pytest.raises(StoreError, match=r"opened for reading.*mode='r\+'"):
            act()
    store.refresh()
    assert contents(path) == before


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_the_views_cannot_be_written(path, mode):
    filled(path)
    store = ScoreStore.open(path, mode)
    for view in (store.scores, store.pending):
        assert type(view) is np.ndarray
        with pytest.raises(ValueError, match="read-only"):
            view[0] = 1
    same(store.scores, FILLED)
    same(store.pending, RECORDED)


def test_what_is_called_nearly_like_a_leftover_is_not_removed(path):
    called = ("old-backup", "new-2026", "rank-list", "old-1234567a.bak", "old-20260131", "new-20260131120000")
    mine = [path.with_name(f".scores.zarr.{name}") for name in called]
    left = path.with_name(f".scores.zarr.new-{_files.mark()}")
    for folder in (*mine, left):
        folder.mkdir()
    filled(path)
    assert not left.exists()
    assert all(folder.is_dir() for folder in mine)
