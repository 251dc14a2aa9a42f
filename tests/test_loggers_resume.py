"""A run that was killed goes on in the same TensorBoard, CSV, MLflow and W&B run, with no step
twice and none missing."""
import json
import os
import pickle
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import LearningRateMonitor, ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from autotimm.loggers import (LoggerConfig, LoggerManager, continue_logger, create_logger,
                              logger_identity, logger_state, restart_logger)

KINDS = ("tensorboard", "csv", "mlflow", "wandb")
EPOCHS, STEPS = 3, 6


class Line(pl.LightningModule):
    "Learns a line; every batch is the same, so that a value depends on its step alone."

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(2, 1)
        torch.nn.init.constant_(self.net.weight, 0.5)
        torch.nn.init.constant_(self.net.bias, 0.0)
        self.save_hyperparameters({"width": 2})

    def loss(self, batch): return (self.net(batch[0])[:, 0] - batch[0].sum(1)).square().mean()

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("train/loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx): self.log("val/loss", self.loss(batch))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.02)
        return ([optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 4),
                               "interval": "step"}])


class Identities(pl.Callback):
    "Keeps in a checkpoint which runs were logged to, and kills the process where it is to be."

    def __init__(self, kill=None): self.kill = kill

    def on_save_checkpoint(self, trainer, module, checkpoint):
        checkpoint["loggers"] = [logger_identity(o) for o in trainer.loggers]

    def on_train_batch_start(self, trainer, *_):
        if self.kill == ["step", trainer.global_step]: os.kill(os.getpid(), signal.SIGKILL)

    def on_train_epoch_end(self, trainer, *_):
        if self.kill == ["epoch", trainer.current_epoch]: os.kill(os.getpid(), signal.SIGKILL)


def configs(root: Path) -> list[LoggerConfig]:
    "The loggers of a user's script."
    own = {"tensorboard": {"save_dir": str(root / "tensorboard")},
           "csv": {"save_dir": str(root / "csv")},
           "mlflow": {"experiment_name": "e", "save_dir": str(root / "mlflow")},
           "wandb": {"project": "p", "save_dir": str(root / "wandb"), "offline": True}}
    return [LoggerConfig(kind, own[kind]) for kind in KINDS]


def main(settings: dict) -> None:
    "One process of a training."
    Path(settings["root"]).mkdir(parents=True, exist_ok=True)
    root, x = Path(settings["root"]), torch.tensor([[1.0, 2.0], [0.5, -1.0]])
    loggers = LoggerManager(configs(root)).loggers
    path = root / "checkpoints" / settings["resume"] if settings.get("resume") else None
    if path is not None:
        checkpoint = torch.load(path, weights_only=True)
        for logger, identity in zip(loggers, checkpoint["loggers"]):
            continue_logger(logger, identity, checkpoint["global_step"])
    callbacks = [LearningRateMonitor(), Identities(settings.get("kill")),
                 ModelCheckpoint(root / "checkpoints", "{step}", every_n_train_steps=5,
                                 save_top_k=-1)]
    trainer = pl.Trainer(max_epochs=EPOCHS, logger=loggers, callbacks=callbacks,
                         log_every_n_steps=1, accelerator="cpu",
                         enable_progress_bar=False, enable_model_summary=False,
                         num_sanity_val_steps=0)
    data = [DataLoader(TensorDataset(x.repeat(n, 1)), 2) for n in (STEPS, 1)]
    trainer.fit(Line(), *data, ckpt_path=path)


def forked(settings: dict) -> int:
    "The exit status of `main` in a process of its own, which needs no time to start."
    if (child := os.fork()) == 0:
        try: main(settings)
        except BaseException:  # noqa: BLE001 - the child must never return into its parent
            traceback.print_exc()
            os._exit(1)
        if wandb.run is not None: wandb.finish()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


Rows = list[tuple[str, int, float]]


def tensorboard_rows(root: Path) -> list[Rows]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    runs = []
    for folder in sorted((root / "tensorboard").rglob("version_*")):
        reader = EventAccumulator(str(folder), {"scalars": 0}).Reload()
        runs.append([(tag, o.step, o.value) for tag in reader.Tags()["scalars"]
                     for o in reader.Scalars(tag)])
    return runs


def csv_rows(root: Path) -> list[Rows]:
    import csv
    runs = []
    for path in sorted((root / "csv").rglob("metrics.csv")):
        with open(path, newline="") as file:
            runs.append([(k, int(row["step"]), float(v)) for row in csv.DictReader(file)
                         for k, v in row.items() if v and k != "step"])
    return runs


def mlflow_rows(root: Path) -> list[Rows]:
    import sqlite3
    with sqlite3.connect(root / "mlflow" / "mlflow.db") as base:
        runs = [o[0] for o in base.execute("select run_uuid from runs")]
        return [base.execute("select key, step, value from metrics where run_uuid = ?",
                             [o]).fetchall() for o in runs]


def wandb_rows(root: Path) -> list[Rows]:
    "The rows of a run are in one file a process: those of one id belong together."
    from autotimm.loggers import _wandb_rows
    runs: dict[str, Rows] = {}
    for path in sorted((root / "wandb").glob("wandb/offline-run-*/*.wandb")):
        runs.setdefault(path.stem, []).extend((k, row["trainer/global_step"], row[k])
                                              for row in _wandb_rows(path)
                                              for k in row
                                              if k[0] != "_" and k != "trainer/global_step")
    return list(runs.values())


ROWS = {"tensorboard": tensorboard_rows, "csv": csv_rows, "mlflow": mlflow_rows,
        "wandb": wandb_rows}
# killed at the end of an epoch before its values are logged; killed two epochs after the
# checkpoint, and a second time before the next one
CASES = {"epoch": ("step=10.ckpt", ["epoch", 1]),
         "twice": ("step=5.ckpt", ["step", 13], ["step", 9])}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    "An unbroken run, and for each case one that was killed and resumed."
    folder = tmp_path_factory.mktemp("runs")
    processes: list[dict] = [{"root": str(folder / "whole")}]
    for case, (checkpoint, *kills) in CASES.items():
        processes += [{"root": str(folder / case), "kill": kill, "resume": checkpoint if i
                       else None} for i, kill in enumerate([*kills, None])]
    # Earlier tests of this process leave a W&B service, which takes a killed run for one at work,
    # and a place for MLflow's runs.
    inherited = {k: v for k, v in os.environ.items()
                 if not k.startswith(("WANDB_SERVICE", "MLFLOW_"))}
    env = {**inherited, "PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1",
           "WANDB_SILENT": "true"}
    done = subprocess.run([sys.executable, __file__, json.dumps(processes)], env=env,
                          capture_output=True, text=True, timeout=600)
    expected = [-signal.SIGKILL if o.get("kill") else 0 for o in processes]
    assert json.loads(
        done.stdout.splitlines()[-1]) == expected and "begins a new run" not in done.stderr, done.stderr[-4000:]
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_one_run_with_each_step_once(folder, kind, case):
    (whole,), (resumed,) = ROWS[kind](folder / "whole"), ROWS[kind](folder / case)
    assert Counter(o[:2] for o in resumed) == Counter(o[:2] for o in whole)
    assert max(Counter(o[:2] for o in resumed if o[0] != "epoch").values()) == 1
    # what Lightning averages over an epoch begins again where it is resumed: that is the trainer's
    # to mend
    assert {o for o in resumed if o[0] != "train/loss_epoch"} == {o for o in whole
                                                                  if o[0] != "train/loss_epoch"}
    assert {"train/loss_step", "train/loss_epoch", "val/loss", "epoch"} <= {o[0] for o in resumed}


# One process: what else may happen

@pytest.fixture(autouse=True)
def quiet(monkeypatch): monkeypatch.setenv("WANDB_SILENT", "true")


def config_of(kind: str, root: Path) -> LoggerConfig: return configs(root)[KINDS.index(kind)]


def finish(logger, step: int) -> None:
    """End a W&B run, and wait for its last row: `finish` does not wait for the file of an offline
    run."""
    from autotimm.loggers import _wandb_rows
    run = logger.experiment
    run.finish()
    path = Path(run.settings.sync_dir, f"run-{run.id}.wandb")
    for _ in range(100):
        if any(row.get("trainer/global_step") == step for row in _wandb_rows(path)): return
        time.sleep(0.1)
    raise TimeoutError(f"step {step} is not in {path}")


def begun(kind: str, root: Path, end: int = 8, at: int = 5) -> dict:
    "The identity, in a checkpoint of step `at`, of a run that went on to step `end`."
    logger, identity = create_logger(config_of(kind, root)), {}
    for step in range(end):
        if step == at: identity = logger_identity(logger)
        logger.log_metrics({"loss": step / 2, "epoch": 0}, step)
        logger.save()
    if kind == "wandb": finish(logger, end - 1)
    return identity


def log(logger, *steps: int) -> None:
    for step in steps:
        logger.log_metrics({"loss": step / 2, "epoch": 0}, step)
        logger.save()
    logger.finalize("success")
    if type(logger).__name__ == "WandbLogger": finish(logger, steps[-1])


@pytest.mark.parametrize("kind", KINDS)
def test_an_identity_is_plain_and_says_nothing_of_the_machine(tmp_path, kind):
    import getpass
    import socket
    identity = begun(kind, tmp_path)
    torch.save(identity, tmp_path / "identity.pt")
    assert torch.load(tmp_path / "identity.pt", weights_only=True) == identity
    assert not any(o in str(identity) for o in (str(tmp_path), str(Path.home()),
                                                getpass.getuser(), socket.gethostname()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_continued_logger_can_be_pickled_and_begins_another_run_for_another_model(tmp_path, kind):
    identity, logger = begun(kind, tmp_path), create_logger(config_of(kind, tmp_path))
    state = logger_state(logger)
    continue_logger(logger, identity, 5)
    assert logger.version == identity["version"]
    # Lightning's MLflow logger cannot be pickled once it has begun
    if kind != "mlflow": pickle.loads(pickle.dumps(logger))
    log(logger, *range(5, 9))
    restart_logger(logger, state)
    log(logger, *range(3))
    assert sorted(len({o[1] for o in rows}) for rows in ROWS[kind](tmp_path)) == [3, 9]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_whose_files_are_gone_begins_anew_and_says_so(tmp_path, kind):
    import shutil
    identity = begun(kind, tmp_path)
    if kind == "mlflow": identity["version"] = "0" * 32  # MLflow keeps a store open that is gone
    else: shutil.rmtree(tmp_path / kind)
    logger = create_logger(config_of(kind, tmp_path))
    with pytest.warns(UserWarning, match="begins a new run: nothing is left of") as caught:
        continue_logger(logger, identity, 5)
    assert len([o for o in caught if "new run" in str(o.message)]) == 1
    log(logger, 5, 6)
    assert [5, 6] in [sorted({o[1] for o in rows}) for rows in ROWS[kind](tmp_path)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_logger_goes_back_to_a_checkpoint(tmp_path, kind):
    logger, identity = create_logger(config_of(kind, tmp_path)), {}
    for step in range(8):
        if step == 5: identity = logger_identity(logger)
        logger.log_metrics({"loss": step / 2, "epoch": 0}, step)
        logger.save()
    if kind == "wandb": time.sleep(1)                              # its file is written every 0.2 s
    continue_logger(logger, identity, 5)
    log(logger, *range(5, 10))
    (rows,) = ROWS[kind](tmp_path)
    assert sorted(o[1] for o in rows if o[0] == "loss") == list(range(10))


@pytest.mark.parametrize("kind,name", [("tensorboard", "version"), ("csv", "version"),
                                       ("wandb", "id")])
def test_a_run_that_the_script_names_is_taken(tmp_path, kind, name):
    identity, config = begun(kind, tmp_path), config_of(kind, tmp_path)
    logger = create_logger(LoggerConfig(kind, {**config.params, name: "mine"}))
    with pytest.warns(UserWarning, match="it writes to 'mine'"):
        continue_logger(logger, identity, 5)
    assert logger.version == "mine" and "log_metrics" not in vars(logger)
    same = create_logger(LoggerConfig(kind, {**config.params, name: identity["version"]}))
    continue_logger(same, identity, 5)
    log(same, *range(5, 9))
    assert Counter(o[1] for rows in ROWS[kind](tmp_path) for o in rows
                   if o[0] == "loss") == dict.fromkeys(range(9), 1)


def test_other_loggers_and_names_begin_anew(tmp_path):
    identity = begun("csv", tmp_path)
    with pytest.warns(UserWarning, match="was logged by CSVLogger"):
        continue_logger(create_logger(config_of("tensorboard", tmp_path)), identity, 5)
    with pytest.warns(UserWarning, match="its name is 'b'"):
        continue_logger(create_logger(LoggerConfig("csv", {"save_dir": str(tmp_path),
                                                           "name": "b"})), identity, 5)
    class Own(pl.loggers.logger.DummyLogger): pass
    assert logger_identity(Own()) == {"logger": "Own"}
    with pytest.warns(UserWarning, match="only TensorBoardLogger, CSVLogger"):
        continue_logger(Own(), {"logger": "Own"}, 5)


@pytest.mark.parametrize("kind", ["tensorboard", "csv"])
def test_values_with_steps_of_their_own_stay(tmp_path, kind):
    "A validation counts its batches by itself: its steps may lie beyond that of the checkpoint."
    first = create_logger(config_of(kind, tmp_path))
    for step in range(9): first.log_metrics({"val/batch": 1.0}, step)
    log(first, 0, 1)
    identity, logger = logger_identity(first), create_logger(config_of(kind, tmp_path))
    log(first, 2, 3)
    continue_logger(logger, identity, 2)
    log(logger, 2)
    (rows,) = ROWS[kind](tmp_path)
    assert (sorted(o[1] for o in rows if o[0] == "val/batch") == list(range(9))
            and sorted(o[1] for o in rows if o[0] == "loss") == [0, 1, 2])


def test_pictures_come_once_in_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    first, logger = (create_logger(config_of("tensorboard", tmp_path)) for _ in range(2))
    def draw(logger, *steps):
        for step in steps:
            logger.experiment.add_image("picture", np.full((3, 4, 4), step / 10), step)
    draw(first, 0, 1)
    identity = logger_identity(first)
    draw(first, 2, 3)
    first.finalize("success")
    continue_logger(logger, identity, 2)
    draw(logger, 2, 3, 4)
    logger.finalize("success")
    reader = EventAccumulator(logger.log_dir, {"images": 0, "tensors": 0}).Reload()
    assert [o.step for o in reader.Images("picture")] == [0, 1, 2, 3, 4]
    assert not list(Path(logger.log_dir).glob("*.part"))


def test_prefixes(tmp_path):
    params = {"save_dir": str(tmp_path / "csv"), "prefix": "a"}
    first, logger = (create_logger(LoggerConfig("csv", params)) for _ in range(2))
    log(first, 0, 1)
    identity = {**logger_identity(first), "until": 1}
    continue_logger(logger, identity, 2)
    log(logger, 1, 2)                                              # step 1 is there
    assert [o[:2] for o in csv_rows(tmp_path)[0]
            if o[0] == "a-loss"] == [("a-loss", 0), ("a-loss", 1), ("a-loss", 2)]


@pytest.mark.parametrize("damage", ["cut", "killed", "empty"])
def test_a_csv_that_a_kill_has_cut_short(tmp_path, damage):
    identity, logger = begun("csv", tmp_path), create_logger(config_of("csv", tmp_path))
    (path,) = tmp_path.rglob("metrics.csv")
    if damage == "cut": path.write_bytes(path.read_bytes()[:-3])             # inside its last row
    if damage == "killed": path.rename(path.with_name("metrics.part"))  # while it was written anew
    if damage == "empty":
        path.unlink()
        identity["until"] = 0
    continue_logger(logger, identity, 5)
    log(logger, *range(5, 9))
    assert [o[1] for o in csv_rows(tmp_path)[0]
            if o[0] == "loss"] == list(range(0 if damage != "empty" else 5, 9))
    assert [o.name for o in path.parent.iterdir()] == ["metrics.csv"]


def test_columns_may_change(tmp_path):
    identity, logger = begun("csv", tmp_path), create_logger(config_of("csv", tmp_path))
    continue_logger(logger, identity, 5)
    logger.log_metrics({"another": 1.0}, 5)
    log(logger, 5)
    (rows,) = csv_rows(tmp_path)
    assert ("another", 5, 1.0) in rows and [o[1] for o in rows if o[0] == "loss"] == list(range(6))


def test_mlflow_keeps_the_hyperparameters_of_a_run_and_begins_another_for_a_deleted_one(tmp_path):
    first, logger = (create_logger(config_of("mlflow", tmp_path)) for _ in range(2))
    first.log_hyperparams({"lr": 0.1})
    continue_logger(logger, logger_identity(first), 5)
    with pytest.warns(UserWarning, match="MLflow keeps the hyperparameters"):
        logger.log_hyperparams({"lr": 0.2})
    assert logger.experiment.get_run(logger.run_id).data.params == {"lr": "0.1"}
    other = create_logger(config_of("mlflow", tmp_path))
    other.experiment.delete_run(first.run_id)
    with pytest.warns(UserWarning, match="nothing is left of"):
        continue_logger(logger := create_logger(config_of("mlflow", tmp_path)),
                        logger_identity(first), 5)
    assert logger.run_id != first.run_id


def test_two_mlflow_loggers_of_a_process_keep_to_their_stores(tmp_path):
    for name in "ab":
        log(create_logger(LoggerConfig("mlflow",
                                       {"experiment_name": "e",
                                        "save_dir": str(tmp_path / name / "mlflow")})), 0, 1)
    assert [len({o[1] for o in mlflow_rows(tmp_path / name)[0]}) for name in "ab"] == [2, 2]


def test_wandb_files_are_read_whole_and_as_far_as_a_kill_left_them(tmp_path):
    from autotimm.loggers import _wandb_rows
    begun("wandb", tmp_path, end=500)                               # more than a block of 32 KiB
    (path,) = (o for o in (tmp_path / "wandb").glob("wandb/offline-run-*/*.wandb"))
    assert path.stat().st_size > 3 * 32768
    assert [row["trainer/global_step"] for row in _wandb_rows(path)] == list(range(500))
    path.write_bytes(path.read_bytes()[:2 * 32768 + 99])
    steps = [row["trainer/global_step"] for row in _wandb_rows(path)]
    assert 100 < len(steps) < 500 and steps == list(range(len(steps)))


def test_the_history_of_an_online_wandb_run(monkeypatch):
    "A stand-in for the server: which rows it is asked for, and what becomes of a refusal."
    import wandb

    from autotimm.loggers import _continue_wandb
    run = SimpleNamespace(offline=False, resumed=True, path="me/p/1")
    rows = [{"loss": 0.5, "val": None, "trainer/global_step": 4, "_timestamp": 7.0}, {"gpu": 1.0}]
    monkeypatch.setattr(wandb, "Api", lambda: SimpleNamespace(
        run={"me/p/1": SimpleNamespace(scan_history=lambda: rows)}.get))
    assert ("loss", 4, 7.0) in _continue_wandb(SimpleNamespace(experiment=run), None)
    assert ({o[0] for o in _continue_wandb(SimpleNamespace(experiment=run), None)}
            == {"loss", "trainer/global_step", "_timestamp"})
    def refuse(path): raise wandb.errors.CommError("no")
    monkeypatch.setattr(wandb, "Api", lambda: SimpleNamespace(run=refuse))
    with pytest.warns(UserWarning, match="may be logged twice"):
        assert _continue_wandb(SimpleNamespace(experiment=run), None) == []


def test_other_ranks_touch_no_file(tmp_path, monkeypatch):
    identity, logger = begun("csv", tmp_path), create_logger(config_of("csv", tmp_path))
    (path,) = tmp_path.rglob("metrics.csv")
    before = path.read_bytes()
    monkeypatch.setattr(pl.utilities.rank_zero.rank_zero_only, "rank", 1)
    continue_logger(logger, identity, 5)
    assert logger.version == identity["version"] and path.read_bytes() == before


if __name__ == "__main__":
    import mlflow  # noqa: F401 - imported once for all that are forked
    import wandb
    print(json.dumps([forked(o) for o in json.loads(sys.argv[1])]))
