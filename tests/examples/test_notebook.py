"""The notebook runs from its first cell to its last, without a network, and shows what it says."""

import json
import sys
from types import ModuleType

import pytest
import torch
from support.paths import ROOT

CELLS = json.loads((ROOT / "examples" / "digits.ipynb").read_text())["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]


def test_it_is_kept_without_outputs():
    assert not any(cell["outputs"] or cell["execution_count"] for cell in CELLS if cell["cell_type"] == "code")


@pytest.mark.usefixtures("no_stale_shared_memory", "few_open_files")
def test_all_cells_run_and_end_in_a_report_with_pictures(tmp_path, monkeypatch, capsys):
    shown = []
    notebook = ModuleType("IPython.display")  # there is one wherever a notebook is opened
    notebook.HTML, notebook.display = str, shown.append
    monkeypatch.setitem(sys.modules, "IPython.display", notebook)
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    names, threads = {"__name__": "__main__"}, torch.get_num_threads()
    try:
        for number, code in enumerate(CODE):
            exec(compile(code, f"cell {number} of digits.ipynb", "exec"), names)
    finally:
        torch.set_num_threads(threads)
    full, pruned, fewer = names["results"].values()
    assert min(full[:, 0].mean(), pruned[:, 0].mean(), fewer[:, 0].mean()) > 0.93
    assert 0.2 < names["saved"] < 0.45
    assert fewer[:, 1].mean() == pytest.approx(pruned[:, 1].mean(), rel=0.05)
    assert "fewer samples" in capsys.readouterr().out
    (page,) = shown
    assert page.startswith("<iframe srcdoc=")
    assert "data:image/" in page
