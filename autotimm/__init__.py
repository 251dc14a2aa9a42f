"""Train vision models: any timm or transformers backbone, any task, one trainer.

The public names stand in `__init__.pyi`, for type checkers and for lazy_loader, which imports each when it is first
used: `import autotimm` costs milliseconds.
"""
import importlib
import os
from typing import Any

import lazy_loader

_ALIASES = {"head": "heads", "loss": "losses", "metric": "metrics", "metrics_module": "metrics", "task": "tasks"}
_attach, __dir__, _names = lazy_loader.attach_stub(__name__, __file__)
_files = {name.split(".")[0] for name in os.listdir(os.path.dirname(__file__))}
__all__ = [name for name in _names if name not in _files]  # a star import brings the names, not the modules


def __getattr__(name: str) -> Any:
    if name == "__version__": return importlib.import_module("importlib.metadata").version("autotimm")
    if name in _ALIASES: return importlib.import_module(f"autotimm.{_ALIASES[name]}")
    return _attach(name)
