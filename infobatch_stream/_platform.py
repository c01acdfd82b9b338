"""This machine as a rank sees it: its place among the nodes, its kernel, and on what file system a path lies."""

import os
import re
import socket
from pathlib import Path

__all__ = ["fill_in_node", "free_memory", "is_network", "kernel", "name_of_file_system"]

# What several machines may mount at once. Their memory maps of one file are not kept equal.
_NETWORK = re.compile(
    r"nfs\d?|cifs|smb\d?|smbfs|9p|virtiofs|afs|ceph|lustre|gpfs|beegfs|pvfs2|orangefs|glusterfs|ocfs2|gfs2|wekafs|"
    r"fuse\.(?!mergerfs|overlayfs|fuse-overlayfs|ntfs|exfat).+"
)


def fill_in_node(path: str) -> str:
    """``path`` with ``{node}`` replaced: by torchrun's or Slurm's number of this node, else by the host's name."""
    node = os.environ.get("GROUP_RANK") or os.environ.get("SLURM_NODEID") or socket.gethostname()
    return path.replace("{node}", node)


def kernel() -> str:
    """What the processes of one running kernel have in common, whose maps of a local file are the same memory."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # not Linux, or hidden
        return socket.gethostname()


def free_memory() -> int | None:
    """Bytes that this machine could give to processes; None where that cannot be told."""
    try:
        found = re.search(r"^MemAvailable: +(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) << 10 if found else None


def name_of_file_system(path: Path, mounts: str | None = None) -> str:
    """The type of the file system that ``path`` lies on, as "ext4" or "nfs4"; "" where that cannot be told.

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
    """Whether a file system of this type may be mounted by several machines at once."""
    return _NETWORK.fullmatch(file_system) is not None
