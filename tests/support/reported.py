"""Shards for reports."""

import io
import tarfile

HOSTILE = '<script>alert(1)</script><img src=x onerror="alert(2)">'


def write_tars(folder, samples):
    """One tar of samples: (key, {extension: bytes})."""
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / "a.tar", "w") as tar:
        for key, members in samples:
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return folder
