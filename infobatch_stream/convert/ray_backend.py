"""Tasks of a conversion on a Ray cluster."""

import logging
import os
import socket
import tempfile
from collections import deque
from collections.abc import Generator, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

from infobatch_stream.convert.shard_plan import Task
from infobatch_stream.convert.worker import Job, TaskResult, write_task
from infobatch_stream.errors import ConfigError, MissingExtraError

__all__ = ["write_on_ray"]

_PATIENCE = 10.0  # seconds
_AHEAD = 2  # tasks per processor that are under way


def write_on_ray(job: Job, scratch: Path, tasks: Iterable[Task], address: str) -> Generator[TaskResult, None, None]:
    """As `write_task` of each of ``tasks``, in their order, by the cluster at ``address`` ("auto", "local", host:port).

    The nodes read the source at the same path; what they write comes back to this process, so they need not share the
    destination. Raises what `write_task` raises, and ConfigError when the cluster cannot be reached.
    """
    try:
        ray: Any = import_module("ray")
    except ImportError as error:
        raise MissingExtraError.of("ray", "ray") from error
    began = not ray.is_initialized()
    if began:
        _knock(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, ignore_reinit_error=True)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise _unreachable(address, error) from error
    try:
        work = ray.remote(max_retries=2)(_write)
        shared = ray.put(job)
        at_once = _AHEAD * max(1, int(ray.cluster_resources().get("CPU", 1)))
        waiting: deque[Any] = deque()
        for task in tasks:
            waiting.append(work.remote(shared, task))
            if len(waiting) >= at_once:
                yield _fetch(ray, waiting.popleft(), scratch)
        while waiting:
            yield _fetch(ray, waiting.popleft(), scratch)
    finally:
        if began:
            ray.shutdown()


def _knock(address: str) -> None:
    """Raise ConfigError if nobody listens at ``address``, for which Ray itself would wait for minutes."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit() and "/" not in host:
        try:
            socket.create_connection((host, int(port)), timeout=_PATIENCE).close()
        except (OSError, OverflowError) as error:
            raise _unreachable(address, error) from error


def _unreachable(address: str, error: Exception) -> ConfigError:
    return ConfigError(f"no Ray cluster can be reached at {address} ({error}); start one with: ray start --head")


def _write(job: Job, task: Task) -> tuple[TaskResult, dict[str, tuple[bytes, int]]]:
    """On a node: the task's shards with their files, each with its time of modification, which an index holds."""
    with tempfile.TemporaryDirectory(prefix="infobatch-convert-") as scratch:
        written = write_task(job, Path(scratch), task)
        names = {shard.file for shard in written.shards}
        files = {
            path.name: (path.read_bytes(), path.stat().st_mtime_ns)
            for path in Path(scratch, written.folder).iterdir()
            if path.name.removesuffix(".index.npz") in names
        }
    return written, files


def _fetch(ray: Any, reference: Any, scratch: Path) -> TaskResult:
    try:
        written, files = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:  # a worker, or its node, is gone
        raise ConfigError(f"a task on Ray ended without a result ({error}); go on with --resume") from error
    folder = scratch / written.folder
    folder.mkdir()
    for name, (data, time) in files.items():
        (folder / name).write_bytes(data)
        os.utime(folder / name, ns=(time, time))
    return written  # type: ignore[no-any-return]
