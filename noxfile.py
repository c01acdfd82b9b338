"""Named runs of the checks, in the environment that is active: ``nox -s lint``. `.ci/run` is made of them.

``pip install -c constraints.txt -e ".[all,test]"`` is all that they need; docs needs the extra ``docs`` too.
Arguments behind ``--`` go to what a session runs, as in ``nox -s fast -- -n 2 --dist loadfile``.
"""

import nox

nox.options.sessions = ["lint", "types", "fast"]
nox.options.default_venv_backend = "none"


@nox.session
def lint(session: nox.Session) -> None:
    """Style, and what ruff can find."""
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Types of the library and its commands."""
    session.run("mypy")


@nox.session
def fast(session: nox.Session) -> None:
    """The tests of README's `pytest`: under six minutes on two idle cores."""
    session.run("pytest", *session.posargs)


@nox.session
def long(session: nox.Session) -> None:
    """The files that take longest, without the tests that take minutes each."""
    session.run("pytest", "-m", "long and not slow", "--durations=30", *session.posargs)


@nox.session
def full(session: nox.Session) -> None:
    """All tests, those that take minutes too: two hours."""
    session.run("pytest", "-m", "slow or not slow", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation as a site, in site/."""
    session.run("mkdocs", "build", "--strict", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Benchmarks, by name: ``nox -s bench -- planning wds``."""
    session.run("python", "-m", "benchmarks", *session.posargs)
