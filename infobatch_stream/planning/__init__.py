"""Which samples each step holds: pure functions, NumPy only."""
