"""Entry point of the command ``infobatch-stream``."""

import signal
import sys
from types import FrameType
from typing import NoReturn

__all__ = ["main"]


def main() -> None:
    """Run the command line; exits with a message where typer or rich are not installed."""
    try:
        from .cli import app
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in {"click", "rich", "typer"}:
            raise
        sys.exit(
            f"The command line needs {error.name}, which is not installed. "
            "Install it with: pip install 'infobatch-stream[tools]'"
        )
    # Batch systems end a job so; as an exception it lets half-written folders be removed.
    signal.signal(signal.SIGTERM, _terminate)
    app()


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
