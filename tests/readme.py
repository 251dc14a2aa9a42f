"""README.md is what nbs/index.ipynb shows, and the site's gallery what other notebooks show.

`python tests/readme.py --write` makes both anew; without it, exit 1 on a difference.
"""
import base64
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SITE_ONLY = "<!-- on the site alone -->"  # cells of the index that README.md leaves out
GALLERY = ROOT / "nbs" / "images" / "gallery"


def render(notebook: Path) -> str:
    """The notebook as Markdown: text as it is, code in fences, text outputs indented; hidden cells
    left out."""
    parts = []
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"]).strip()
        if not source or source.startswith(("#| hide", SITE_ONLY)): continue
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            text = "".join(output.get("text",
                                      output.get("data", {}).get("text/plain", []))).rstrip()
            if text: parts.append("\n".join(f"    {line}" for line in text.splitlines()))
    note = "<!-- Made from nbs/index.ipynb by tests/readme.py: edit that notebook. -->"
    # Pictures lie beside the notebook, and README.md a folder above it.
    return "\n\n".join([note, *parts]).replace("](images/", "](nbs/images/") + "\n"


def gallery() -> dict[str, bytes]:
    "Pictures by name: of the cells labelled `gallery-NAME`, the last that each of them shows."
    found = {}
    for notebook in sorted((ROOT / "nbs").rglob("*.ipynb")):
        for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
            label = re.search(r"^#\|\s*label:\s*gallery-([\w-]+)", "".join(cell["source"]), re.M)
            if not label: continue
            pictures = [o["data"]["image/png"] for o in cell["outputs"]
                        if "image/png" in o.get("data", {})]
            assert pictures, f"{notebook.name}: cell gallery-{label[1]} shows no picture"
            assert label[1] not in found, f"two cells are labelled gallery-{label[1]}"
            found[label[1]] = base64.b64decode("".join(pictures[-1]))
    return found


def main() -> int:
    wanted, readme = render(ROOT / "nbs" / "index.ipynb"), ROOT / "README.md"
    if "--write" in sys.argv:
        readme.write_text(wanted, encoding="utf-8")
        GALLERY.mkdir(exist_ok=True)
        for old in GALLERY.iterdir(): old.unlink()
        for name, picture in gallery().items(): (GALLERY / f"{name}.png").write_bytes(picture)
    same = readme.read_text(encoding="utf-8") == wanted
    print("README.md agrees with nbs/index.ipynb." if same
          else "README.md differs from nbs/index.ipynb: python tests/readme.py --write")
    return 0 if same else 1


if __name__ == "__main__": sys.exit(main())
