"""The pages of the documentation, without Quarto: processed by nbdev, rendered by nbconvert.

`python tests/pages.py FOLDER` writes them there, to look at in a browser.
"""
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from urllib.parse import unquote, urldefrag

import yaml
from bs4 import BeautifulSoup
from nbconvert import HTMLExporter
from nbconvert.preprocessors import TagRemovePreprocessor
from nbformat import NotebookNode, reads

ROOT = Path(__file__).parents[1]


def process(to: Path) -> Path:
    """A copy of the checkout in `to`, with its notebooks processed as nbdev does before Quarto
    renders them."""
    listed = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard"],
                                     cwd=ROOT, text=True)
    for name in listed.splitlines():
        source = ROOT / name
        if not source.exists() or name.split("/")[0] not in ("nbs", "autotimm",
                                                             "pyproject.toml", "_quarto.yml"):
            continue
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, to / name)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"}
    done = subprocess.run([sys.executable, "-c", "from nbdev.serve import proc_nbs; proc_nbs()"],
                          cwd=to, env=env,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return to / "_proc"


def directives(source: str) -> dict[str, str]:
    "`#| name: value` of a cell."
    return dict(re.findall(r"^#\s*\|\s*([\w-]+):?\s*(.*)$", source, re.M))


def anchor(heading: str) -> str:
    "The id that pandoc gives a heading."
    kept = "".join(o for o in heading.lower() if o.isalnum() or o in "_-. ")
    return re.sub(r"^[^a-z]+", "", re.sub(r"\s+", "-", kept.strip()))


def words(text: str) -> str:
    "The letters and figures of a text, one space between its words."
    return " ".join(re.findall(r"\w+", text))


@cache
def exporter() -> HTMLExporter:
    "Markdown, code and outputs as HTML, without the code of cells that ask for it."
    made = HTMLExporter(template_name="lab", exclude_input_prompt=True, exclude_output_prompt=True)
    hidden = TagRemovePreprocessor(enabled=True, remove_input_tags={"no-code"})
    made.register_preprocessor(hidden, enabled=True)
    return made


@dataclass
class Page:
    "A page as a reader gets it."
    source: Path                 # the notebook
    processed: Path              # what nbdev made of it
    root: Path                   # folder of processed notebooks
    name: str = field(init=False)

    def __post_init__(self) -> None:
        front = yaml.safe_load(self.front.strip().strip("-")) if self.front else {}
        self.title, self.description = front.get("title", ""), front.get("description", "")
        made = front.get("output-file") or self.processed.with_suffix(".html").name
        self.name = str(self.processed.parent.relative_to(self.root) / made)

    @cached_property
    def notebook(self) -> NotebookNode:
        return reads(self.processed.read_text(encoding="utf-8"), as_version=4)

    @cached_property
    def front(self) -> str:
        first = self.notebook.cells[0]
        return first.source if first.cell_type == "raw" else ""

    @cached_property
    def html(self) -> BeautifulSoup:
        "The page, its headings with the ids that Quarto gives them."
        cells = [NotebookNode(cell_type="markdown", id="title", metadata={},
                              source=f"# {self.title}\n\n> {self.description}")]
        for cell in self.notebook.cells:
            if cell.cell_type == "raw": continue
            asked = directives(cell.source) if cell.cell_type == "code" else {}
            kept = NotebookNode(cell_type=cell.cell_type, id=f"cell-{len(cells)}",
                                source=cell.source, metadata=NotebookNode(tags=[]))
            if asked.get("echo") == "false": kept.metadata.tags.append("no-code")
            if cell.cell_type == "code":
                kept.update(source=re.sub(r"^#\s*\|.*\n?", "", cell.source, flags=re.M),
                            outputs=cell.outputs, execution_count=None)
            cells.append(kept)
        whole = NotebookNode(nbformat=4, nbformat_minor=5, cells=cells, metadata=NotebookNode(
            kernelspec=NotebookNode(name="python3", display_name="Python", language="python")))
        text = re.sub(r"\{target=\"_blank\"[^}]*\}", "", exporter().from_notebook_node(whole)[0])
        soup, used = BeautifulSoup(text, "html.parser"), set()
        for heading in soup.find_all(re.compile(r"h[1-6]$")):
            for link in heading.find_all("a", class_="anchor-link"): link.decompose()
            first = anchor(heading.get_text())
            heading["id"] = next(o for o in (first, *(f"{first}-{n}" for n in range(1, 99)))
                                 if o not in used)
            used.add(heading["id"])
        return soup

    @property
    def anchors(self) -> set[str]: return {o["id"] for o in self.html.find_all(id=True)}

    @property
    def text(self) -> str: return words(self.html.body.get_text(" "))


class Site:
    "All pages, and where a link between them leads."
    def __init__(self, folder: Path):
        self.root = process(folder)
        sources = folder / "nbs"
        self.pages = [Page(sources / o.relative_to(self.root), o, self.root)
                      for o in sorted(self.root.rglob("*.ipynb"))]
        self.by_name = {o.name: o for o in self.pages}
        settings = json.loads(subprocess.check_output(
            [sys.executable, "-c", "import json; from autotimm._modidx import d; "
                                   "print(json.dumps(d['settings']))"], text=True, cwd=ROOT))
        self.address = settings["doc_host"] + settings["doc_baseurl"] + "/"
        self.blob = f"{settings['git_url']}/blob/{settings['branch']}/"

    def target(self, page: Page, link: str) -> "Page | Path | None":
        "The page or file that a link without its anchor means; None when it leads away."
        path = unquote(urldefrag(link)[0])
        if path.startswith(self.blob): return ROOT / path.removeprefix(self.blob)
        if path.startswith(self.address): path = "/" + path.removeprefix(self.address)
        elif re.match(r"\w+:", path): return None
        if not path: return page
        base = self.root if path.startswith("/") else page.processed.parent
        place = Path(os.path.normpath(base / path.lstrip("/")))
        for other in self.pages:
            if place in (other.processed, self.root / other.name): return other
        return place

    def write(self, to: Path) -> None:
        "The pages as files, with links from one to the other and a sidebar of them all."
        shutil.copytree(self.root, to, dirs_exist_ok=True,
                        ignore=shutil.ignore_patterns("*.ipynb", "*.yml"))
        for page in self.pages:
            soup = BeautifulSoup(str(page.html), "html.parser")
            for link in soup.find_all("a", href=True):
                goal = self.target(page, link["href"])
                if isinstance(goal, Page):
                    here = os.path.relpath(goal.name, Path(page.name).parent)
                    link["href"] = here + ("#" + urldefrag(link["href"])[1] if "#" in link["href"]
                                           else "")
            (to / page.name).parent.mkdir(parents=True, exist_ok=True)
            (to / page.name).write_text(str(soup), encoding="utf-8")


if __name__ == "__main__":
    import tempfile
    out = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder: Site(Path(folder)).write(out)
    print(f"{len(list(out.rglob('*.html')))} pages in {out}")
