"""Measured against peers and limits, as ratios within one run. ``python -m benchmarks --help``."""
