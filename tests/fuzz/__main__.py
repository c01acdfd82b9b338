"""Fuzz for long: ``python -m tests.fuzz --runs 10000000`` or, guided by coverage, ``--atheris --seconds 600``.

The first is of our own mutations, repeatable, one process. Atheris (pip install atheris) stops at the first input that
fails; run it for one target at a time.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from .run import fuzz, watched
from .seeds import SEEDS
from .targets import TARGETS

# Of all inputs, how many each target gets: a slow one fewer.
SHARES = {"headers": 0.72, "tar": 0.08, "npz": 0.15, "store": 0.04, "history": 0.01}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Fuzz the parsers.")
    parser.add_argument("target", nargs="?", choices=list(TARGETS), help="only this one")
    parser.add_argument("--runs", type=int, default=10_000_000, help="inputs, over all targets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--crashes", type=Path, help="folder for inputs that fail")
    parser.add_argument("--atheris", action="store_true", help="guided by coverage; needs a target")
    parser.add_argument("--seconds", type=int, default=60, help="for --atheris")
    args = parser.parse_args()
    if args.atheris:
        if args.target is None:
            parser.error("--atheris needs a target")
        guided(args.target, args.seconds, args.seed, args.crashes or Path())
    total = 0
    with watched():
        for target in [args.target] if args.target else SHARES:
            runs = args.runs if args.target else round(args.runs * SHARES[target])
            done = fuzz(target, runs, args.seed, args.crashes)
            total += done.runs
            print(
                f"{target}: {done.runs:,} executions in {done.seconds:,.0f} s ({done.runs / done.seconds:,.0f}/s), "
                f"peak {done.peak} MiB, {done.growth} more than before; nothing found",
                flush=True,
            )
    print(f"{total:,} executions in all", flush=True)


def guided(target: str, seconds: int, seed: int, crashes: Path) -> None:
    """Run atheris, which ends the process."""
    import atheris

    modules = ("npz", "tar_headers", "tar_index")
    for name in [f"infobatch_stream.sources.{module}" for module in modules] + [
        "infobatch_stream.store.header",
        "infobatch_stream.store.layout",
    ]:
        for value in vars(sys.modules[name]).values():
            if callable(value) and getattr(value, "__module__", None) == name and hasattr(value, "__code__"):
                value.__code__ = atheris.instrument_func(value).__code__
    corpus = Path(tempfile.mkdtemp(prefix="infobatch-corpus-"))
    for number, data in enumerate(SEEDS[target]()):
        (corpus / str(number)).write_bytes(data)
    limits = [f"-max_total_time={seconds}", f"-seed={seed + 1}", "-max_len=16384", "-timeout=20", "-rss_limit_mb=2048"]
    limits.append(f"-artifact_prefix={crashes}/")
    atheris.Setup([sys.argv[0], *limits, str(corpus)], TARGETS[target])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
