"""The README's Python, run as it stands there."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_there_are_snippets():
    assert len(SNIPPETS) == 2


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_a_snippet_runs_and_gives_what_its_comments_say(snippet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my_faster_rcnn.yaml").write_text("MODEL:\n  MASK_ON: True\n")
    names: dict[str, object] = {}
    exec(compile(snippet, "README.md", "exec"), names)
    if "cfg" in names:
        assert names["cfg"].MODEL.MASK_ON
    else:
        assert tuple(names["pyramid"]["p5"].shape) == (1, 256, 10, 15)
        last = [line for line in snippet.splitlines() if line.startswith(("assign", "pooler("))]
        levels, pooled = (eval(line.partition("  #")[0], names) for line in last)
        assert f"tensor({levels.tolist()})" in last[0]
        assert str(tuple(pooled.shape)) in last[1]
