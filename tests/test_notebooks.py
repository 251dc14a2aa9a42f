"How the notebooks read, as far as it can be counted."
import json
import re
from collections import Counter
from pathlib import Path

import pytest

NBS = Path(__file__).parents[1] / "nbs"
NOTEBOOKS = [o for o in sorted(NBS.rglob("*.ipynb")) if not any(part.startswith((".", "_")) for part in o.relative_to(NBS).parts)]


def cells(path: Path) -> list[tuple[str, str]]:
    "Kind and text of each cell."
    return [(o["cell_type"], "".join(o["source"])) for o in json.loads(path.read_text(encoding="utf-8"))["cells"]]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda o: o.stem)
def test_the_title_and_its_line_stand_alone(path):
    "nbdev makes front matter of the first cell, and what else stands there is missing from the page."
    first, second = cells(path)[:2]
    assert first[0] == "markdown" and re.fullmatch(r"# .+\n\n> .+(\n\n(- \w+: .+\n?)+)?", first[1]), first[1]
    assert second[1].strip()


def test_each_notebook_has_a_number_of_its_own():
    "The first figure is its floor: core, backbones, parts, data, prediction, out, tasks, training, doors."
    counts = Counter(o.stem[:2] for o in NBS.glob("[0-9][0-9]_*.ipynb"))
    assert counts and set(counts.values()) == {1}


def test_the_sidebar_holds_each_page_once():
    listed = re.findall(r"- ([\w/]+\.ipynb)", (NBS / "sidebar.yml").read_text(encoding="utf-8"))
    assert sorted(listed) == sorted(str(o.relative_to(NBS)) for o in NOTEBOOKS)
