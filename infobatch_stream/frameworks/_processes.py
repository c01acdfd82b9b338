"""The processes of a run, as its framework and its loader know them."""

from infobatch_stream import ConfigError, InfoBatchLoader

__all__ = ["check_processes"]


def check_processes(loader: InfoBatchLoader, framework: str, processes: int, remedy: str) -> None:
    """Raise ConfigError if the loader is split among other than the ``processes`` that average their gradients.

    Hugging Face's libraries take each process of torchrun for a run of its own where there is no GPU.
    """
    if loader.processes != processes:
        raise ConfigError(
            f"{framework} knows of {processes} process(es), but torch.distributed, by which the loader is split, of "
            f"{loader.processes}: gradients would not be averaged. {remedy}"
        )
