"""What is pruned: policies turn a summary of the scores into a rule."""

from infobatch_stream.policies.base import Moment, Policy, Rule, Schedule, StepRule
from infobatch_stream.policies.budget import BudgetPruning
from infobatch_stream.policies.pruning import FullData, QuantilePruning, SoftPruning

__all__ = [
    "SoftPruning", "QuantilePruning", "BudgetPruning", "FullData", "Policy", "Rule", "Schedule", "StepRule", "Moment",
]  # fmt: skip
