"""Entry point of the command ``infobatch-stream``."""

import signal
import sys
import warnings
from types import FrameType
from typing import NoReturn

__all__ = ["main"]


def main() -> None:
    """Run the command line; exits with a message where typer or rich are not installed."""
    try:
        from .app import app
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in {"click", "rich", "typer"}:
            raise
        sys.exit(
            f"The command line needs {error.name}, which is not installed. "
            "Install it with: pip install 'infobatch-stream[tools]'"
        )
    warnings.formatwarning = _as_line
    # Batch systems end a job so; as an exception it lets half-written folders be removed.
    signal.signal(signal.SIGTERM, _terminate)
    app()


def _as_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning without the line of ours that gave it, and with no name of a file that could move the cursor."""
    from infobatch_stream._formatting import visible

    return f"warning: {visible(str(message))}\n"


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
