"""The ranks among which an epoch is split: who they are, and how they act together.

The only room that imports torch.distributed. Ranks talk at the ends of epochs, never at a step.
"""

from infobatch_stream.distributed.groups import Groups
from infobatch_stream.distributed.process_group import collective
from infobatch_stream.distributed.ranks import Ranks

__all__ = ["Groups", "Ranks", "collective"]
