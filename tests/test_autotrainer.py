"""AutoTrainer: its arguments, its checkpoints, a second model, metrics that never come, what it
leaves behind."""
import inspect
import json
import os
import warnings
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from small_models import (QUIET, Full, Plain, loaders, patterns, same_weights,
                          tells_nothing_of_the_machine)

from autotimm.callbacks import JsonProgressCallback
from autotimm.checkpoints import BestCheckpoint
from autotimm.loggers import LoggerConfig, LoggerManager
from autotimm.trainer import AutoTrainer
from autotimm.tuning import TunerConfig


@pytest.fixture
def make(tmp_path):
    "A trainer in a folder of its own."
    return lambda **kwargs: AutoTrainer(**{"max_epochs": 2, "default_root_dir": str(tmp_path),
                                           **QUIET, **kwargs})


def messages(recorded, text: str) -> list[str]:
    return [str(o.message) for o in recorded if text in str(o.message)]


# Arguments

def test_signature_shows_every_argument_of_lightning():
    shown, theirs = (inspect.signature(AutoTrainer).parameters,
                     inspect.signature(pl.Trainer).parameters)
    assert set(theirs) <= set(shown)
    assert "tuner_config" in shown and "trainer_kwargs" not in shown
    assert list(shown)[:4] == ["max_epochs", "accelerator", "devices", "precision"]
    assert shown["max_epochs"].default == 10 and str(shown["max_epochs"]) == "max_epochs: int = 10"
    assert shown["deterministic"].default is False and shown["logger"].default is False


@pytest.mark.parametrize("limits, epochs", [
    ({}, 10), ({"max_steps": 5}, None), ({"max_time": "00:00:01:00"}, None),
    ({"max_epochs": 10, "max_steps": 5}, 10),
    ({"max_epochs": 3}, 3), ({"max_steps": -1}, 10)])
def test_ten_epochs_only_without_another_limit(tmp_path, limits, epochs):
    assert AutoTrainer(default_root_dir=str(tmp_path), **QUIET, **limits).max_epochs == epochs


def test_max_steps_alone_trains_that_many_steps(make):
    trainer = AutoTrainer(max_steps=6, default_root_dir=make().default_root_dir, **QUIET)
    trainer.fit(Full(), *loaders())
    assert trainer.global_step == 6


def test_the_list_of_callbacks_is_not_changed(make):
    callbacks = [EarlyStopping("val/loss")]
    make(callbacks=callbacks)
    assert len(callbacks) == 1


@pytest.mark.parametrize("arguments, error, text", [
    ({"max_epoch": 1}, TypeError, "Did you mean 'max_epochs'"),
    ({"tuner_config": "on"}, TypeError, "TunerConfig, True, False or None, got str: 'on'"),
    ({"logger": "csv"}, TypeError, "got str: 'csv'"),
    ({"logger": [3]}, TypeError, "got int: 3"),
    ({"callbacks": ["stop"]}, TypeError, "got str: 'stop'"),
    ({"progress_bar": "fancy"}, ValueError, "'tqdm' or 'rich', got 'fancy'"),
    ({"callbacks": 3}, TypeError, "a list of Lightning callbacks, got int: 3"),
    ({"checkpoint_monitor": 3}, TypeError, "name of a metric, .* got int: 3"),
    ({"checkpoint_mode": "maximum"}, ValueError, "'min' or 'max', got 'maximum'"),
    ({"max_epochs": "3"}, TypeError, "whole number.* got str: '3'"),
    ({"max_epochs": 2.5}, TypeError, "whole number.* got float: 2.5"),
    ({"seed": -1}, ValueError, "from 0 to 4294967295, or None, got -1"),
    ({"seed": "a"}, ValueError, "got 'a'"),
])
def test_bad_arguments(make, arguments, error, text):
    with pytest.raises(error, match=text): make(**arguments)


@pytest.mark.parametrize("model, data, text", [
    (torch.nn.Linear(8, 4), loaders(), "trains and runs LightningModules, got Linear. Wrap it"),
    ("resnet18", loaders(), "got str"),
    (Full(), (patterns(),), "Wrap it: DataLoader"),
    (Full(), (None, None, "data"), "datamodule must be a LightningDataModule, got str"),
    (Full(), ("folder",), "train_dataloaders must be a DataLoader.* got str: 'folder'. Images of a "
                          "folder: ImageDataModule"),
    (Full(), (pl.LightningDataModule,), "got type"),
    (Full(), ([patterns()],), "Got a data set .TensorDataset."),
    (Full(), ({"a": patterns()},), "Got a data set .TensorDataset."),
])
def test_bad_models_and_data(make, model, data, text):
    with pytest.raises(TypeError, match=text): make().fit(model, *data)


def test_no_data_is_an_error(make, tmp_path):
    with pytest.raises(ValueError, match="fit.. was given no data.*no train_dataloader"):
        make().fit(Full())
    with pytest.raises(ValueError, match="test.. was given no data.*no test_dataloader"):
        make().test(Full())
    few = torch.utils.data.DataLoader(patterns(3), 16, drop_last=True)
    with pytest.raises(ValueError, match="no batches: it is empty, or smaller than a batch"):
        make().fit(Full(), few)
    make(limit_train_batches=0).fit(Full(), *loaders())              # that was asked for
    with pytest.raises(TypeError,
                       match="datamodule must be a LightningDataModule, got str: 'best'"):
        make().test(Full(), loaders()[1], "best")
    for what in ("validate", "test", "predict"):
        with pytest.raises(TypeError, match=f"{what}.. without a model"):
            getattr(make(), what)(dataloaders=loaders()[1])


@pytest.mark.parametrize("arguments, text", [
    ({"auto_lr": 1e-3}, "auto_lr must be True or False, got 0.001"),
    ({"lr_find_kwargs": {"min_lr": "a"}}, "positive numbers in this order"),
    ({"lr_find_kwargs": {"early_stop_threshold": "x"}}, "above 1, or None, got 'x'"),
    ({"batch_size_kwargs": {"memory_share": "x"}}, "between 0 and 1, got 'x'")])
def test_bad_tuner_configs(arguments, text):
    with pytest.raises(ValueError, match=text): TunerConfig(**arguments)


def test_loggers_of_every_kind(make, tmp_path):
    manager = LoggerManager([LoggerConfig("csv", {"save_dir": str(tmp_path / "a")})])
    assert make(logger=manager).loggers == manager.loggers
    configs = [LoggerConfig("csv", {"save_dir": str(tmp_path / "b")}),
               LoggerConfig("tensorboard", {"save_dir": str(tmp_path / "b")})]
    trainer = make(logger=configs, log_every_n_steps=1)
    assert [type(o).__name__ for o in trainer.loggers] == ["CSVLogger", "TensorBoardLogger"]
    assert make(logger=False).loggers == [] and make(logger=CSVLogger(tmp_path)).loggers
    trainer.fit(Full(), *loaders())
    assert list((tmp_path / "b").rglob("metrics.csv")) and list((tmp_path / "b").rglob("events.*"))


def test_barebones_and_fast_dev_run(make, tmp_path):
    AutoTrainer(barebones=True, max_epochs=1, accelerator="cpu",
                default_root_dir=str(tmp_path)).fit(Plain(), loaders()[0])
    trainer = make(fast_dev_run=True, tuner_config=TunerConfig())
    trainer.fit(Full(), *loaders())
    assert (trainer.global_step == 1 and trainer.tuner_config is None
            and not list(tmp_path.rglob("*.ckpt")))
    with pytest.warns(UserWarning, match="has kept no checkpoint"):
        trainer.test(dataloaders=loaders()[1], verbose=False)


def test_mixed_precision_on_the_cpu(make):
    trainer = make(precision="16-mixed", max_epochs=1)
    trainer.fit(Full(), *loaders())
    assert trainer.precision == "bf16-mixed"


# Checkpoints

def test_best_and_last_are_kept(make, tmp_path):
    trainer = make(max_epochs=3)
    trainer.fit(Full(), *loaders())
    losses = {row["epoch"]: row["val/loss"] for row in trainer.history}
    best = min(losses, key=losses.get)
    name = f"best-epoch={best:02d}-val_loss={losses[best]:.4g}.ckpt"
    assert (sorted(o.name for o in (tmp_path / "checkpoints" / "version_0").iterdir())
            == sorted([name, "last.ckpt"]))
    assert (Path(trainer.best_model_path).name == name
            and Path(trainer.last_model_path).name == "last.ckpt")
    assert trainer.checkpoint_callback.best_model_path == trainer.best_model_path
    assert trainer.checkpoint_callback.best_model_score == pytest.approx(losses[best])


def test_files_of_earlier_runs_are_not_touched(make, tmp_path):
    for n in range(2):
        make(max_epochs=1).fit(Full(), *loaders())
        if n == 0: before = {o: o.read_bytes() for o in tmp_path.rglob("*.ckpt")}
    assert len(list(tmp_path.rglob("last.ckpt"))) == 2 and all(o.read_bytes() == b
                                                               for o, b in before.items())


def test_no_checkpoints_when_not_wanted(make, tmp_path):
    trainer = make(enable_checkpointing=False)
    trainer.fit(Full(), *loaders())
    assert not list(tmp_path.rglob("*")) and trainer.last_model_path == ""


def test_users_own_checkpoint_stands_alone_and_last_is_kept(make, tmp_path):
    own = ModelCheckpoint(tmp_path / "own", monitor="val/accuracy", mode="max")
    trainer = make(callbacks=[own])
    assert not any(isinstance(o, BestCheckpoint) for o in trainer.callbacks)
    trainer.fit(Full(), *loaders())
    assert (trainer.best_model_path == own.best_model_path
            and os.path.exists(trainer.last_model_path))


def test_checkpoint_set_by_the_model_stands_alone(make, tmp_path):
    class Own(Full):
        def configure_callbacks(self):
            return [ModelCheckpoint(tmp_path / "own", monitor="val/accuracy", mode="max")]
    trainer = make()
    trainer.fit(Own(), *loaders())
    assert not list(tmp_path.rglob("best-*")) and Path(trainer.best_model_path).parent.name == "own"


def test_without_monitor_the_best_is_the_last(make):
    trainer = make(checkpoint_monitor=None)
    trainer.fit(Full(), *loaders())
    assert trainer.best_model_path == trainer.last_model_path != ""


def test_checkpoints_load_weights_only_and_tell_nothing_of_the_machine(make, tmp_path, monkeypatch):
    own = ModelCheckpoint(tmp_path / "own", filename="a-{epoch}", monitor="val/loss",
                          save_top_k=2, save_last=True)
    trainer = make(callbacks=[own, EarlyStopping("val/loss")])
    trainer.fit(Full(), *loaders())
    for path in [*tmp_path.rglob("*.ckpt")]:
        torch.load(path, weights_only=True)
        tells_nothing_of_the_machine(path, tmp_path)
    states = torch.load(trainer.last_model_path, weights_only=True)["callbacks"]
    state = next(v for k, v in states.items() if k.startswith("ModelCheckpoint"))
    assert (state["best_model_path"] == os.path.basename(own.best_model_path)
            and len(state["best_k_models"]) == 2)


def test_plain_lightning_reads_our_checkpoints(make, tmp_path):
    trainer, (train, val) = make(), loaders()
    trainer.fit(Full(), train, val)
    other = pl.Trainer(max_epochs=3, default_root_dir=tmp_path, logger=False, **QUIET)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other.fit(Full(), train, val, ckpt_path=trainer.last_model_path)
    assert other.current_epoch == 3 and other.global_step == 12


@pytest.mark.parametrize("content", [b"", b"no checkpoint", None])
def test_a_broken_checkpoint_is_named(make, content):
    trainer, (train, val), model = make(), loaders(), Full()
    trainer.fit(model, train, val)
    for path in (trainer.last_model_path, trainer.best_model_path):
        Path(path).write_bytes(Path(path).read_bytes()[:500] if content is None else content)
    for tuner in (None, TunerConfig()):
        with pytest.raises(RuntimeError, match=r"last.ckpt is cut off, or no checkpoint"):
            make(max_epochs=3, tuner_config=tuner).fit(Full(), train, val, ckpt_path="last")
    with pytest.raises(RuntimeError, match=r"best-epoch.*is cut off, or no checkpoint"):
        trainer.test(model, val, ckpt_path="best")


class Settings: "Something that weights_only=True does not load."


class WithSettings(Full):
    def __init__(self, settings):
        super().__init__()
        self.save_hyperparameters()


def test_hyperparameters_that_are_not_plain_are_named(make):
    trainer, model, (train, val) = make(), WithSettings(Settings()), loaders()
    trainer.fit(model, train, val)
    with pytest.raises(Exception, match="holds an object of .*Settings.*weights_only=False"):
        trainer.test(dataloaders=val)
    assert trainer.test(dataloaders=val, verbose=False, weights_only=False)


def test_a_missing_file_or_folder_is_named_and_forgets_nothing(make, tmp_path):
    trainer, (train, val) = make(), loaders()
    trainer.fit(Full(), train, val)
    best = trainer.best_model_path
    with pytest.raises(FileNotFoundError, match="ckpt_path='nope.ckpt': there is no such file"):
        trainer.fit(Full(), train, val, ckpt_path="nope.ckpt")
    assert trainer.best_model_path == best != "" and len(trainer.history) == 2
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="Give a default_root_dir"):
        make(default_root_dir=str(tmp_path / "file")).fit(Full(), train, val)


def test_history_is_whole_after_resuming_from_the_best(make):
    trainer, (train, val) = make(), loaders()
    trainer.fit(Full(), train, val)
    other = make(max_epochs=4)
    other.fit(Full(), train, val, ckpt_path=trainer.best_model_path)
    assert ([row["epoch"] for row in other.history] == [0, 1, 2, 3]
            and all("val/loss" in row for row in other.history))


def test_finders_of_lightning_leave_no_trace_in_the_history(make):
    class Rated(Full):
        lr = 0.1
        def configure_optimizers(self): return torch.optim.SGD(self.parameters(), self.lr)
    trainer = make(callbacks=[pl.callbacks.LearningRateFinder(num_training_steps=8)])
    trainer.fit(Rated(), *loaders())
    assert [(row["epoch"], row["step"]) for row in trainer.history] == [(0, 4), (1, 8)]


@pytest.mark.parametrize("train, val", [
    ({"batch_size": 16}, {"dataset": "endless", "batch_size": 16}),
    ({"batch_sampler": torch.utils.data.BatchSampler(torch.utils.data.SequentialSampler(range(64)),
                                                     8, False)},
     {"batch_sampler": [[0, 1], [2, 3]]})])
def test_size_search_leaves_validation_loaders_alone_that_cannot_be_resized(make, train, val):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self): yield from patterns()
    config = TunerConfig(False, True, None, {"max_val": 32})
    trainer = make(max_epochs=1, tuner_config=config)
    val = {**val, "dataset": Stream() if "dataset" in val else patterns()}
    trainer.fit(Full(), torch.utils.data.DataLoader(patterns(), **train),
                torch.utils.data.DataLoader(**val))
    assert trainer.tuning.batch_size.suggestion == 32 and "val/loss" in trainer.history[0]


# Metrics that never come

def test_overview_callbacks_on_a_model_that_logs_only_train_loss(make, tmp_path):
    callbacks = [ModelCheckpoint(tmp_path / "own", filename="best-{epoch:02d}-{val/accuracy:.2f}",
                                 monitor="val/accuracy", mode="max", save_top_k=3),
                 EarlyStopping("val/accuracy", patience=10, mode="max")]
    trainer = make(callbacks=callbacks, max_epochs=3)
    with warnings.catch_warnings(record=True) as recorded:
        warnings.simplefilter("always")
        trainer.fit(Plain(), *loaders())
    found = messages(recorded, "val/accuracy")
    assert (len(found) == 1 and "EarlyStopping and ModelCheckpoint" in found[0]
            and "Logged: train/loss" in found[0])
    assert trainer.current_epoch == 3 and trainer.best_model_path == trainer.last_model_path
    assert callbacks[1].strict and "_save_topk_checkpoint" not in vars(callbacks[0])


def test_same_callbacks_on_a_second_trainer_start_afresh(make, tmp_path):
    callbacks = [ModelCheckpoint(tmp_path / "own", filename="best-{epoch:02d}-{val/accuracy:.2f}",
                                 monitor="val/accuracy", mode="max", save_top_k=3),
                 EarlyStopping("val/accuracy", patience=1, mode="max", min_delta=2.0)]
    first = make(callbacks=callbacks, max_epochs=9)
    first.fit(Full(), *loaders())
    assert first.current_epoch == 2 and callbacks[1].wait_count == 1
    files = {o.name for o in (tmp_path / "own").iterdir()}
    assert all("val_accuracy=" in o for o in files)  # no folder, and the metric's name and value
    second = make(callbacks=callbacks, max_epochs=3)
    assert callbacks[1].wait_count == 1                              # until it trains
    second.fit(Full(), *loaders())
    assert second.current_epoch == 2 and files <= {o.name for o in (tmp_path / "own").iterdir()}


@pytest.mark.parametrize("val", [True, False])
def test_checkpoint_monitor_falls_back_to_the_last(make, val):
    trainer, (train, loader) = make(), loaders()
    with pytest.warns(UserWarning,
                      match=r"Not logged: 'val/loss' \(for BestCheckpoint\). Logged: train/loss"):
        trainer.fit(Plain(), train, loader if val else None)
    assert trainer.best_model_path == trainer.last_model_path != ""


def test_no_warning_while_validation_is_still_to_come(make):
    with warnings.catch_warnings(record=True) as recorded:
        warnings.simplefilter("always")
        trainer = make(max_epochs=4, check_val_every_n_epoch=2,
                       callbacks=[EarlyStopping("val/loss")])
        trainer.fit(Full(), *loaders())
    assert not messages(recorded, "Not logged")
    assert ["val/loss" in row for row in trainer.history] == [False, True, False, True]


# A second model

def test_a_second_model_is_trained_in_full(make, tmp_path):
    stop = EarlyStopping("val/loss", patience=50)
    trainer = make(max_epochs=3, callbacks=[stop],
                   logger=[LoggerConfig("csv", {"save_dir": str(tmp_path / "logs")})],
                   log_every_n_steps=1)
    first, second, (train, val) = Full(), Full(), loaders()
    trainer.fit(first, train, val)
    kept = {o: o.read_bytes() for o in tmp_path.rglob("*.ckpt")}
    logs = {o: o.read_text() for o in tmp_path.rglob("metrics.csv")}
    stop.best_score = torch.tensor(-9.0)
    before = {k: v.clone() for k, v in second.state_dict().items()}
    trainer.fit(second, train, val)
    assert trainer.current_epoch == 3 and trainer.global_step == 12
    assert [row["epoch"] for row in trainer.history] == [0, 1, 2]
    assert not torch.equal(before["net.0.weight"], second.net[0].weight)
    assert stop.best_score > -9 and trainer.callbacks.count(stop) == 1
    assert (all(o.read_bytes() == b for o, b in kept.items())
            and len(list(tmp_path.rglob("last.ckpt"))) == 2)
    assert len(list(tmp_path.rglob("metrics.csv"))) == 2 and all(o.read_text() == t
                                                                 for o, t in logs.items())


def test_every_logger_begins_another_run_for_a_second_model(make, tmp_path, monkeypatch):
    import sqlite3
    monkeypatch.setenv("WANDB_SILENT", "true")
    configs = [LoggerConfig("tensorboard", {"save_dir": str(tmp_path / "tb")}),
               LoggerConfig("mlflow", {"experiment_name": "e", "save_dir": str(tmp_path / "ml")}),
               LoggerConfig("wandb", {"project": "p", "save_dir": str(tmp_path / "wb"),
                                      "offline": True, "mode": "offline"})]
    trainer = make(logger=configs, max_epochs=1, log_every_n_steps=1)
    for _ in range(2): trainer.fit(Full(), *loaders())
    for logger in trainer.loggers: logger.finalize("success")
    runs = sqlite3.connect(tmp_path / "ml" / "mlflow.db").execute("select run_uuid, count(*) from "
                                                                  "metrics group by run_uuid").fetchall()
    assert len(runs) == 2 and runs[0][1] == runs[1][1] > 0
    assert (len(list((tmp_path / "tb").rglob("events.*"))) == 2
            and len(list((tmp_path / "wb").rglob("*.wandb"))) == 2)


def test_a_second_model_trains_as_on_a_new_trainer(make):
    def train(trainer, seed):
        pl.seed_everything(seed, verbose=False)
        model = Full()
        trainer.fit(model, *loaders())
        return model
    reused = make(seed=3)
    train(reused, 1)
    assert same_weights(train(reused, 2), train(make(seed=3), 2))


def test_the_same_model_follows_lightning_and_says_so(make):
    trainer, model, (train, val) = make(max_epochs=2), Full(), loaders()
    trainer.fit(model, train, val)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.warns(UserWarning, match="already trained to max_epochs=2"):
        trainer.fit(model, train, val)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    trainer.fit_loop.max_epochs = 3
    trainer.fit(model, train, val)
    assert trainer.current_epoch == 3 and [row["epoch"] for row in trainer.history] == [2]


def test_callbacks_of_a_model_leave_with_it(make):
    class Own(Full):
        def configure_callbacks(self): return [EarlyStopping("val/accuracy", patience=50)]
    trainer = make(max_epochs=1)
    trainer.fit(Own(), *loaders())
    assert any(isinstance(o, EarlyStopping) for o in trainer.callbacks)
    trainer.fit(Full(), *loaders())
    assert not any(isinstance(o, EarlyStopping) for o in trainer.callbacks)


def test_a_fit_that_fails_leaves_callbacks_and_folders_clean(make, tmp_path):
    class Broken(Full):
        def training_step(self, batch, batch_idx): raise ArithmeticError("no")
    stop = EarlyStopping("val/loss")
    trainer = make(callbacks=[stop])
    with pytest.raises(ArithmeticError): trainer.fit(Broken(), *loaders())
    assert stop.strict and not list((tmp_path / "checkpoints").iterdir())
    trainer.fit(Full(), *loaders())
    assert trainer.current_epoch == 2


# Evaluation

def test_the_best_is_that_of_this_run(make, tmp_path):
    class Worse(Full):
        "Gets worse after its first epoch."
        def on_train_epoch_start(self):
            if self.current_epoch > 0:
                with torch.no_grad(): self.net[-1].bias += torch.tensor([100.0, -100.0, 0.0, 0.0])
    trainer, model, (train, val) = make(max_epochs=3), Worse(), loaders()
    make(max_epochs=1).fit(Full(), train, val)  # another run in the same folder
    trainer.fit(model, train, val)
    assert trainer.best_model_path.startswith(str(tmp_path / "checkpoints" / "version_1"
                                                  / "best-epoch=00"))
    patience = trainer.checkpoint_callback.best_model_path
    as_it_is = trainer.test(model, val, verbose=False)[0]["test/loss"]
    loss = trainer.test(dataloaders=val, verbose=False)[0]["test/loss"]
    assert loss == pytest.approx(trainer.history[0]["val/loss"], rel=1e-4)
    assert trainer.test(model, val, ckpt_path="best", verbose=False)[0]["test/loss"] == loss
    assert trainer.checkpoint_callback.best_model_path == patience
    last = trainer.test(model, val, ckpt_path="last", verbose=False)[0]["test/loss"]
    assert last == as_it_is > 10 * loss


def test_test_without_a_run_takes_the_weights_as_they_are(make):
    trainer, (train, val) = make(), loaders()
    with pytest.warns(UserWarning, match="has kept no checkpoint"):
        trainer.test(Full(), val, ckpt_path="best", verbose=False)
    trainer.fit(Full(), train, val)
    other = Full()
    weights = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.warns(UserWarning, match="that of another model"):
        trainer.test(other, datamodule=None, dataloaders=val, ckpt_path="best", verbose=False)
    assert all(torch.equal(v, weights[k]) for k, v in other.state_dict().items())


def test_validate_and_predict(make):
    trainer, model, (train, val) = make(), Full(), loaders()
    trainer.fit(model, train, val)
    best = min(row["val/loss"] for row in trainer.history)
    assert (trainer.validate(dataloaders=val, verbose=False)[0]["val/loss"]
            == pytest.approx(best, rel=1e-4))
    assert trainer.validate(model, val, ckpt_path="best",
                            verbose=False)[0]["val/loss"] == pytest.approx(best, rel=1e-4)
    assert torch.cat(trainer.predict(model, val)).shape == (32,)
    with pytest.raises(FileNotFoundError, match="has not kept one yet"):
        make().predict(model, val, ckpt_path="last")


# Seeds, history, progress

def test_seed_makes_runs_equal(make):
    def run(**kwargs):
        pl.seed_everything(0, verbose=False)
        model = Full()
        torch.rand(5)
        make(**kwargs).fit(model, *loaders())
        return model
    assert same_weights(run(seed=1), run(seed=1)) and not same_weights(run(seed=1), run(seed=2))
    assert same_weights(run(use_autotimm_seeding=True), run(use_autotimm_seeding=True, seed=42))


def test_history_has_a_row_an_epoch(make):
    trainer = make(max_epochs=2, val_check_interval=0.5)
    trainer.fit(Full(), *loaders())
    assert [(row["epoch"], row["step"]) for row in trainer.history] == [(0, 4), (1, 8)]
    assert set(trainer.history[0]) == {"epoch", "step", "train/loss", "train/accuracy",
                                       "val/loss", "val/accuracy"}
    with pytest.raises(ValueError, match="no history yet"): make().plot_history()
    with pytest.raises(ValueError, match="Quantity 'los' not found. Did you mean 'loss'"):
        trainer.plot_history(["accuracy", "los"])
    assert len(trainer.plot_history("loss").axes) == 1


def test_json_progress(make, tmp_path):
    path = tmp_path / "out" / "progress.jsonl"
    make(json_progress=True, json_progress_every_n_steps=2,
         json_progress_log_file=str(path)).fit(Full(), *loaders())
    events = [json.loads(o) for o in path.read_text().splitlines()]
    assert [o["event"] for o in events] == ["fit_start", *["step", "step", "epoch_end"] * 2,
                                            "fit_end"]
    assert "train/loss" in events[3]["metrics"] and events[-1]["status"] == "finished"
    assert not any(isinstance(o, JsonProgressCallback) for o in make().callbacks)


def test_progress_bars_of_both_kinds(make, capsys):
    for kind in ("tqdm", "rich"):
        AutoTrainer(max_epochs=1, progress_bar=kind, accelerator="cpu",
                    default_root_dir=make().default_root_dir).fit(Full(), *loaders())
        assert "Epoch 0" in "".join(capsys.readouterr())


def test_handlers_and_levels_of_the_application_stay(make):
    import logging
    logger = logging.getLogger("pytorch_lightning")
    before = logger.level, list(logger.handlers), logging.getLogger().handlers[:]
    make(max_epochs=1).fit(Full(), *loaders())
    assert (logger.level, logger.handlers, logging.getLogger().handlers) == before


