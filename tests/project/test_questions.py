"""What docs/questions.md shows runs."""

import re

import numpy as np
import pytest
from support.paths import ROOT

from infobatch_stream.convert import write_shards

PAGE = (ROOT / "docs" / "questions.md").read_text()


@pytest.mark.usefixtures("no_stale_shared_memory")
def test_word_labels_are_numbered_and_every_sample_is_evaluated_once_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["horse", "cat", "dog", "cat", "dog"] * 20
    write_shards(
        ({"image": np.full(4, n, np.uint8), "label": word} for n, word in enumerate(words)), "words-mds", "mds"
    )
    seen = []
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)).replace(
        "    ...", "    seen.append(labels)"
    )
    exec(compile(code, "questions.md", "exec"), {"seen": seen})
    assert [int(label) for batch in seen for label in batch] == [["cat", "dog", "horse"].index(word) for word in words]
