"""What the benchmarks share: interleaved timing and Markdown tables."""
import logging
import os
import platform
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence

import torch


def interleave(sides: Mapping[str, Callable[[], float]], runs: int = 7) -> dict[str, list[float]]:
    """What each side returns, run in turn `runs` times after one round that does not count; the
    order alternates."""
    for side in sides.values(): side()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(runs):
        for name in list(sides)[::1 if i % 2 == 0 else -1]: times[name].append(sides[name]())
    return times


def ratio(times: Mapping[str, Sequence[float]], a: str, b: str) -> float:
    "Median over the pairs of the time of `a` over that of `b`."
    return statistics.median(x / y for x, y in zip(times[a], times[b]))


def table(rows: Sequence[Sequence[object]], columns: Sequence[str]) -> str:
    "Rows as a Markdown table."
    lines = [columns, ["---"] * len(columns), *[[str(o) for o in row] for row in rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def keep_quiet() -> None:
    "Leave warnings and Lightning's information out of the output."
    warnings.filterwarnings("ignore")
    for name in ("pytorch_lightning", "pytorch_lightning.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)


def machine() -> str:
    "The machine, what else it had to do, and the versions that matter, in a line."
    import timm
    device = (torch.cuda.get_device_name() if torch.cuda.is_available()
              else f"{torch.get_num_threads()} CPU threads")
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return f"Python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}, {device}{load}"
