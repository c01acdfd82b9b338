"""This machine: its number among the nodes, its kernel, its memory, and the file system of a path."""

import os
import re
import socket
from pathlib import Path

__all__ = ["fill_in_node", "free_memory", "is_network", "kernel", "name_of_file_system"]

# File systems that several machines may mount. Their memory maps of one file are not kept equal.
_NETWORK = re.compile(
    r"nfs\d?|cifs|smb\d?|smbfs|9p|virtiofs|afs|ceph|lustre|gpfs|beegfs|pvfs2|orangefs|glusterfs|ocfs2|gfs2|wekafs|"
    r"fuse\.(?!mergerfs|overlayfs|fuse-overlayfs|ntfs|exfat).+"
)

# Of torchrun; of Ray Train and others; of Slurm. That comes last: it counts the nodes of a job step, and is 0 on all
# nodes where Ray is started on each by a step of its own.
_NODE_NUMBERS = ("GROUP_RANK", "NODE_RANK", "SLURM_NODEID")


def fill_in_node(path: str) -> str:
    """Replace ``{node}`` in ``path`` by the number of this node, else by the host's name."""
    told = (os.environ.get(name) for name in _NODE_NUMBERS)
    return path.replace("{node}", next(filter(None, told), None) or socket.gethostname())


def kernel() -> str:
    """An ID of the running kernel. Processes with the same ID share the memory of a mapped local file."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # not Linux, or hidden
        return socket.gethostname()


def free_memory() -> int | None:
    """Bytes of memory that are available; None if that is unknown."""
    try:
        found = re.search(r"^MemAvailable: +(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) << 10 if found else None


def name_of_file_system(path: Path, mounts: str | None = None) -> str:
    """The type of the file system of ``path``, as "ext4" or "nfs4"; "" if that is unknown.

    mounts: text in the form of /proc/self/mountinfo (see proc(5)); default: that file.
    """
    if mounts is None:
        try:
            mounts = Path("/proc/self/mountinfo").read_text()
        except OSError:
            return ""
    found = (Path("/"), "")
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        fields = before.split()
        if len(fields) < 5 or not after:
            continue
        point = Path(re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), fields[4]))
        if path.is_relative_to(point) and len(point.parts) >= len(found[0].parts):  # of equal ones the last covers
            found = (point, after.split()[0])
    return found[1]


def is_network(file_system: str) -> bool:
    """Whether several machines may mount a file system of this type."""
    return _NETWORK.fullmatch(file_system) is not None
