"""Trains a route in one process or, run as a script, in two; both see the same batches."""
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hf_routes import ROUTES, make_set, quiet, weights
from torch.utils.data import DataLoader


def train(root: Path, route: str, kind: str, processes: int) -> dict[str, Any]:
    """Fit and test; what came of it.

    A step takes the whole training set, so that it does not matter how a sampler shares it out.
    Each rank starts from
    other weights: those of rank 0 must win."""
    model = ROUTES[route].build(seed=int(os.environ.get("LOCAL_RANK", 0)), sgd=True)
    cls: Any = pl.Trainer
    if kind == "autotrainer":
        from autotimm import AutoTrainer
        cls = AutoTrainer
    how = quiet(root, max_epochs=4, logger=False, devices=processes, num_sanity_val_steps=0)
    trainer = cls(**how, **(dict(strategy="ddp") if processes > 1 else {}),
                  **(dict(enable_checkpointing=False) if cls is pl.Trainer else {}))
    data = [DataLoader(make_set(n, seed=seed), batch_size=n // parts // processes) for n, seed,
            parts in ((16, 0, 1), (24, 1, 3))]
    trainer.fit(model, *data)
    fitted = {k: float(v) for k, v in trainer.callback_metrics.items()}
    steps, state = trainer.global_step, weights(model)
    tested = trainer.test(model, data[1], ckpt_path=None, verbose=False)[0]
    found = dict(rank=trainer.global_rank, world_size=trainer.world_size, steps=steps,
                 weights=state, metrics={**fitted, **tested})
    if kind == "lightning": return found
    return {**found, "best": trainer.best_model_path, "last": trainer.last_model_path,
            "history": trainer.history}


def in_one_process(root: Path, route: str, kind: str = "autotrainer") -> dict[str, Any]:
    "What one process comes to."
    return train(root / "one" / route, route, kind, 1)


def in_two_processes(root: Path, routes: list[str],
                     kind: str = "autotrainer") -> dict[str, list[dict[str, Any]]]:
    "What each of two processes comes to with each route, in the order of their ranks."
    out = root / "two"
    out.mkdir()
    paths = os.pathsep.join(str(o) for o in (Path(__file__).parents[1], Path(__file__).parent))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, __file__, str(out), kind, *routes],
                          capture_output=True, text=True, env=env, timeout=400)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return {o: [torch.load(out / f"{o}-{rank}.pt", weights_only=True) for rank in range(2)]
            for o in routes}


if __name__ == "__main__":
    folder, which, names = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    for name in names:
        found = train(folder / name, name, which, 2)
        torch.save(found, folder / f"{name}-{found['rank']}.pt")
        # The first trainer started the second process; those after it find it there.
        os.environ.setdefault("LOCAL_RANK", "0")
