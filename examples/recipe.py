"""What a run is made of besides its model: the policy, and a learning rate that follows ``loader.progress``.

Pruned epochs have fewer steps, and how many is not known beforehand. So schedules here are functions of the progress
of the whole run, 0 to 1, and not of the number of a step.
"""

import argparse
import math

import torch

from infobatch_stream import BudgetPruning, FullData, QuantilePruning, SoftPruning

POLICIES = ("soft", "quantile", "budget", "full")


def add_policy_options(parser: argparse.ArgumentParser, default: str | None, fraction: float = 0.4) -> None:
    parser.add_argument("--policy", choices=POLICIES, default=default)
    parser.add_argument("--ratio", type=float, default=0.5, help="soft: share of the samples below the mean to skip")
    parser.add_argument("--quantiles", type=float, nargs="+", default=[0.20, 0.85], help="quantile: bands of losses")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.25, 0.5, 1.0], help="quantile: share kept of each")
    parser.add_argument("--fraction", type=float, default=fraction, help="budget: share of the whole run to skip")
    parser.add_argument("--delta", type=float, default=0.875, help="share of the epochs after which nothing is skipped")


def policy_of(args: argparse.Namespace):
    """The policy that ``args`` name."""
    if args.policy == "soft":
        return SoftPruning(args.ratio)
    if args.policy == "quantile":
        return QuantilePruning(args.quantiles, args.keep)
    return BudgetPruning(args.fraction) if args.policy == "budget" else FullData()


def one_cycle(progress: float, peak: float, start: float, end: float, pct_start: float = 0.3) -> float:
    """From ``start`` up to ``peak`` at ``pct_start``, then down to ``end``, each half a cosine (Smith, Topin 2017)."""
    if progress < pct_start:
        return _between(start, peak, progress / pct_start)
    return _between(peak, end, (progress - pct_start) / (1 - pct_start))


def cosine(progress: float, peak: float, warmup: float = 0.0) -> float:
    """From 0 to ``peak`` in a straight line at ``warmup``, then half a cosine down to 0."""
    if progress < warmup:
        return peak * progress / warmup
    return _between(peak, 0.0, (progress - warmup) / (1 - warmup))


def _between(first: float, last: float, share: float) -> float:
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * share))


def set_rates(optimizer: torch.optim.Optimizer, lr: float, momentum: float | None = None) -> None:
    """Give all parameters this learning rate, and this momentum (Adam's and LAMB's first beta) if there is one."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        if momentum is not None and "betas" in group:
            group["betas"] = (momentum, group["betas"][1])
        elif momentum is not None:
            group["momentum"] = momentum
