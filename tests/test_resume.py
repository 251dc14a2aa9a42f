"A run that was killed goes on from its last epoch to the same weights as an unbroken one."
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_models import QUIET, Full, loaders

from autotimm.trainer import AutoTrainer

HERE = Path(__file__).parent


def start(*paths: Path) -> subprocess.CompletedProcess:
    "Runs, each in a process of its own."
    env = {**os.environ, "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, str(HERE / "resume_run.py"), *map(str, paths)],
                          env=env, capture_output=True, text=True, timeout=300)


def settings_of(folder: Path, kill: tuple[int, int] = (2, 1), **settings) -> list[Path]:
    "Files that describe an unbroken run, one that is killed, and one that goes on from there."
    paths = []
    for name, more in (("whole", {}), ("killed", {"kill": kill}), ("resumed", {"resume": True})):
        root = folder / ("whole" if name == "whole" else "broken")
        root.mkdir(parents=True, exist_ok=True)
        paths.append(folder / f"{name}.json")
        paths[-1].write_text(json.dumps({"root": str(root), "out": str(folder / f"{name}.pt"),
                                         **settings, **more}))
    return paths


def assert_same(folder: Path) -> tuple[dict, dict]:
    "The unbroken run and the resumed one came to the same."
    whole, resumed = torch.load(folder / "whole.pt"), torch.load(folder / "resumed.pt")
    for name, tensor in whole["weights"].items():
        assert torch.equal(tensor, resumed["weights"][name]), name
    assert whole["history"] == resumed["history"]
    assert (whole["epoch"], whole["step"], whole["best"]) == (resumed["epoch"], resumed["step"],
                                                              resumed["best"])
    return whole, resumed


CASES = {
    "plain": {}, "workers": {"workers": 2}, "own_sampler": {"workers": 2, "sampler": True,
                                                            "draws": True},
    "plateau": {"schedule": "plateau"}, "rare_validation": {"schedule": "plateau", "every": 2},
    "accumulate": {"schedule": "step", "accumulate": 3, "seed": 7},
    "max_steps": {"steps": 14, "draws": True}, "ema": {"ema": True},
    "tuned": {"tune": True, "kill": (2, 0)},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """All cases, run one after the other: each run in a process of its own, killed where it is to
    be."""
    folder = tmp_path_factory.mktemp("runs")
    done = start(*(path for name, settings in CASES.items()
                   for path in settings_of(folder / name, **settings)))
    assert json.loads(done.stdout.splitlines()[-1]) == [0, -signal.SIGKILL,
                                                        0] * len(CASES), done.stderr[-4000:]
    return folder


@pytest.mark.parametrize("case", [o for o in CASES if o != "tuned"])
def test_kill_and_resume_to_the_same_weights(runs, case): assert_same(runs / case)


def test_resuming_skips_the_search_and_keeps_what_it_found(runs):
    whole, resumed = assert_same(runs / "tuned")
    assert (whole["lr"] == resumed["lr"] != "auto"
            and whole["batch_size"] == resumed["batch_size"] == 32)


def test_two_processes(tmp_path):
    done = [start(path) for path in settings_of(tmp_path, devices=2, strategy="ddp", epochs=3)]
    assert [o.returncode for o in done] == [0, -signal.SIGKILL,
                                            0], "".join(o.stderr for o in done)[-4000:]
    assert_same(tmp_path)


@pytest.fixture
def make(tmp_path):
    return lambda **kwargs: AutoTrainer(**{"max_epochs": 2, "default_root_dir": str(tmp_path),
                                           **QUIET, **kwargs})


def test_last_without_one_is_an_error(make):
    with pytest.raises(FileNotFoundError, match=r"there is no last.ckpt under .*checkpoints"):
        make().fit(Full(), *loaders(), ckpt_path="last")
    with pytest.raises(FileNotFoundError, match="not kept a best"):
        make().fit(Full(), *loaders(), ckpt_path="best")


def test_last_is_the_newest_of_the_root_and_its_run_goes_on(make, tmp_path):
    for _ in range(2): make().fit(Full(), *loaders())
    trainer = make(max_epochs=3)
    trainer.fit(Full(), *loaders(), ckpt_path="last")
    assert (trainer.run_folder == tmp_path / "checkpoints" / "version_1"
            and trainer.current_epoch == 3)
    assert [row["epoch"] for row in trainer.history] == [0, 1, 2]
    assert len(list(tmp_path.rglob("last.ckpt"))) == 2


def test_a_given_file_starts_a_new_run(make, tmp_path):
    first = make()
    first.fit(Full(), *loaders())
    before = Path(first.best_model_path).read_bytes()
    trainer = make(max_epochs=4)
    trainer.fit(Full(), *loaders(), ckpt_path=first.best_model_path)
    assert trainer.run_folder.name == "version_1" and trainer.current_epoch == 4
    assert Path(first.best_model_path).read_bytes() == before


def test_the_last_checkpoint_of_a_users_callback_counts_too(make, tmp_path):
    from pytorch_lightning.callbacks import ModelCheckpoint
    own = lambda: ModelCheckpoint(tmp_path / "own", save_last=True, every_n_train_steps=3)
    make(callbacks=[own()], enable_checkpointing=True).fit(Full(), *loaders())
    os.utime(tmp_path / "own" / "last.ckpt")
    trainer = make(callbacks=[own()], max_epochs=3)
    trainer.fit(Full(), *loaders(), ckpt_path="last")
    assert trainer.current_epoch == 3


def test_a_best_file_that_is_gone_is_forgotten(make):
    first = make(max_epochs=3)
    first.fit(Full(), *loaders())
    os.remove(first.best_model_path)
    trainer = make(max_epochs=4)
    trainer.fit(Full(), *loaders(), ckpt_path="last")
    assert os.path.exists(trainer.best_model_path) and "best-epoch=03" in trainer.best_model_path


def test_a_model_of_another_shape_is_refused(make):
    class Wider(Full):
        def __init__(self):
            super().__init__()
            self.net[4] = torch.nn.Linear(16, 5)
    make().fit(Full(), *loaders())
    with pytest.raises(RuntimeError, match="size mismatch"):
        make().fit(Wider(), *loaders(), ckpt_path="last")


def test_a_kill_while_writing_leaves_the_last_file_whole(tmp_path):
    "The process dies when half of the second epoch's file is written."
    code = f"""
import os, signal, torch
from small_models import *
from autotimm.trainer import AutoTrainer
save, count = torch.save, [0]
def half(obj, file):
    if "last" in str(getattr(file, "name", "")): count[0] += 1
    if count[0] < 2: return save(obj, file)
    file.write(b"half a file"); file.flush(); os.kill(os.getpid(), signal.SIGKILL)
torch.save = half
AutoTrainer(max_epochs=3, default_root_dir={str(tmp_path)!r}, checkpoint_monitor=None, **QUIET).fit(Full(), *loaders())
"""
    env = {**os.environ, "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}"}
    assert subprocess.run([sys.executable, "-c", code], env=env, capture_output=True,
                          timeout=120).returncode == -signal.SIGKILL
    trainer = AutoTrainer(max_epochs=3, default_root_dir=str(tmp_path), **QUIET)
    trainer.fit(Full(), *loaders(), ckpt_path="last")
    assert [row["epoch"] for row in trainer.history] == [0, 1, 2]
    assert sorted(o.name for o in trainer.run_folder.iterdir()
                  if not o.name.startswith("best")) == ["last.ckpt"]
