"""What is pruned: policies turn a summary of the scores into a rule."""

from infobatch_stream.policies.base import Moment, Policy, Rule, Schedule, StepRule
from infobatch_stream.policies.budget import BudgetPruning
from infobatch_stream.policies.kakurenbo import KakurenboPruning
from infobatch_stream.policies.order import OrderPruning
from infobatch_stream.policies.pruning import FullData, QuantilePruning, SoftPruning
from infobatch_stream.policies.seta import SetaPruning

__all__ = [
    "SoftPruning", "QuantilePruning", "BudgetPruning", "FullData", "SetaPruning", "OrderPruning", "KakurenboPruning",
    "Policy", "Rule", "Schedule", "StepRule", "Moment",
]  # fmt: skip
