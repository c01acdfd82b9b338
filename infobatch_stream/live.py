"""A line on the terminal that says how a run stands."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from infobatch_stream.errors import MissingExtraError

if TYPE_CHECKING:
    from infobatch_stream.loader import InfoBatchLoader
    from infobatch_stream.picks import Picks

__all__ = ["progress"]


def progress(loader: "InfoBatchLoader", **options: Any) -> "Iterable[tuple[Any, Picks]]":
    """The batches of the next epoch, with a bar on the terminal: epoch, step, share kept, share saved so far.

    Collective, as ``iter(loader)``: every rank calls it, and the process of rank 0 shows the bar.

    Args:
        loader: The loader of the run.
        **options: Of ``tqdm``, which makes the bar.

    Returns:
        An iterable of (batch, picks), as the loader gives them.

    Raises:
        MissingExtraError: If tqdm is not installed.
    """
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise MissingExtraError.of("tqdm", "live") from error
    batches = iter(loader)
    stats = loader.stats
    facts = {"kept": f"{loader.kept_share:.1%}", "saved": f"{stats['saved']:.1%}"}
    defaults = {
        "desc": f"epoch {loader.epoch + 1}/{loader.epochs}",
        "total": int(stats["steps"]),
        "initial": loader.step,
        "unit": "step",
        "postfix": facts,
        "disable": loader.process != 0,
    }
    bar: Iterable[tuple[Any, Picks]] = tqdm(batches, **(defaults | options))
    return bar
