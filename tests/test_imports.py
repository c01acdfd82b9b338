"""Which module may import which: the planning is free of torch and I/O, and imports point one way."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import infobatch_stream

ROOT = Path(infobatch_stream.__file__).parent
PURE = ["policies", "budget", "draws", "summary", "selection", "bits", "kept", "recent", "shuffle", "lanes", "plan"]
# None of these does I/O.
STANDARD = ["collections", "dataclasses", "enum", "functools", "itertools", "math", "threading", "typing"]


def name_of(file):
    parts = ("infobatch_stream", *file.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(file): ast.parse(file.read_text()) for file in ROOT.rglob("*.py")}


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
            assert node.level == 0, f"{module} has a relative import"
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inside & MODULES.keys()) or {node.module}
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
    assert {"infobatch_stream", "infobatch_stream.sources.mds", "infobatch_stream.store"} <= MODULES.keys()


@pytest.mark.parametrize("module", PURE)
def test_planning_imports_neither_torch_nor_zarr_nor_anything_that_does(module):
    reached = all_imports(f"infobatch_stream.{module}")
    assert {name.split(".")[0] for name in reached} <= {"infobatch_stream", "numpy", *STANDARD}
    assert not reached & {f"infobatch_stream.{other}" for other in ("store", "layout", "loader", "sync", "sources")}


def test_planning_runs_in_a_python_that_has_neither_torch_nor_zarr(bare_python):
    code = f"""
import importlib
import numpy as np
sys.modules.update(dict.fromkeys(["torch", "zarr", "streaming", "webdataset"]))  # importing them fails
for module in {PURE}:
    importlib.import_module("infobatch_stream." + module)
from infobatch_stream.plan import EpochPlan
from infobatch_stream.policies import SoftPruning
print(EpochPlan(np.arange(100, dtype=np.float32), SoftPruning(), seed=0, epoch=0, global_batch=10).kept)
"""
    assert 50 < int(bare_python(code)) < 100


def test_the_store_runs_without_torch(bare_python):
    assert bare_python("import infobatch_stream.store; print('torch' in sys.modules)").strip() == "False"


def test_only_sync_touches_torch_distributed():
    def touches(module):
        named = any(name.startswith("torch.distributed") for name in imports(module))
        used = any(
            isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.distributed")
            for node in nodes(MODULES[module])
        )
        return named or used

    assert {module for module in MODULES if touches(module)} == {"infobatch_stream.sync"}


def test_no_source_imports_the_loader():
    sources = [module for module in MODULES if module.startswith("infobatch_stream.sources")]
    assert len(sources) > 3
    for module in sources:
        assert not {"infobatch_stream.loader", "infobatch_stream.plan", "infobatch_stream.store"} & all_imports(module)


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
                assert "webdataset" not in ast.unparse(node).split(" import ")[0], module
