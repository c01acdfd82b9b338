"""Disks that are full or read-only, and stores that are damaged while nobody has them open, and while a run has."""

import errno
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from support.ddp import victims
from support.ddp.children import Child
from support.ddp.victims import N, finish, loader_of, losses, train

from infobatch_stream import BudgetPruning, QuantilePruning, ScoreStore, SoftPruning, StoreError
from infobatch_stream.store import header, layout, score_store

ROOT = os.geteuid() == 0
SIZE = 40_000  # whose arrays take 40 pages: a map of a file that was cut ends the process where there is none


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def pending_of(path):
    return np.array(ScoreStore.open(path, "r").pending)


# ---- small and read-only disks


@pytest.fixture
def mount(tmp_path):
    """Run mount with these options for a folder, which is new unless it is given; -> the folder."""
    if not ROOT:
        pytest.skip("only root can mount; see test_the_same_as_root_of_a_namespace")
    mounted = []

    def mount(*options, folder=None):
        folder = folder or tmp_path / f"disk{len(mounted)}"
        folder.mkdir(exist_ok=True)
        done = subprocess.run(["mount", *options, folder], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"mounting is not permitted here: {done.stderr}")
        if "remount" not in str(options[1]):
            mounted.append(folder)
        return folder

    yield mount
    for folder in reversed(mounted):
        subprocess.run(["umount", "-l", folder], check=False, capture_output=True)


@pytest.fixture
def small_disk(mount):
    return lambda size="256k": mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs")


@pytest.mark.skipif(ROOT, reason="root mounts without one")
def test_the_same_as_root_of_a_namespace():
    root = ["unshare", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*root, "true"], check=False).returncode:
        pytest.skip("namespaces are not permitted here")
    tests = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "full_disk or a_disk or be_written",
        __file__,
    ]
    done = subprocess.run([*root, *tests], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout


def fill(disk):
    """Write until the disk is full."""
    with (disk / "filling").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(bytes(4096))


def no_history():
    """It is only a warning that there is none."""
    return pytest.warns(RuntimeWarning, match="the history of epoch 0 could not be written")


def test_a_full_disk_at_creation_is_told_with_the_bytes_needed_and_leaves_nothing(small_disk):
    disk = small_disk("512k")
    loader = loader_of(disk / "new" / "scores.zarr", 100_000)
    needed = f"{2 * layout.file_size(100_000):,}"
    with pytest.raises(StoreError, match=rf"cannot create the score store .*: No space left on device\. .*{needed} b"):
        iter(loader)
    assert names(disk) == ["new"]
    assert names(disk / "new") == []
    finish(loader_of(disk / "new" / "scores.zarr"))  # a smaller one fits


@pytest.mark.parametrize("at", ["scores", "pending", "metadata"])
def test_a_quota_that_ends_half_way_leaves_nothing(tmp_path, monkeypatch, at):
    def over(*_, **__):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    write = layout._write_shard
    if at == "metadata":
        monkeypatch.setattr(layout, "sync", over)
    else:
        monkeypatch.setattr(
            layout, "_write_shard", lambda file, *rest: (over if at in str(file) else write)(file, *rest)
        )
    with pytest.raises(StoreError, match=r"cannot create.*[Qq]uota exceeded.*needs 360 bytes"):
        iter(loader_of(tmp_path / "scores.zarr"))
    assert names(tmp_path) == []


def test_on_a_disk_that_fills_up_during_the_run_recording_goes_on_and_only_the_commit_waits(small_disk, tmp_path):
    disk, checkpoint = small_disk(), tmp_path / "state.pt"
    path = disk / "scores.zarr"
    with Child(victims.meet_a_full_disk, path, checkpoint) as run:
        assert run.hears() == "ready"
        fill(disk)
        run.tell()
        errors, epoch = run.result()
    for error, text, _ in errors:
        assert error == "StoreError"
        assert "could not be committed (No space left on device). Nothing is lost" in text
    assert epoch == 0
    assert np.array_equal(pending_of(path), losses(0))

    # Another process finds the disk still full, then not.
    with Child(victims.go_on, path, {"epochs": 1}) as other:
        kind, (error, text, _) = other.hears()
        assert (kind, error) == ("raised", "StoreError")
        assert "No space left on device" in text
    (disk / "filling").unlink()
    with Child(victims.go_on, path, {}) as other:
        assert other.result() == (0, N)
    assert ScoreStore.open(path).epoch == 5

    resumed = loader_of(path)
    resumed.load_state_dict(torch.load(checkpoint))
    assert (resumed.epoch, resumed.step) == (1, 0)
    assert np.array_equal(resumed.store.scores, losses(0))


def test_after_a_full_disk_the_same_loader_commits_and_goes_on(small_disk, tmp_path):
    disk = small_disk()
    loader = loader_of(disk / "scores.zarr")
    train(loader)
    fill(disk)
    with pytest.raises(StoreError, match="No space left"), no_history():
        iter(loader)
    (disk / "filling").unlink()
    loader.commit()
    finish(loader)
    undisturbed = loader_of(tmp_path / "scores.zarr")
    finish(undisturbed)
    assert np.array_equal(loader.store.scores, undisturbed.store.scores)


def test_a_commit_that_a_full_disk_stopped_half_way_is_told_on_opening_too(tmp_path, monkeypatch):
    loader = loader_of(tmp_path / "scores.zarr")
    train(loader)
    write = header.write_header

    def full(path, header):
        if header.state == "reset":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, header)

    with monkeypatch.context() as patched:
        patched.setattr(score_store, "write_header", full)
        with pytest.raises(StoreError, match="No space left"):
            loader.commit()
        del loader
        with pytest.raises(StoreError, match=r"could not be committed \(No space left on device\)\. Nothing is lost"):
            loader_of(tmp_path / "scores.zarr", existing="continue")
    loader = loader_of(tmp_path / "scores.zarr", existing="continue")
    assert loader.epoch == 1
    assert np.array_equal(loader.store.scores, losses(0))


def test_a_folder_that_cannot_be_written_takes_no_store(small_disk, mount):
    disk = small_disk()
    mount("-o", "remount,ro", folder=disk)
    with pytest.raises(StoreError, match=r"cannot create.*: Read-only file system\. It needs 360 bytes on a disk that"):
        iter(loader_of(disk / "scores.zarr"))
    assert names(disk) == []


def test_a_store_that_cannot_be_written_is_not_continued_but_read(small_disk, mount):
    disk = small_disk()
    finish(loader_of(disk / "scores.zarr", epochs=1))
    mount("-o", "remount,ro", folder=disk)
    for existing in ("continue", "overwrite"):
        with pytest.raises(StoreError, match=r"owner.json cannot be written \(Read-only file system\); a run needs"):
            iter(loader_of(disk / "scores.zarr", existing=existing))
    assert np.array_equal(ScoreStore.open(disk / "scores.zarr", "r").scores, losses(0))


def test_a_store_that_cannot_be_written_any_more_is_told_at_the_commit_and_goes_on_when_it_can(small_disk, mount):
    path = small_disk() / "scores.zarr"
    loader = loader_of(path)
    train(loader)
    # Linux refuses to make a file system read-only whose files are mapped to write; a mount above it can be.
    mount("--bind", path, folder=path)
    mount("-o", "remount,bind,ro", folder=path)
    told = r"could not be committed \(Read-only file system\)\. Nothing is lost"
    with pytest.raises(StoreError, match=told), no_history():
        iter(loader)
    subprocess.run(["umount", path], check=True)
    loader.commit()
    finish(loader)
    assert loader.epoch == 5


# ---- damaged stores


def cut(array, size):
    return lambda path: os.truncate(path / array / "c" / "0", size)


def longer(array):
    return lambda path: os.truncate(path / array / "c" / "0", layout.file_size(SIZE) + 4096)


def flip(file):
    def damage(path):
        found = bytearray((path / file).read_bytes())
        place = found.index(b'"epoch"' if file == "zarr.json" else b'"data_type"')
        found[place + 2] ^= 1
        (path / file).write_bytes(found)

    return damage


def rewrite(array):
    def damage(path):
        zarr.open_group(path, mode="r+", zarr_format=3)[array][:] = np.zeros(SIZE, np.float32)

    return damage


# What is done to the store, and what a run that has it open then says: at its next update, at its next iter.
REPLACED = "replaced by another program, or cut, while they were in use; .*go on from a checkpoint"
GONE = "is gone .* while the store is in use.*go on from a checkpoint"
DAMAGE = {
    "scores emptied": (cut("scores", 0), None, REPLACED),
    "scores truncated": (cut("scores", 4096), None, REPLACED),
    "pending emptied": (cut("pending", 0), REPLACED, REPLACED),
    "pending truncated": (cut("pending", 4096), REPLACED, REPLACED),
    "scores extended": (longer("scores"), None, REPLACED),
    "pending extended": (longer("pending"), REPLACED, REPLACED),
    "header flipped": (flip("zarr.json"), None, "checksum|attribute 'epoch'"),
    "scores rewritten by zarr": (rewrite("scores"), None, REPLACED),
    "pending rewritten by zarr": (rewrite("pending"), REPLACED, REPLACED),
    "scores removed": (lambda path: shutil.rmtree(path / "scores"), None, GONE),
    "all removed": (shutil.rmtree, GONE, GONE),
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    loader = loader_of(tmp_path_factory.mktemp("undisturbed") / "scores.zarr", SIZE, batch_size=SIZE // 8)
    finish(loader)
    return np.array(loader.store.scores)


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_under_a_run_is_an_error_at_the_next_update_or_iter_that_a_checkpoint_mends(tmp_path, undisturbed, name):
    damage, at_update, at_iter = DAMAGE[name]
    path = tmp_path / "scores.zarr"
    with Child(victims.meet_damage, path, SIZE) as run:
        assert run.hears() == "ready"
        damage(path)
        run.tell()
        found, scores = run.result()  # and no SIGBUS
    for call in ("len", "stats", "progress", "with an error"):
        assert found[call] is None
    assert (found["update"] is None) == (at_update is None)
    for call, words in {
        "update": at_update,
        **dict.fromkeys(("state_dict", "commit", "with", "iter"), at_iter),
    }.items():
        if words:
            error, text, _ = found[call]
            assert error == "StoreError"
            assert re.search(words, text), text
    if "scores" in name or name == "all removed":  # of which the plan is made as it is read
        assert found["next"][0] == found["peek"][0] == "StoreError"
    assert np.array_equal(scores, undisturbed)


@pytest.mark.parametrize("name", [name for name in DAMAGE if name != "all removed"])
def test_damage_to_a_store_that_nobody_has_open_is_told_at_the_start(tmp_path, name):
    path = tmp_path / "scores.zarr"
    finish(loader_of(path, SIZE, batch_size=SIZE // 8, epochs=1))
    DAMAGE[name][0](path)
    if "rewritten" in name:  # by a program that knows the format: its scores are those of the store now
        assert loader_of(path, SIZE, existing="continue").epoch == 1
        return
    with pytest.raises(StoreError, match=r"existing='overwrite'|is damaged|not a score store"):
        loader_of(path, SIZE, existing="continue")
    finish(loader_of(path, SIZE, batch_size=SIZE // 8, epochs=1, existing="overwrite"))
    assert np.array_equal(ScoreStore.open(path).scores, losses(0, SIZE))


def put(path, array, places):
    """Write values into the file of an array, past the store."""
    file = np.memmap(path / array / "c" / "0", "<f4", "r+", shape=(N,))
    for place, value in places.items():
        file[place] = value
    file.flush()


INFINITE = {0: np.inf, 1: -np.inf, 2: np.inf}


@pytest.mark.parametrize("policy", [SoftPruning(0.5), QuantilePruning(), BudgetPruning(0.2)], ids=repr)
def test_a_score_that_a_flipped_bit_made_infinite_counts_as_never_seen_in_the_plan_and_in_the_state(tmp_path, policy):
    path, options = tmp_path / "scores.zarr", {"policy": policy, "epochs": 10}
    first = loader_of(path, **options)
    train(first)
    first.commit()
    del first
    wanted = np.array(ScoreStore.open(path, "r").scores)
    wanted[list(INFINITE)] = np.nan
    put(path, "scores", INFINITE)
    loader = loader_of(path, existing="continue", **options)
    with pytest.warns(RuntimeWarning, match=r"3 scores of .* are infinite \(was a bit flipped.* count as never seen"):
        batches = iter(loader)
    assert np.isfinite(loader.stats["threshold"]) or policy == BudgetPruning(0.2)
    assert loader.stats["mean_score"] == pytest.approx(np.nanmean(wanted))
    weights = {int(i): float(w) for _, picks in batches for i, w in zip(picks.index, picks.weight, strict=True) if w}
    assert [weights[place] for place in INFINITE] == [1, 1, 1]
    with pytest.warns(RuntimeWarning, match="3 scores are infinite"):
        state = loader.state_dict()
    assert np.array_equal(state["scores"], wanted, equal_nan=True)
    again = loader_of(tmp_path / "again.zarr", **options)
    again.load_state_dict(state)
    assert np.array_equal(again.store.scores, wanted, equal_nan=True)
    state["scores"][:3] = torch.tensor([np.inf, -np.inf, np.inf])
    del state["checksum"]  # as an earlier version saved it
    with pytest.warns(RuntimeWarning, match="3 scores are infinite"):
        again.load_state_dict(state)


def test_a_loss_that_a_flipped_bit_made_infinite_is_not_committed(tmp_path):
    path = tmp_path / "scores.zarr"
    loader = loader_of(path)
    train(loader)
    loader.commit()
    train(loader)
    seen = np.flatnonzero(np.isfinite(loader.store.pending))[:2]
    put(path, "pending", dict(zip(seen, (np.inf, -np.inf), strict=True)))
    wanted = np.where(np.isfinite(loader.store.pending), loader.store.pending, loader.store.scores)
    loader.commit()
    assert np.array_equal(loader.store.scores, wanted)


@pytest.mark.parametrize("array", ["scores", "pending"])
def test_a_reader_of_a_store_that_was_cut_gets_an_error_and_no_sigbus(tmp_path, array):
    reader = ScoreStore.create(tmp_path / "scores.zarr", SIZE)
    cut(array, 0)(tmp_path / "scores.zarr")
    with pytest.raises(StoreError, match=REPLACED):
        getattr(reader, array)


def test_after_a_break_with_an_error_nothing_is_committed(tmp_path):
    for kind in (KeyError, KeyboardInterrupt, SystemExit, GeneratorExit):
        path = Path(tmp_path / kind.__name__)
        with pytest.raises(kind), loader_of(path) as loader:
            train(loader)
            raise kind
        store = ScoreStore.open(path, "r")
        assert store.epoch == 0
        assert np.array_equal(store.pending, losses(0))
