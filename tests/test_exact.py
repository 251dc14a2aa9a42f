"""A run that is killed inside an epoch goes on from its last checkpoint to the same weights as an
unbroken one."""
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def start(*paths: Path, timeout: int = 500) -> subprocess.CompletedProcess:
    "Runs, each in a process of its own."
    env = {**os.environ, "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, str(HERE / "exact_run.py"), *map(str, paths)],
                          env=env, capture_output=True, text=True, timeout=timeout)


def settings_of(folder: Path, kill: tuple[int, int], **settings) -> list[Path]:
    "Files that describe an unbroken run, one that is killed, and one that goes on from there."
    paths = []
    for name, more in (("whole", {}), ("killed", {"kill": kill}), ("resumed", {"resume": True})):
        root = folder / ("whole" if name == "whole" else "broken")
        root.mkdir(parents=True, exist_ok=True)
        paths.append(folder / f"{name}.json")
        about = {"data": str(folder / f"data-{name}"), "root": str(root),
                 "out": str(folder / f"{name}.pt"), **settings, **more}
        paths[-1].write_text(json.dumps(about))
    return paths


def assert_same(folder: Path, rank: str = "") -> None:
    "The unbroken run and the resumed one came to the same, and the resumed one saw what was left."
    whole, resumed = (torch.load(folder / f"{o}.pt{rank}", weights_only=False)
                      for o in ("whole", "resumed"))
    seen = whole["seen"][-len(resumed["seen"]):]
    assert resumed["seen"] == seen, f"samples differ: {resumed['seen'][:2]} in place of {seen[:2]}"
    assert 0 < len(resumed["seen"]) < len(whole["seen"])
    for name, tensor in whole["weights"].items():
        assert torch.equal(tensor, resumed["weights"][name]), name
    for i, state in whole["optimizer"].items():
        for k, v in state.items():
            assert torch.equal(torch.as_tensor(v),
                               torch.as_tensor(resumed["optimizer"][i][k])), (i, k)
    assert whole["history"] == resumed["history"]
    assert (whole["epoch"], whole["step"], whole["best"]) == (resumed["epoch"], resumed["step"],
                                                              resumed["best"])


CASES = {
    "classifier": dict(kind="classifier", kill=(1, 3)),
    "accumulate": dict(kind="classifier", kill=(1, 4), workers=2, accumulate=4),
    "balanced": dict(kind="classifier", kill=(2, 2), balanced=True, interval=2, workers=2,
                     persistent=True),
    "boxes": dict(kind="boxes", kill=(1, 2), workers=2),
    "own": dict(kind="own", kill=(1, 3), workers=2, val_check_interval=0.5),
    "plateau": dict(kind="own", kill=(2, 1), schedule="plateau", val_check_interval=3),
    "plateau_later": dict(kind="own", kill=(0, 2), schedule="plateau"),
    "plateau_steps": dict(kind="own", kill=(0, 2), schedule="plateau", steps=18),
    "plain": dict(kind="plain", kill=(1, 3)),
    "plain_workers": dict(kind="plain", kill=(0, 4), workers=2),
    "first_batch": dict(kind="own", kill=(1, 0)),
    "bf16": dict(kind="plain", kill=(2, 5), precision="bf16-mixed"),
    "max_steps": dict(kind="own", kill=(1, 3), steps=14),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """All cases, run one after the other: each run in a process of its own, killed where it is to
    be."""
    folder = tmp_path_factory.mktemp("exact")
    done = start(*(path for name, settings in CASES.items()
                   for path in settings_of(folder / name, **settings)))
    assert json.loads(done.stdout.splitlines()[-1]) == [0, -signal.SIGKILL,
                                                        0] * len(CASES), done.stderr[-6000:]
    return folder


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_is_killed_inside_an_epoch(runs, case): assert_same(runs / case)


@pytest.mark.parametrize("kind", ["own", "plain"])
def test_two_processes(tmp_path, kind):
    paths = settings_of(tmp_path, (1, 1), kind=kind, devices=2, strategy="ddp",
                        workers=2 if kind == "plain" else 0, interval=1)
    done = [start(path) for path in paths]
    assert [o.returncode for o in done] == [0, -signal.SIGKILL,
                                            0], "".join(o.stderr for o in done)[-4000:]
    assert_same(tmp_path, ".0")
    one, two = (torch.load(tmp_path / f"resumed.pt.{rank}", weights_only=False) for rank in (0, 1))
    for name, tensor in one["weights"].items():
        if "running" not in name: assert torch.equal(tensor, two["weights"][name]), name


def test_spawned_workers(tmp_path):
    paths = settings_of(tmp_path, (1, 2), kind="own", workers=2, context="spawn", epochs=2)
    done = [start(path) for path in paths]
    assert [o.returncode for o in done] == [0, -signal.SIGKILL,
                                            0], "".join(o.stderr for o in done)[-4000:]
    assert_same(tmp_path)


SIGNALLED = """
import os, signal, sys, time, torch
from small_models import *
from autotimm.trainer import AutoTrainer
torch.set_num_threads(1)
class One(pl.Callback):
    "Sends a signal to one process alone."
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        time.sleep(0.1)
        if trainer.global_step == 3 and trainer.global_rank == 1: os.kill(os.getpid(), getattr(signal, sys.argv[2]))
if __name__ == "__main__":
    trainer = AutoTrainer(max_epochs=200, default_root_dir=sys.argv[1], callbacks=[One()], devices=2, strategy="ddp", **QUIET)
    trainer.fit(Full(), *loaders())
"""


@pytest.mark.parametrize("name, code", [("SIGTERM", 143), ("SIGINT", 1)])
def test_a_signal_to_one_of_two_processes_ends_both_at_the_same_batch(tmp_path, name, code):
    from autotimm.checkpoints import find_unfinished, read_run
    (tmp_path / "run.py").write_text(SIGNALLED)
    env = {**os.environ, "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, tmp_path / "run.py", tmp_path, name], env=env,
                          capture_output=True, text=True, timeout=200)
    assert done.returncode == code, done.stderr[-3000:]
    kept = read_run(find_unfinished(tmp_path / "checkpoints"))
    assert kept["step"] < 200 and len(kept["processes"]) == 2
