"""What the gate leaves out has a short form that it runs: else nobody sees that it has not worked for months."""

import ast

import pytest
from support.paths import TESTS

FILES = sorted(TESTS.rglob("test_*.py"))


def is_slow(node):
    """Whether this is pytest.mark.slow, called or not."""
    return ast.unparse(node.func if isinstance(node, ast.Call) else node) == "pytest.mark.slow"


def decorators_of(code):
    """(name, decorators) of each test in ``code``."""
    return {node.name: node.decorator_list for node in ast.walk(ast.parse(code)) if isinstance(node, ast.FunctionDef)}


def rotting(code):
    """Tests that are slow as a whole, and do not name one that is not, of the same file, as their short form.

    A test of which only some parameters are slow is its own short form.
    """
    tests = decorators_of(code)
    for name, decorators in tests.items():
        for mark in filter(is_slow, decorators):
            options = {} if not isinstance(mark, ast.Call) else {one.arg: one.value for one in mark.keywords}
            short = ast.literal_eval(options["short"]) if "short" in options else None
            if short not in tests or any(map(is_slow, tests[short])):
                yield name


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_slow_test_has_a_short_form(file):
    assert list(rotting(file.read_text())) == []


@pytest.mark.parametrize(
    ("mark", "found"),
    [
        ("@pytest.mark.slow", ["test_a"]),
        ("@pytest.mark.slow(short='test_c')", ["test_a"]),
        ("@pytest.mark.slow(short='test_a')", ["test_a"]),
        ("@pytest.mark.slow(short='test_b')", []),
        ("@pytest.mark.parametrize('a', [1, pytest.param(2, marks=pytest.mark.slow)])", []),
    ],
)
def test_one_without_is_found(mark, found):
    assert list(rotting(f"{mark}\ndef test_a(): ...\ndef test_b(): ...")) == found
