"""README's Python examples run as they stand, and every file that the documents link to is there."""

import contextlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example_runs(number):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(EXAMPLES[number], f"README.md, example {number}", "exec"), {"__name__": "example"})
    text = printed.getvalue()
    assert "batch_norm" in text or text.count(" ok\n") == text.count("\n") >= 9, text


def test_there_is_an_example_for_each_kind_of_user():
    assert len(EXAMPLES) >= 2


@pytest.mark.parametrize(
    "document",
    [
        "README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md")),
    ],
)
def test_links_and_paths_lead_somewhere(document):
    text = (ROOT / document).read_text()
    links = re.findall(r"\]\((?!http)([^)#]+)", text)
    missing = [link for link in links if not ((ROOT / document).parent / link).exists()]
    paths = re.findall(r"`((?:csrc|pyops|kernels|tests|bench|docs|requirements)/[\w/.-]*\w)`", text)
    missing += [path for path in paths if not (ROOT / path).exists()]
    assert missing == []
