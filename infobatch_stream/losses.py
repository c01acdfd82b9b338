"""The losses of a batch: whether they are one number per sample, and the loss to go backward from."""

from torch import Tensor

from infobatch_stream.errors import ConfigError, OutOfStepError
from infobatch_stream.picks import Picks
from infobatch_stream.pinned_ring import PinnedRing

__all__ = ["check_losses", "check_picks", "weighted_mean"]


def check_picks(picks: Picks, run: int, epoch: int) -> None:
    """Raise ConfigError for what are no picks, OutOfStepError for those of another loader than ``run``, or epoch."""
    if not isinstance(picks, Picks):
        raise ConfigError(f"update takes the picks that came with the batch, not {type(picks).__name__}.")
    origin = picks._origin
    if origin.run != run:
        raise OutOfStepError(
            "these picks are another loader's, or of before load_state_dict() or a change of loader.include: update "
            "each batch by the loader that gave it, before that."
        )
    if origin.step is not None and origin.epoch != epoch:
        raise OutOfStepError(
            f"these picks are of epoch {origin.epoch}, the loader is in epoch {epoch}: update each batch before the "
            "next epoch begins."
        )


def check_losses(name: str, losses: Tensor, samples: int) -> None:
    """Raise ConfigError unless ``losses`` are float[samples], and at least one."""
    if not samples:
        raise ConfigError("the picks are of no sample, so there is no loss to go backward from: skip this update.")
    if isinstance(losses, Tensor) and losses.shape == (samples,) and losses.is_floating_point():
        return
    found = f"{losses.dtype}{list(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
    text = (
        f"{name} is {found}; it must be a torch.Tensor of one float per sample of the batch: [{samples}]. "
        "Compute it with reduction='none' (and average what a sample has beyond one number)."
    )
    if isinstance(losses, Tensor) and losses.ndim == 1:
        text += (
            f" If collate_fn leaves out some of the {samples} samples, it cannot be told which loss is whose: let the "
            'dataset raise for samples that cannot be read, and give InfoBatchLoader(on_error="replace"); or give '
            "collate_with_picks= instead of collate_fn=."
        )
    raise ConfigError(text)


def weighted_mean(losses: Tensor, picks: Picks, batch_size: int | None, ring: PinnedRing) -> Tensor:
    """``sum(weight * losses) / batch_size`` on the device of ``losses``, float[b], without a wait for it.

    batch_size: None: b.
    ring: By which the weights go there.
    """
    weight = picks.weight if picks.sample_weight is None else picks.weight * picks.sample_weight
    if weight.is_cpu and ring.device.holds(losses):
        weight = ring.to_device(weight, losses)
    weighted = losses * weight.to(losses.device)
    return weighted.mean() if batch_size is None else weighted.sum() / batch_size
