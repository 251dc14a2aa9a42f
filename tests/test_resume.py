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


def run(folder: Path, name: str, **settings) -> subprocess.CompletedProcess:
    "One training run in a process of its own."
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({"root": str(folder), "out": str(folder / f"{name}.pt"), **settings}))
    env = {**os.environ, "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, str(HERE / "resume_run.py"), str(folder / f"{name}.json")], env=env, capture_output=True, text=True, timeout=300)


def killed_and_resumed(tmp_path: Path, kill: tuple[int, int] = (2, 1), **settings) -> tuple[dict, dict]:
    "What an unbroken run and one that was killed and resumed came to."
    whole = run(tmp_path / "whole", "whole", **settings)
    assert whole.returncode == 0, whole.stderr[-3000:]
    broken = run(tmp_path / "broken", "first", kill=kill, **settings)
    assert broken.returncode == -signal.SIGKILL, broken.stderr[-3000:]
    resumed = run(tmp_path / "broken", "second", resume=True, **settings)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    return torch.load(tmp_path / "whole" / "whole.pt"), torch.load(tmp_path / "broken" / "second.pt")


def assert_same(whole: dict, resumed: dict) -> None:
    for name, tensor in whole["weights"].items(): assert torch.equal(tensor, resumed["weights"][name]), name
    assert whole["history"] == resumed["history"]
    assert (whole["epoch"], whole["step"], whole["best"]) == (resumed["epoch"], resumed["step"], resumed["best"])


@pytest.mark.parametrize("settings", [
    {"workers": 0}, {"workers": 2}, {"workers": 2, "sampler": True, "draws": True}, {"schedule": "plateau", "every": 2, "epochs": 5},
    {"schedule": "step", "accumulate": 3, "seed": 7}, {"steps": 14, "draws": True}],
    ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()))
def test_kill_and_resume_to_the_same_weights(tmp_path, settings):
    assert_same(*killed_and_resumed(tmp_path, **settings))


def test_resuming_skips_the_search_and_keeps_what_it_found(tmp_path):
    whole, resumed = killed_and_resumed(tmp_path, tune=True, kill=(2, 0))
    assert_same(whole, resumed)
    assert whole["lr"] == resumed["lr"] != "auto" and whole["batch_size"] == resumed["batch_size"] == 32


def test_two_processes(tmp_path):
    assert_same(*killed_and_resumed(tmp_path, devices=2, strategy="ddp", epochs=3, workers=0))


@pytest.fixture
def make(tmp_path):
    return lambda **kwargs: AutoTrainer(**{"max_epochs": 2, "default_root_dir": str(tmp_path), **QUIET, **kwargs})


def test_last_without_one_is_an_error(make):
    with pytest.raises(FileNotFoundError, match=r"there is no last.ckpt under .*checkpoints"): make().fit(Full(), *loaders(), ckpt_path="last")
    with pytest.raises(FileNotFoundError, match="not kept a best"): make().fit(Full(), *loaders(), ckpt_path="best")


def test_last_is_the_newest_of_the_root_and_its_run_goes_on(make, tmp_path):
    for _ in range(2): make().fit(Full(), *loaders())
    trainer = make(max_epochs=3)
    trainer.fit(Full(), *loaders(), ckpt_path="last")
    assert trainer.run_folder == tmp_path / "checkpoints" / "version_1" and trainer.current_epoch == 3
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
    with pytest.raises(RuntimeError, match="size mismatch"): make().fit(Wider(), *loaders(), ckpt_path="last")


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
    assert subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, timeout=120).returncode == -signal.SIGKILL
    trainer = AutoTrainer(max_epochs=3, default_root_dir=str(tmp_path), **QUIET)
    trainer.fit(Full(), *loaders(), ckpt_path="last")
    assert [row["epoch"] for row in trainer.history] == [0, 1, 2]
    assert sorted(o.name for o in trainer.run_folder.iterdir() if not o.name.startswith("best")) == ["last.ckpt"]
