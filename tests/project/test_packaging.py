"""What is published: sdist and wheel are made, pass the checks of PyPI, and hold all that runs."""

import os
import shutil
import subprocess
import sys
import tomllib
import venv

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from support.paths import ROOT

PARTS = ("infobatch_stream", "tools", "pyproject.toml", "README.md", "LICENSE")


def run(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The folder of sdist and wheel, as ``python -m build`` makes them (of what is installed: nothing is fetched)."""
    pytest.importorskip("build", reason="needs the extra 'test'")
    folder = tmp_path_factory.mktemp("published")
    (folder / "source").mkdir()
    for part in PARTS:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, folder / "source" / part)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", folder / "source")
    return folder / "dist"


def test_sdist_and_wheel_pass_the_checks_of_the_index(published):
    files = sorted(published.iterdir())
    assert [file.suffix for file in files] == [".whl", ".gz"]
    said = run(sys.executable, "-m", "twine", "check", "--strict", *files)
    assert said.count("PASSED") == 2


def test_the_wheel_works_where_nothing_else_of_the_project_is(published, tmp_path):
    """In an environment of its own, which borrows only the dependencies from this one."""
    venv.create(tmp_path / "env", with_pip=False)
    (wheel,) = published.glob("*.whl")
    site = next((tmp_path / "env").glob("lib/python*/site-packages"))
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", site, wheel)
    borrowed = [path for path in sys.path if path.endswith("site-packages")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), *borrowed]), "PYTHONSAFEPATH": "1"}
    python = tmp_path / "env" / "bin" / "python"
    code = """
import importlib, pkgutil, infobatch_stream
print(infobatch_stream.__file__)
for found in pkgutil.walk_packages(infobatch_stream.__path__, "infobatch_stream."):
    if not found.name.endswith("__main__") and "composer" not in found.name:  # which is not installed here
        importlib.import_module(found.name)
"""
    said = run(python, "-c", code, cwd=tmp_path, env=environment)
    assert said.startswith(str(site))
    said = run(python, "-m", "infobatch_stream.tools", "--version", cwd=tmp_path, env=environment)
    assert "infobatch-stream" in said
    run(
        python,
        "-c",
        "from infobatch_stream import ScoreStore; ScoreStore.create('s.zarr', 3)",
        cwd=tmp_path,
        env=environment,
    )
    run(python, "-m", "infobatch_stream.tools", "report", "s.zarr", cwd=tmp_path, env=environment)  # by its templates
    assert "<h1>s.zarr</h1>" in (tmp_path / "report.html").read_text()


def test_constraints_for_pip_are_the_versions_of_the_lock_of_uv():
    locked = tomllib.loads((ROOT / "uv.lock").read_text())["package"]
    versions = {(one["name"], one["version"]) for one in locked if "editable" not in one["source"]}
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert {tuple(line.split(" ;")[0].split("==")) for line in lines} == versions


def test_the_lock_of_uv_was_made_of_the_dependencies_as_they_are():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    locked = tomllib.loads((ROOT / "uv.lock").read_text())["package"]
    (project,) = (one for one in locked if "editable" in one["source"])
    known = {(one["name"], one.get("specifier", "")) for one in project["metadata"]["requires-dist"]}
    for line in [
        *declared["dependencies"],
        *(one for extra in declared["optional-dependencies"].values() for one in extra),
    ]:
        wanted = Requirement(line)
        found = {SpecifierSet(bounds) for name, bounds in known if name == canonicalize_name(wanted.name)}
        assert wanted.specifier in found, f"{line}: run 'uv lock', then make constraints.txt (docs/installing.md)"
