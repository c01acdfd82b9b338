"""Which module may import which: floors, of which each knows only those below it, and rooms beside each other."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import infobatch_stream
from infobatch_stream import tools

ROOTS = {
    "infobatch_stream": Path(infobatch_stream.__file__).parent,
    "infobatch_stream.tools": Path(tools.__file__).parent,
}
# None of these does I/O.
STANDARD = ["collections", "dataclasses", "enum", "functools", "itertools", "math", "operator", "re", "threading"]
STANDARD += ["typing"]
FLOORS = [
    ["errors"],
    [
        *("_files", "_formatting", "_platform", "_pool", "_process_wide", "_urls", "_validation"),
        *("augmentation", "picks", "pinned_ring", "sample_file", "score_stats"),
    ],
    ["distributed", "per_sample"],
    ["policies"],
    ["planning"],
    ["formats"],
    ["store", "sources"],
    ["workers"],
    ["checkpoint", "curriculum", "initial_scores", "losses", "recorder"],
    ["run_store"],
    ["run"],
    ["loader_facts"],
    ["loader"],
    [""],  # the package's __init__: what users import
    ["frameworks", "live"],
    ["convert", "report", "verify"],
    ["demo"],
    ["tools"],
]
"""From the bottom up. A module imports from lower floors, and from its own room; not from the room beside."""


def name_of(root, file):
    parts = (root, *file.relative_to(ROOTS[root]).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(root, file): ast.parse(file.read_text()) for root in ROOTS for file in ROOTS[root].rglob("*.py")}
PURE = sorted(name for name in MODULES if name.split(".")[1:2] in (["policies"], ["planning"], ["score_stats"]))


def room_of(module):
    return (*module.split("."), "")[1]


def floor_of(module):
    return next(floor for floor, rooms in enumerate(FLOORS) if room_of(module) in rooms)


def is_type_checking(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def nodes(tree):
    """Everything that can run: not what only a type checker reads."""
    for child in ast.iter_child_nodes(tree):
        if not is_type_checking(child):
            yield child
            yield from nodes(child)


def imports(module):
    """Full names of the modules that ``module`` imports, inside functions too."""
    found = set()
    for node in nodes(MODULES[module]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # Where the commands lie is not how they are called: their imports of each other are relative.
            assert node.level == 0 or room_of(module) == "tools", f"{module} has a relative import"
            base = f"infobatch_stream.tools.{node.module}" if node.level else node.module
            inside = {f"{base}.{alias.name}" for alias in node.names}
            found |= (inside & MODULES.keys()) or {base}
            # "from package import module" and "from torch import distributed"
            found |= {name for name in inside if not name.startswith("infobatch_stream")}
    return found


def inner_imports(module):
    return {name for name in imports(module) if name in MODULES}


def all_imports(module):
    """What ``module`` imports, itself or through other modules of the package (not through its __init__)."""
    found, waiting = set(), [module]
    while waiting:
        new = imports(waiting.pop()) - found
        found |= new
        waiting += [name for name in new if name in MODULES]
    return found


def test_every_module_was_found():
    assert {"infobatch_stream", "infobatch_stream.sources.mds.source", "infobatch_stream.tools.app"} <= MODULES.keys()


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_down_and_not_into_the_room_beside(module):
    for name in inner_imports(module):
        assert floor_of(name) < floor_of(module) or room_of(name) == room_of(module), name


@pytest.mark.parametrize("module", PURE)
def test_planning_imports_neither_torch_nor_zarr_nor_anything_that_does(module):
    assert {name.split(".")[0] for name in all_imports(module)} <= {"infobatch_stream", "numpy", *STANDARD}


def test_planning_runs_in_a_python_that_has_neither_torch_nor_zarr(bare_python):
    code = f"""
import importlib
import numpy as np
sys.modules.update(dict.fromkeys(["torch", "zarr", "streaming", "webdataset"]))  # importing them fails
for module in {PURE}:
    importlib.import_module(module)
from infobatch_stream.planning.epoch_plan import EpochPlan
from infobatch_stream.policies import SoftPruning
print(EpochPlan(np.arange(100, dtype=np.float32), SoftPruning(), seed=0, epoch=0, global_batch=10).kept)
"""
    assert 50 < int(bare_python(code)) < 100


def test_the_store_runs_without_torch(bare_python):
    assert bare_python("import infobatch_stream.store; print('torch' in sys.modules)").strip() == "False"


def test_only_one_module_touches_torch_distributed():
    def touches(module):
        named = any(name.startswith("torch.distributed") for name in imports(module))
        used = any(
            isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.distributed")
            for node in nodes(MODULES[module])
        )
        return named or used

    touching = {module for module in MODULES if touches(module)}
    assert {room_of(name) for name in touching} == {"demo", "distributed"}


def test_nothing_but_the_package_itself_imports_the_loader():
    assert [module for module in MODULES if "infobatch_stream.loader" in imports(module)] == ["infobatch_stream"]


def test_imports_have_no_cycle():
    list(TopologicalSorter({module: inner_imports(module) for module in MODULES}).static_order())


def test_the_adapters_libraries_are_imported_only_where_they_are_used():
    """``import infobatch_stream`` must not take the seconds that streaming takes."""
    for module, tree in MODULES.items():
        for node in tree.body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert "streaming" not in ast.unparse(node).replace("infobatch_stream", ""), module
                assert "webdataset" not in ast.unparse(node).replace("sources.webdataset", "").split(" import ")[0], (
                    module
                )


@pytest.mark.parametrize("module", sorted(name for name in MODULES if room_of(name) in ("frameworks", "live")))
def test_adapters_use_what_every_user_of_a_loader_has(module):
    for node in nodes(MODULES[module]):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("loader", "self._loader"):
            assert not node.attr.startswith("_"), ast.unparse(node)
