"""The global batch: how many entries all ranks together take in a step, and the lanes that it is dealt from."""

from dataclasses import dataclass

from infobatch_stream.errors import ConfigError

__all__ = ["GlobalBatch"]

_FEW = 8  # samples of a rank under which statistics of a batch are noise, and devices idle


@dataclass(frozen=True)
class GlobalBatch:
    """The batches of all ranks in one step.

    Attributes:
        batch_size: Samples per batch of a rank.
        world_size: How many ranks share a step.
        nodes: On how many machines they are.
        canonical_nodes: Lanes of every plan as the user or a state gives them, or None.
    """

    batch_size: int
    world_size: int
    nodes: int
    canonical_nodes: int | None = None

    @property
    def size(self) -> int:
        """Entries per step of all ranks."""
        return self.batch_size * self.world_size

    @property
    def lanes(self) -> int:
        """Lanes of every plan: as given, else one per node where that divides the size.

        Raises ConfigError for a given number that does not.
        """
        lanes = self.canonical_nodes
        if lanes is None:
            lanes = self.nodes if self.size % self.nodes == 0 else 1
        if self.size % lanes:
            raise ConfigError(
                f"canonical_nodes={lanes} does not divide the global batch of {self.size} "
                f"(batch_size {self.batch_size} x {self.world_size} ranks); choose a divisor."
            )
        return lanes

    def advice(self, smallest: int) -> str:
        """What to say of a pruned step of ``smallest`` entries over all ranks; "" if it is large enough."""
        if smallest >= min(_FEW, self.batch_size) * self.world_size:
            return ""
        return (
            f"a step of this epoch holds {smallest} samples on {self.world_size} rank(s), while batch_size is "
            f"{self.batch_size}. With fewer than {_FEW} for each rank, statistics over a batch are noisy, and devices "
            "idle. Raise batch_size, or prune less."
        )
