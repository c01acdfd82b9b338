"""The command ``infobatch-stream seed``: a score store that begins with scores of elsewhere."""

from pathlib import Path
from typing import Annotated

import typer

from infobatch_stream.errors import ConfigError

from .console import reported, say
from .scores import Cache

__all__ = ["seed_command"]


def seed_command(
    store: Annotated[Path, typer.Argument(help="The score store to be made, a folder: scores.zarr.")],
    scores: Annotated[
        str,
        typer.Argument(
            help="Where the scores are: a score store of the same dataset; a file .npy; or 'table.parquet:column', by "
            "its column index if it has one. What is NaN, or has no row, is not known."
        ),
    ],
    *,
    dataset: Annotated[
        str | None,
        typer.Option(
            metavar="SHARDS",
            help="For a file: the shards that will be trained on, local or a url, or any score store of them.",
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Instead, for a map-style dataset: how many samples it has.")
    ] = None,
    cache: Cache = None,
    source: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What the scores are of.  [default: the name of SCORES]")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a store that no run uses.")] = False,
) -> None:
    """Make a score store that begins with scores of an earlier run or of another model, so that epoch 0 prunes too."""
    with reported():
        from infobatch_stream import ScoreStore
        from infobatch_stream.initial_scores import InitialScores
        from infobatch_stream.report.dataset import Known, known_of
        from infobatch_stream.sources.map_style import map_fingerprint

        if dataset is not None and samples is not None:
            raise ConfigError("--samples is for a map-style dataset, --dataset for shards: give one of them.")
        if samples is not None:
            known = Known(samples, map_fingerprint(samples))
        elif dataset is not None or Path(scores).is_dir():
            known = known_of(dataset or scores, cache)
        else:
            raise ConfigError(
                f"{scores} does not say of which dataset its scores are. Name the shards that will be trained on, or a "
                "score store of them (--dataset SHARDS); of a map-style dataset the number of samples (--samples N)."
            )
        found = InitialScores.of(scores, known)
        made = ScoreStore.seed(
            store, found.values, known.fingerprint, source=source or found.seeded.source, replace=overwrite
        )
    assert made.seeded
    say(f"{store}: {made.seeded.samples:,} of {made.num_samples:,} samples have a score ({made.seeded.source})")
