"""Which nodes may share what: groups of unequal size, file systems of several machines, folders that lead elsewhere."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from support.ddp.cases import train
from support.ddp.faults import MERGED_SHARES, MERGED_SIZES, losses_of
from support.ddp.network import nodes_of
from support.ddp.nodes import EPOCHS, N, make

from infobatch_stream import _platform as node
from infobatch_stream.distributed import process_group

ddp = pytest.mark.ddp


# ---- what a process can tell of its machine

MOUNTS = r"""
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/root rw,discard
30 22 0:26 / /dev/shm rw,nosuid,nodev shared:4 - tmpfs tmpfs rw
41 22 0:40 / /home rw,relatime shared:21 - nfs4 filer:/export/home rw,vers=4.2,addr=10.0.0.5
42 41 254:16 /scratch /home/ann/scratch rw,relatime - xfs /dev/sdb1 rw
43 22 0:41 / /data\040sets\011here rw - lustre 10.0.0.7@tcp:/fs rw
44 22 0:42 / /var/lib/docker/overlay2/1/merged rw - overlay overlay rw,lowerdir=/l,upperdir=/u,workdir=/w
45 22 254:0 /srv/scores /mnt/bound rw shared:1 master:2 propagate_from:1 - ext4 /dev/root rw
46 22 254:32 / /mnt/twice rw - ext4 /dev/sdc rw
47 46 0:44 / /mnt/twice rw - nfs filer:/other rw
48 22 0:45 / /mnt/bucket rw - fuse.s3fs s3fs rw
a line of another form
"""


@pytest.mark.parametrize(
    ("path", "file_system"),
    [
        ("/scores.zarr", "ext4"),
        ("/dev/shm/scores.zarr", "tmpfs"),
        ("/home/ann/scores.zarr", "nfs4"),
        ("/homes/ann/scores.zarr", "ext4"),  # not below /home
        ("/home/ann/scratch/scores.zarr", "xfs"),
        ("/data sets\there/scores.zarr", "lustre"),
        ("/var/lib/docker/overlay2/1/merged/scores.zarr", "overlay"),
        ("/mnt/bound/scores.zarr", "ext4"),
        ("/mnt/twice/scores.zarr", "nfs"),  # what was mounted last covers the other
        ("/mnt/twice", "nfs"),
        ("/mnt/bucket/scores.zarr", "fuse.s3fs"),
    ],
)
def test_the_file_system_of_a_path_is_that_of_the_innermost_mount(tmp_path, path, file_system):
    assert node.name_of_file_system(Path(path), MOUNTS) == file_system


def test_the_file_system_of_a_real_path_has_a_name(tmp_path):
    assert node.name_of_file_system(tmp_path)
    assert not node.is_network(node.name_of_file_system(tmp_path))


@pytest.mark.parametrize(
    "name", ["nfs", "nfs4", "cifs", "smb3", "9p", "lustre", "ceph", "gpfs", "fuse.sshfs", "fuse.s3fs"]
)
def test_network_file_systems_are_known(name):
    assert node.is_network(name)


@pytest.mark.parametrize("name", ["ext4", "xfs", "btrfs", "tmpfs", "overlay", "zfs", "fuse.fuse-overlayfs", "nfsd", ""])
def test_local_file_systems_are_not_taken_for_network_ones(name):
    assert not node.is_network(name)


@pytest.mark.parametrize(
    ("environment", "path"),
    [
        ({"GROUP_RANK": "3", "NODE_RANK": "4", "SLURM_NODEID": "5"}, "/shared/3-3.zarr"),
        ({"NODE_RANK": "4", "SLURM_NODEID": "5"}, "/shared/4-4.zarr"),  # Ray Train's, in a job of Slurm
        ({"SLURM_NODEID": "5"}, "/shared/5-5.zarr"),
        ({}, "/shared/somehost-somehost.zarr"),
    ],
)
def test_node_in_a_path_is_the_number_of_the_node_or_its_name(monkeypatch, environment, path):
    for name in ("GROUP_RANK", "NODE_RANK", "SLURM_NODEID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(node.socket, "gethostname", lambda: "somehost")
    assert node.fill_in_node("/shared/{node}-{node}.zarr") == path
    assert node.fill_in_node("/shared/{nodes}.zarr") == "/shared/{nodes}.zarr"


@pytest.mark.parametrize(
    ("config", "device"),
    [
        ("cuda:nccl", "cuda"),
        ("cpu:gloo,cuda:gloo", "cpu"),
        ("cpu:gloo,cuda:nccl", "cpu"),
        ("undefined", "cuda"),
    ],
)
def test_scores_are_exchanged_on_the_cpu_unless_the_backend_has_only_gpus(monkeypatch, config, device):
    monkeypatch.setattr(process_group.dist, "get_backend_config", lambda: config)
    monkeypatch.setattr(process_group.torch.cuda, "current_device", lambda: 1)
    assert process_group.device_of_exchange() == torch.device(device, 1 if device == "cuda" else None)


# ---- ranks that discover each other


@pytest.fixture(scope="module")
def on_loopback(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loopback")
    with nodes_of("loopback", folder) as (nodes, _):
        yield nodes, folder


@pytest.fixture(scope="module")
def on_network(tmp_path_factory):
    folder = tmp_path_factory.mktemp("network")
    with nodes_of("namespaces", folder) as (nodes, network):
        yield nodes, network, folder


def check_refused(found, *words, kinds=("ConfigError",), seconds=10):
    for error, text, took in found:
        assert error in kinds
        assert all(word in text for word in words), text
        assert took < seconds


@ddp
@pytest.mark.parametrize(
    ("ranks", "torchrun"),
    [
        ((3, 1), True),
        ((3, 1), False),  # a launcher, as Ray Train, that tells a rank only how many are on its own node
        ((1, 1, 1), True),
        pytest.param((1, 2, 1), True, marks=pytest.mark.slow),
    ],
)
def test_nodes_may_have_different_numbers_of_ranks(on_loopback, tmp_path, ranks, torchrun):
    nodes, folder = on_loopback
    name = "-".join(map(str, ranks)) + ("" if torchrun else "-untold")
    found = nodes.run("exchanged", folder / f"of {name}", ranks=ranks, name=name, torchrun=torchrun)
    batch = 2 * sum(ranks)  # a lane per node where that divides it
    alone = make(tmp_path, "alone", batch_size=batch, canonical_nodes=1 if batch % len(ranks) else len(ranks))
    wanted = [epoch["scores"] for epoch in train(alone)]
    for scores, files, _ in found:
        assert all(torch.equal(one, other) for one, other in zip(scores, wanted, strict=True))
        assert files == found[0][1]
    for number in range(len(ranks)):  # the columns are as many as the smallest node has ranks
        assert sum(found[sum(ranks[:number])][2]) == EPOCHS * N / min(ranks)


@ddp
def test_a_process_that_does_not_come_is_waited_for_as_long_as_the_default_group_says(on_loopback):
    nodes, folder = on_loopback
    run = nodes.begin("absent", folder / "absent", ranks=(1, 1), timeout=3)
    run.wait()
    error, text, seconds = torch.load(run.out / "0.pt", weights_only=False)
    assert error == "LostRanksError"
    assert "Look for the first error among them" in text
    assert 2.5 < seconds < 15


@ddp
def test_a_rank_whose_map_is_not_shared_stops_all(on_loopback):
    nodes, folder = on_loopback
    found = nodes.run("private_map", folder / "private", name="private", stranger=1)
    check_refused(found, "does not see what rank", "local disk")


@ddp
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
@pytest.mark.parametrize("locks", [True, False])
def test_one_store_under_two_paths_stops_all(on_loopback, locks):
    nodes, folder = on_loopback
    found = nodes.run("one_store_by_two_paths", folder / f"linked {locks}", locks=locks)
    if locks:
        check_refused(found, "is in use", kinds=("StoreError", "OutOfStepError"))
    else:
        check_refused(found, "two paths lead to one store")


@ddp
@pytest.mark.parametrize(
    ("machines", "file_systems", "refused"),
    [
        (("one", "other"), ("nfs4", "nfs4"), True),
        (("one", "other"), ("ext4", "nfs4"), True),
        (("one", "one"), ("nfs4", "nfs4"), False),
        (("one", "other"), ("ext4", "ext4"), False),
    ],
)
def test_a_network_file_system_is_refused_when_the_ranks_are_on_several_machines(
    on_loopback, machines, file_systems, refused
):
    nodes, folder = on_loopback
    name = "-".join((*machines, *file_systems))
    here = [str(folder / name / "shared")] * 2
    found = nodes.run("on_machines", folder / name, folders=here, machines=machines, file_systems=file_systems)
    if refused:
        check_refused(found, "nfs4", "several machines", "{node}", "local disk")
        assert not (folder / name / "shared").exists()
    else:
        assert [error for error, *_ in found] == ["nothing"] * 4


@ddp
def test_a_network_file_system_is_refused_where_each_machine_has_it_in_another_place(on_network):
    nodes, network, folder = on_network
    places = [folder / "shared", folder / "mount 0", folder / "mount 1"]
    for place in places:
        place.mkdir()
    for number, place in enumerate(places[1:]):
        network.run(number, "mount", "--bind", str(places[0]), str(place))
    found = nodes.run(
        "on_machines",
        folder / "elsewhere",
        folders=list(map(str, places[1:])),
        machines=["one", "other"],
        file_systems=["nfs4", "nfs4"],
    )
    check_refused(found, "nfs4", "several machines", "{node}")
    assert not list(places[0].iterdir())


# ---- disks


@ddp
@pytest.mark.parametrize(("options", "words"), [("size=256k", "bytes on a disk"), ("ro", "cannot write to")])
def test_a_disk_that_is_full_or_read_only_on_one_node_stops_all_and_leaves_nothing(on_network, options, words):
    nodes, network, folder = on_network
    network.run(1, "mount", "-t", "tmpfs", "-o", options, "none", str(network.here))
    try:
        found = nodes.run("opened", folder / f"on {options}", name=options, samples=100_000)
    finally:
        network.run(1, "umount", str(network.here))
    check_refused([error for error, _ in found], words, options, kinds=("StoreError", "OutOfStepError"))
    assert [there for _, there in found] == [[]] * 4


@ddp
def test_a_disk_that_is_full_on_one_node_at_a_commit_loses_nothing(on_network, tmp_path):
    nodes, network, folder = on_network
    network.run(1, "mount", "-t", "tmpfs", "-o", "size=512k", "none", str(network.here))
    try:
        found = nodes.run("full_at_the_commit", folder / "full", name="full")
    finally:
        network.run(1, "umount", str(network.here))
    alone = train(make(tmp_path, "alone", epochs=2))[-1]["scores"]
    for error, state, epoch, files, scores in found:
        check_refused([error], "could not be committed", "Nothing is lost", kinds=("StoreError", "OutOfStepError"))
        check_refused([state], "call commit() again first", kinds=("StoreError", "OutOfStepError"))
        assert epoch == 0
        assert files == found[0][3]
        assert torch.equal(scores, alone)


@ddp
@pytest.mark.parametrize("existing", ["error", "continue"])
def test_a_store_of_another_dataset_on_one_node_stops_all_and_stays(on_loopback, existing):
    nodes, folder = on_loopback
    found = nodes.run("foreign", folder / f"foreign {existing}", existing=existing, timeout=10)
    check_refused([error for error, _ in found], "another dataset", kinds=("StoreError", "OutOfStepError"))
    assert all(untouched for _, untouched in found)


@ddp
def test_ranks_that_want_different_things_of_a_store_all_raise(on_loopback):
    nodes, folder = on_loopback
    found = nodes.run("continue_on_one", folder / "differs")
    check_refused(found, "existing='continue'", kinds=("StoreError", "OutOfStepError"))


@ddp
@pytest.mark.parametrize("groups", [[[0], [1]], [[0], [1], [2]], [[0, 3], [1, 2]]], ids=["two", "three", "in no order"])
def test_a_merge_gives_all_the_largest_loss_of_each_sample_to_the_bit(on_loopback, groups):
    nodes, folder = on_loopback
    ranks = sum(map(len, groups))
    found = nodes.run("merged", folder / f"merged {groups}", ranks=(1,) * ranks, groups=groups)
    columns = list(zip(*groups, strict=True))
    for number, (size, share) in enumerate((size, share) for size in MERGED_SIZES for share in MERGED_SHARES):
        for column in columns:
            wanted = np.fmax.reduce([losses_of(rank, size, share) for rank in column])
            wanted[np.isnan(wanted)] = np.nan  # the same NaN on every node, for files are compared by their bytes
            for rank in column:
                np.testing.assert_array_equal(found[rank][number].view(np.uint32), wanted.view(np.uint32))
