"""Fuzzing of what reads files: ``python -m tests.fuzz`` for long, tests/test_fuzz.py for seconds."""
