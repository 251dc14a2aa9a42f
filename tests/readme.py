"""README.md is what nbs/index.ipynb shows. `python tests/readme.py --write` makes it anew; without it, exit 1 on a difference."""
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def render(notebook: Path) -> str:
    "The notebook as Markdown: text as it is, code in fences, text outputs indented; hidden cells left out."
    parts = []
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"]).strip()
        if not source or source.startswith("#| hide"): continue
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            text = "".join(output.get("text", output.get("data", {}).get("text/plain", []))).rstrip()
            if text: parts.append("\n".join(f"    {line}" for line in text.splitlines()))
    note = "<!-- Made from nbs/index.ipynb by tests/readme.py: edit that notebook. -->"
    # Pictures lie beside the notebook, and README.md a folder above it.
    return "\n\n".join([note, *parts]).replace("](images/", "](nbs/images/") + "\n"


def main() -> int:
    wanted, readme = render(ROOT / "nbs" / "index.ipynb"), ROOT / "README.md"
    if "--write" in sys.argv: readme.write_text(wanted, encoding="utf-8")
    same = readme.read_text(encoding="utf-8") == wanted
    print("README.md agrees with nbs/index.ipynb." if same else "README.md differs from nbs/index.ipynb: python tests/readme.py --write")
    return 0 if same else 1


if __name__ == "__main__": sys.exit(main())
