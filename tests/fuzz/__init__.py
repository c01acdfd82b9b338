"""Fuzzing of what reads files: ``python -m tests.fuzz`` for long, tests/project/test_fuzz.py for seconds."""
