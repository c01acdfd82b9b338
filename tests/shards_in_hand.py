"""What several tests of the commands look at: what a command prints, and what is in tars."""

import tarfile
from pathlib import Path

from typer.testing import CliRunner

from infobatch_stream.tools.cli import app


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
