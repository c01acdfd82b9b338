"""The commands that look at a score store: ``inspect``, ``report``, ``export`` and ``simulate``."""

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.filesize import decimal

from infobatch_stream.errors import ConfigError

from .console import AsJson, progress, reported, say

if TYPE_CHECKING:
    from infobatch_stream.policies.base import Policy, Schedule

__all__ = ["export_command", "inspect_command", "report_command", "simulate_command"]

Store = Annotated[Path, typer.Argument(help="The score store, a folder: scores.zarr.")]
Cache = Annotated[
    Path | None,
    typer.Option(help="Folder for shards that come from urls.  [default: infobatch-stream in the user's cache]"),
]


class PolicyName(StrEnum):
    """The policies of the library."""

    SOFT = "soft"
    QUANTILE = "quantile"
    BUDGET = "budget"
    SETA = "seta"
    ORDER = "order"
    KAKURENBO = "kakurenbo"


class Spread(StrEnum):
    """Over which epochs a budget is spread."""

    MIDDLE = "middle"
    EVEN = "even"


class TableFormat(StrEnum):
    """The formats of files that tables are written to."""

    PARQUET = "parquet"
    CSV = "csv"


def export_command(
    store: Store,
    *,
    format: Annotated[TableFormat | None, typer.Option(help="[default: by the name of the file, else parquet]")] = None,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="The file.  [default: scores.parquet for scores.zarr, in this folder]"),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(metavar="SHARDS", help="The shards of the run, local or a url: adds shard, row and key."),
    ] = None,
    cache: Cache = None,
    hardest: Annotated[
        int | None, typer.Option(min=1, help="Only so many, those that stay hard; with their labels and names.")
    ] = None,
) -> None:
    """Write the scores as a table, a row for each sample, for pandas, polars or DuckDB."""
    with reported(), progress("samples") as bar:
        from infobatch_stream.report.export import export

        format, out = _target(store, format, out)
        task = bar.add_task("exporting", total=None)
        rows = export(
            store, out, format=format.value, dataset=dataset, cache=cache, hardest=hardest,
            on_progress=lambda total, more: bar.update(task, advance=more, total=total),
        )  # fmt: skip
    say(f"{rows:,} samples in {out}" + ("" if out.is_absolute() else f" ({out.absolute()})"))


def _target(store: Path, format: TableFormat | None, out: Path | None) -> tuple[TableFormat, Path]:
    """Which format, to which file."""
    if out is None:
        format = format or TableFormat.PARQUET
        return format, Path(f"{store.resolve().stem}.{format}")
    suffix = out.suffix.removeprefix(".").lower()
    if format is None and suffix not in list(TableFormat):
        raise ConfigError(f"{out} is neither .parquet nor .csv; say which it shall be: --format parquet.")
    return format or TableFormat(suffix), out


def inspect_command(store: Store, *, as_json: AsJson = False) -> None:
    """Show what a score store holds, and what was saved; also while a run trains on it."""
    with reported():
        from infobatch_stream.report.inspect import facts, page
        from infobatch_stream.report.snapshot import Snapshot

        found = Snapshot.take(store)
        if as_json:
            typer.echo(json.dumps(facts(found)))
        else:
            Console().print(page(found))


def report_command(
    store: Store,
    *,
    dataset: Annotated[
        str | None,
        typer.Option(
            metavar="SHARDS",
            help="Show samples of these shards, those that the run read: a folder or url of MDS shards, or tars: a "
            "folder, a pattern, braces, urls.",
        ),
    ] = None,
    cache: Cache = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the page goes.")] = Path("report.html"),
    samples: Annotated[int, typer.Option(min=1, max=1000, help="Samples in a gallery, at most.")] = 32,
) -> None:
    """Make one HTML file of a run: what was saved, how scores moved, the hardest samples; also while it goes on."""
    with reported():
        from infobatch_stream.report.page import write

        size = write(store, out, dataset=dataset, count=samples, cache=cache)
    say(f"{out}: {decimal(size)}")


def simulate_command(
    store: Store,
    *,
    policy: Annotated[
        PolicyName | None, typer.Option(help="Only this one; the last three as published.  [default: a table of many]")
    ] = None,
    ratio: Annotated[float, typer.Option(help="soft: share of the samples below the mean to skip.")] = 0.5,
    quantiles: Annotated[str, typer.Option(help="quantile: bands of losses.")] = "0.20,0.85",
    keep: Annotated[str, typer.Option(help="quantile: share kept of each.")] = "0.25,0.5,1.0",
    fraction: Annotated[float, typer.Option(help="budget: share of the whole run to skip.")] = 0.4,
    spread: Annotated[
        Spread, typer.Option(help="budget: over the middle epochs, or over all of them.")
    ] = Spread.MIDDLE,
    epochs: Annotated[int | None, typer.Option(min=2, help="Of the run.  [default: those of the store]")] = None,
    delta: Annotated[float, typer.Option(min=0, max=1, help="Share of the epochs after which nothing is skipped.")] = (
        0.875
    ),
    seed: Annotated[int, typer.Option(min=0, help="Of the choice.")] = 0,
    include: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="The samples of the run: .npy, or table.parquet:column.  [default: all]"),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Of the loader: say what a step of constant steps holds, and is worth.")
    ] = None,
    wish: Annotated[float | None, typer.Option(min=0, max=1, help="Recommend a policy that skips this share.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what policies would skip with the scores of a run, and how much noise that adds."""
    with reported():
        from infobatch_stream import BudgetPruning, QuantilePruning, ScoreStore, SoftPruning, policies
        from infobatch_stream.per_sample import mask_of
        from infobatch_stream.report.simulation import doubts, recommend, scores_of, simulate, table, usual_policies
        from infobatch_stream.report.snapshot import check_bounds
        from infobatch_stream.score_stats import share_known

        opened = ScoreStore.open(store, mode="r")
        check_bounds(opened)
        length = epochs or max(2, opened.epoch)
        mask = mask_of(include, opened.num_samples)
        samples = None if mask is None else mask.values
        seeded = share_known(next(scores_of(opened)), samples)
        chosen: list[Policy | Schedule] = usual_policies(length, delta, seeded)
        if policy is PolicyName.SOFT:
            chosen = [SoftPruning(ratio)]
        elif policy is PolicyName.QUANTILE:
            chosen = [QuantilePruning(_numbers(quantiles), _numbers(keep))]
        elif policy is PolicyName.BUDGET:
            chosen = [BudgetPruning(fraction, spread="even" if spread is Spread.EVEN else "middle")]
        elif policy is not None:  # as published
            chosen = [getattr(policies, f"{policy.capitalize()}Pruning")()]
        outcomes = simulate(chosen, scores_of(opened), epochs=length, delta=delta, seed=seed, include=samples)
        best = None if wish is None else recommend(outcomes, wish)
        doubtful = doubts(outcomes if best is None else [best], length)
    if as_json:
        recommended = None if best is None else repr(best.policy)
        found = {"recommended": recommended, "doubts": doubtful, "outcomes": [one.to_json() for one in outcomes]}
        typer.echo(json.dumps(found))
    else:
        Console().print(table(outcomes, best, batch_size))
        for doubt in doubtful:
            say(f"Note: {doubt}")


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{text!r} is not a list of numbers; give them as 0.25,0.5,1.0.") from None
