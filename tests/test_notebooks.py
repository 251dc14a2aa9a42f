"How the notebooks read, as far as it can be counted."
import ast
import json
import re
import statistics
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NBS = ROOT / "nbs"
NOTEBOOKS = [o for o in sorted(NBS.rglob("*.ipynb"))
             if not any(part.startswith((".", "_")) for part in o.relative_to(NBS).parts)]
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)

# What all library notebooks reach together. A change may raise these, and lowers none.
MEDIAN_LINES, LINES_OF_95_PERCENT, LARGEST_CELL = 12, 41, 95
ONE_DEFINITION, SHOWN, WORDS_PER_LINE = 0.98, 0.95, 2.8
METHODS_WITHOUT_EXAMPLE = 165
MODULES_ABOVE_500: dict[str, str] = {}
NOTEBOOKS_ABOVE_60_CELLS: dict[str, str] = {
    "600_tasks_saving": "what a checkpoint holds, shown part by part",
    "610_tasks_optimization": "freezing, averaging and schedules stand together in a fit",
    "620_tasks_prediction": "each kind of input that predict takes is tried"}
NOTEBOOKS_ABOVE_300_KB: dict[str, str] = {}


@dataclass
class Cell:
    "A cell of a notebook, and what can be read off it."
    kind: str
    source: str

    @property
    def directives(self) -> set[str]:
        return set(" ".join(re.findall(r"^#\s*\|\s*(.*)$", self.source, re.M)).split())

    @property
    def is_exported(self) -> bool:
        return self.kind == "code" and bool({"export", "exporti", "exports"} & self.directives)

    @property
    def is_visible(self) -> bool:
        "Whether it is code that a reader sees beside the exported code."
        return self.kind == "code" and not self.is_exported and "hide" not in self.directives

    @property
    def tree(self) -> ast.Module:
        plain = [o for o in self.source.splitlines() if not o.startswith(("%", "!"))]
        try: return ast.parse("\n".join(plain))
        except SyntaxError: return ast.parse("")

    @property
    def public(self) -> list[ast.stmt]:
        "Public functions and classes that it defines."
        return [o for o in self.tree.body if isinstance(o, DEFINITIONS)
                and not o.name.startswith("_")]

    @property
    def lines(self) -> int:
        """Lines of code: neither blank nor directives; of a signature one counts, of a docstring
        none."""
        spared: set[int] = set()
        for o in ast.walk(self.tree):
            if not isinstance(o, DEFINITIONS): continue
            first = o.body[0]
            if not isinstance(o, ast.ClassDef): spared |= set(range(o.lineno + 1, first.lineno))
            if isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str):
                spared |= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
        return sum(1 for i, o in enumerate(self.source.splitlines(), 1)
                   if o.strip() and not re.match(r"#\s*\|", o) and i not in spared)


@cache
def cells(path: Path) -> list[Cell]:
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [Cell(o["cell_type"], "".join(o["source"])) for o in found]


LIBRARY = [o for o in NOTEBOOKS if any(c.is_exported for c in cells(o))]
EXPORTED = [c for o in LIBRARY for c in cells(o) if c.is_exported]
# Everything that a reader sees run, tutorials included.
SEEN = "\n".join(c.source for o in NOTEBOOKS for c in cells(o) if c.is_visible)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda o: o.stem)
def test_the_title_and_its_line_stand_alone(path):
    """nbdev makes front matter of the first cell, and what else stands there is missing from the
    page."""
    first, second = cells(path)[:2]
    assert first.kind == "markdown"
    assert re.fullmatch(r"# .+\n\n> .+(\n\n(- \w+: .+\n?)+)?", first.source), first.source
    assert second.source.strip()


def test_each_notebook_has_a_number_of_its_own():
    """The first figure is its floor: core, backbones, parts, data, prediction, out, tasks,
    training, doors."""
    counts = Counter(o.stem[:3] for o in NBS.glob("[0-9][0-9][0-9]_*.ipynb"))
    assert counts and set(counts.values()) == {1}


def test_the_sidebar_holds_each_page_once():
    listed = re.findall(r"- ([\w/]+\.ipynb)", (NBS / "sidebar.yml").read_text(encoding="utf-8"))
    assert sorted(listed) == sorted(str(o.relative_to(NBS)) for o in NOTEBOOKS)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda o: o.stem)
def test_no_line_of_code_is_wider_than_the_page(path):
    assert [o for c in cells(path) if c.kind == "code" for o in c.source.splitlines()
            if len(o) > 100] == []


def test_rooms_are_small():
    "Modules of 500 lines, notebooks of 60 cells and 300 KB, but for those that say why."
    def lines(path: Path) -> int:
        "Lines without nbdev's marks of cells."
        text = path.read_text(encoding="utf-8").splitlines()
        return sum(not o.startswith("# %%") for o in text)
    large = {str(o.relative_to(ROOT / "autotimm")) for o in (ROOT / "autotimm").rglob("*.py")
             if o.name != "_modidx.py" and lines(o) > 500}
    assert large == set(MODULES_ABOVE_500)
    assert {o.stem for o in NOTEBOOKS if len(cells(o)) > 60} == set(NOTEBOOKS_ABOVE_60_CELLS)
    assert {o.stem for o in NOTEBOOKS if o.stat().st_size > 300_000} == set(NOTEBOOKS_ABOVE_300_KB)


def test_exported_cells_are_short():
    sizes = sorted(c.lines for c in EXPORTED)
    assert statistics.median(sizes) <= MEDIAN_LINES
    assert sizes[int(0.95 * (len(sizes) - 1))] <= LINES_OF_95_PERCENT and sizes[-1] <= LARGEST_CELL


def test_a_cell_defines_one_public_name():
    defining = [c for c in EXPORTED if c.public]
    assert sum(len(c.public) == 1 for c in defining) / len(defining) >= ONE_DEFINITION


def test_an_example_follows():
    "Within the next two visible cells that are not exported."
    shown = []
    for path in LIBRARY:
        every = cells(path)
        for i, cell in enumerate(every):
            if not cell.is_exported or not cell.public: continue
            after = [c.source for c in every[i + 1:] if c.is_visible][:2]
            shown.append(any(re.search(rf"\b{o.name}\b", text) for o in cell.public
                             for text in after))
    assert sum(shown) / len(shown) >= SHOWN


def test_there_is_prose():
    text = [re.sub(r"```.*?```", "", c.source, flags=re.S)
            for o in LIBRARY for c in cells(o) if c.kind == "markdown"]
    words = sum(len(re.findall(r"\w+", o)) for o in text)
    assert words / sum(c.lines for c in EXPORTED) >= WORDS_PER_LINE


def test_methods_are_shown():
    "By a call, or by `show_doc`."
    lacking = [f"{o.name}.{m.name}" for c in EXPORTED for o in c.public
               if isinstance(o, ast.ClassDef)
               for m in o.body if isinstance(m, DEFINITIONS) and not m.name.startswith("_")
               and m.name != "forward" and not re.search(rf"\.{m.name}\b", SEEN)]
    assert len(lacking) <= METHODS_WITHOUT_EXAMPLE, lacking


def test_every_public_name_has_an_example():
    import autotimm
    assert [o for o in autotimm.__all__ if not re.search(rf"\b{o}\b", SEEN)] == []


RETIRED = ["it takes all that takes, and any LightningModule", "has no box loss left",
           "What a model with classes has more than one without",
           "must have seen as many images each",
           "of little use to who did not train the model", "a place that answers for",
           "as sure as it is right"]


@pytest.mark.parametrize("sentence", RETIRED)
def test_riddles_do_not_come_back(sentence):
    assert [o.stem for o in NOTEBOOKS for c in cells(o)
            if sentence.lower() in c.source.lower()] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda o: o.stem)
def test_cells_of_imports_hold_only_imports(path):
    "nbdev runs every cell that imports something when it makes the pages, and that one alone."
    mixed = []
    for cell in cells(path):
        if cell.kind != "code" or cell.is_exported: continue
        kinds = {isinstance(o, ast.Import | ast.ImportFrom) for o in cell.tree.body}
        if len(kinds) > 1: mixed.append(cell.source[:80])
    assert mixed == []
