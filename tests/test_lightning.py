"What Lightning keeps to itself is used in one module, on few lines."
import ast
from pathlib import Path

import lightning_fabric
import pytorch_lightning

ROOT = Path(__file__).parents[1]
LIGHTNING = ("pytorch_lightning", "lightning_fabric", "lightning")


def is_private(name: str) -> bool:
    "Whether a name begins with an underscore; a lone one names nothing."
    return name.startswith("_") and bool(name.strip("_")) and not name.endswith("__")


def defined(folder: Path, of_others: bool = True) -> set[str]:
    """The private names that the modules of a folder define: functions, classes, fields, attributes
    (also those they set on others)."""
    names: set[str] = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)): names.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                if of_others or isinstance(node.value,
                                           ast.Name) and node.value.id in ("self", "cls"):
                    names.add(node.attr)
            elif isinstance(node, ast.AnnAssign | ast.Assign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names |= {o.id for o in targets if isinstance(o, ast.Name)}
    return {name for name in names if is_private(name)}


def uses() -> dict[str, set[int]]:
    """Module -> lines that import or touch what is private in Lightning, or replace one of its
    methods."""
    theirs = set.union(*(defined(Path(o.__file__).parent)
                         for o in (pytorch_lightning, lightning_fabric)))
    # The last two are torchmetrics', whose Metric is the base of one of Lightning's classes.
    theirs -= defined(ROOT / "autotimm", of_others=False) | {"_computed", "_update_count"}
    found: dict[str, set[int]] = {}
    for path in sorted((ROOT / "autotimm").rglob("*.py")):
        lines = found.setdefault(str(path.relative_to(ROOT)), set())
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in LIGHTNING:
                if any(map(is_private, [*node.module.split("."), *(o.name for o in node.names)])):
                    lines.add(node.lineno)
            elif isinstance(node, ast.Attribute) and node.attr in theirs: lines.add(node.lineno)
            elif (isinstance(node, ast.Attribute) and node.attr == "process_dataloader"
                  and isinstance(node.ctx, ast.Store)):
                lines.add(node.lineno)
            elif isinstance(node, ast.Call | ast.Subscript | ast.Dict):
                keys = (node.args if isinstance(node, ast.Call) else node.values
                        if isinstance(node, ast.Dict) else [node.slice])
                if any(isinstance(o, ast.Constant) and o.value in theirs for o in keys):
                    lines.add(node.lineno)
    return {path: lines for path, lines in found.items() if lines}


def test_what_is_private_in_lightning_is_used_on_at_most_fifteen_lines():
    found = uses()
    assert sum(map(len, found.values())) <= 15, found
