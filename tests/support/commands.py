"""What several tests of the commands look at: what a command prints, and what is in shards."""

import json
import tarfile
from pathlib import Path

from typer.testing import CliRunner

from infobatch_stream.tools.app import app


def run(*arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of ``infobatch-stream`` with these arguments."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr


def members_of(folder: Path) -> list[tuple[str, bytes]]:
    """Names and contents of all members of the tars in ``folder``, in order."""
    found = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            found += [(member.name, tar.extractfile(member).read()) for member in tar]
    return found


def raw_mds(folder: Path) -> tuple[dict[str, str], list[bytes]]:
    """Encodings, and the bytes of each sample, by streaming's own reader."""
    from streaming.base.format import reader_from_json

    encodings, samples = {}, []
    for entry in json.loads((folder / "index.json").read_text())["shards"]:
        reader = reader_from_json(str(folder), "", entry)
        encodings = dict(zip(reader.column_names, reader.column_encodings, strict=True))
        samples += [reader.get_sample_data(number) for number in range(reader.samples)]
    return encodings, samples
