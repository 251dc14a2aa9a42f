"The searches: they work for any module, leave no trace, and say clearly what they cannot do."
import copy
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from small_models import QUIET, Full, Plain, WithRate, loaders, patterns, same_weights
from torch.utils.data import DataLoader, IterableDataset, RandomSampler

from autotimm.trainer import AutoTrainer
from autotimm.tuning import (CudaMemory, Data, HostMemory, SizeTrial, TunerConfig, alone,
                             find_rate, find_size, memory_of,
                             resized_loaders, run_trial)

HERE = Path(__file__).parent
RATE = TunerConfig(True, False, {"num_training": 20, "min_lr": 1e-5})
SIZE = TunerConfig(False, True, None, {"steps_per_trial": 1, "max_val": 32})
BOTH = TunerConfig(True, True, RATE.lr_find_kwargs, SIZE.batch_size_kwargs)


@pytest.fixture
def make(tmp_path):
    return lambda **kwargs: AutoTrainer(**{"max_epochs": 1, "default_root_dir": str(tmp_path),
                                           **QUIET, **kwargs})


class Seen(pl.Callback):
    "Notes the rates and batch sizes of a training."
    def __init__(self): self.rates, self.sizes = [], []
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rates.append([g["lr"] for o in trainer.optimizers for g in o.param_groups])
        self.sizes.append(len(batch[0]))


class Numbers(pl.LightningDataModule):
    "Has a batch size, as ours do."
    def __init__(self, batch_size="auto"):
        super().__init__()
        self.save_hyperparameters()
        self.batch_size = batch_size
    def train_dataloader(self): return DataLoader(patterns(64), self.batch_size, shuffle=True)
    def val_dataloader(self): return DataLoader(patterns(32, 2), self.batch_size)


class Fixed(pl.LightningDataModule):
    "Has no attribute batch_size."
    def train_dataloader(self): return loaders()[0]


class Stream(IterableDataset):
    def __iter__(self): return iter([patterns(8)[i] for i in range(8)])


# What is found is used

def test_rate_of_a_module_without_lr_keeps_the_ratios(make):
    class Groups(Plain):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD([dict(params=self.net[0].parameters(), lr=1e-4),
                                         dict(params=[*self.net[1:].parameters()], lr=1e-3)])
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]
    seen = Seen()
    trainer = make(tuner_config=RATE, callbacks=[seen], max_epochs=2)
    trainer.fit(Groups(), loaders()[0])
    found = trainer.lr_finder.suggestion
    assert found > 1e-3
    assert (seen.rates[0] == pytest.approx([found / 10, found])
            and seen.rates[-1] == pytest.approx([found / 20, found / 2]))
    assert len(trainer.lr_finder.plot().axes) == 1


@pytest.mark.parametrize("lr", ["auto", 0.003])
def test_rate_of_a_module_with_lr_is_set_on_it(make, lr):
    seen, model = Seen(), WithRate(lr)
    trainer = make(tuner_config=None if lr == "auto" else RATE, callbacks=[seen])
    trainer.fit(model, *loaders())
    found = trainer.tuning.lr.suggestion
    assert (model.hparams.lr == pytest.approx(found)
            and seen.rates[0] == pytest.approx([found / 10, found]))
    assert torch.load(trainer.last_model_path,
                      weights_only=True)["hyper_parameters"]["lr"] == pytest.approx(found)


@pytest.mark.parametrize("schedule", ["one_cycle", "warmup", "timm"])
def test_rate_reaches_the_schedulers(make, schedule):
    from timm.scheduler import CosineLRScheduler

    class Scheduled(Plain):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=1e-3)
            if schedule == "one_cycle":
                scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=8)
            elif schedule == "timm":
                scheduler = CosineLRScheduler(optimizer, 8, warmup_t=3, warmup_lr_init=1e-6,
                                              warmup_prefix=True, t_in_epochs=False)
            else:
                warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=3)
                scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer,
                                                                  [warm,
                                                                   torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)], [3])
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler,
                                                             "interval": "step"}}
        def lr_scheduler_step(self, scheduler, metric):
            scheduler.step_update(self.global_step) if schedule == "timm" else scheduler.step()
    seen = Seen()
    trainer = make(tuner_config=RATE, callbacks=[seen], max_epochs=2)
    trainer.fit(Scheduled(), loaders()[0])
    found, rates = trainer.lr_finder.suggestion, [o[0] for o in seen.rates]
    assert max(rates) == pytest.approx(found, rel=0.15) and rates[0] < 0.2 * found


def test_size_of_bare_loaders(make):
    train = DataLoader(patterns(64), 8, sampler=RandomSampler(range(64),
                                                              generator=torch.Generator().manual_seed(1)), drop_last=True,
                       collate_fn=lambda batch: tuple(
                           torch.stack([torch.as_tensor(o[i]) for o in batch]) for i in (0, 1)))
    val = DataLoader(patterns(32, 2), 8)
    seen, state = Seen(), train.sampler.generator.get_state()
    trainer = make(tuner_config=SIZE, callbacks=[seen])
    trainer.fit(Full(), train, val)
    assert seen.sizes == [32, 32] and trainer.tuning.batch_size.suggestion == 32
    used = trainer.train_dataloader
    assert used.sampler is train.sampler and used.collate_fn is train.collate_fn and used.drop_last
    assert trainer.val_dataloaders.batch_size == 32 and (train.batch_size, val.batch_size) == (8, 8)
    other = torch.Generator()
    other.set_state(state)
    assert torch.equal(torch.randperm(64, generator=other),
                       torch.randperm(64, generator=torch.Generator().manual_seed(1)))
    assert len(trainer.tuning.batch_size.plot().axes) == 1


@pytest.mark.parametrize("data", [Numbers("auto"), Numbers(8), Fixed()],
                         ids=["auto", "number", "no_attribute"])
def test_size_of_data_modules(make, data):
    seen = Seen()
    trainer = make(tuner_config=SIZE if getattr(data, "batch_size", 0) != "auto" else None,
                   callbacks=[seen])
    trainer.fit(Full(), datamodule=data)
    expected = 64 if isinstance(data, Numbers) and trainer.tuner_config is None else 32
    assert seen.sizes == [expected] * (64 // expected)
    if isinstance(data, Numbers):
        assert data.batch_size == data.hparams.batch_size == expected and data.trainer is trainer


def test_loaders_of_the_module_itself(make):
    class Own(Full):
        def train_dataloader(self): return loaders()[0]
    seen = Seen()
    make(tuner_config=BOTH, callbacks=[seen]).fit(Own())
    assert seen.sizes == [32, 32]


def test_auto_is_searched_again_for_a_second_model(make):
    class Small(Full):
        "Runs out of memory above eight samples, as a larger model would."
        def training_step(self, batch, batch_idx):
            if len(batch[0]) > 8: raise RuntimeError("CUDA out of memory. Tried to allocate 1 GiB")
            return super().training_step(batch, batch_idx)
    trainer, data = make(), Numbers("auto")
    trainer.fit(Full(), datamodule=data)
    assert data.batch_size == 64
    trainer.fit(Small(), datamodule=data)
    assert data.batch_size == 8


def test_it_says_what_it_found(make, capsys):
    make(tuner_config=BOTH).fit(Full(), *loaders())
    said = capsys.readouterr().out
    assert ("Batch size 32: 32 is the most that max_val" in said and "Learning rate " in said
            and "searched in" in said)


def test_the_found_rate_trains_well(make):
    model = Full(dropout=0.0)
    trainer = make(tuner_config=TunerConfig(True, False), max_epochs=8)
    trainer.fit(model, *loaders(256))
    assert trainer.history[-1]["val/accuracy"] > 0.8


# Nothing stays behind

def test_search_changes_nothing(make, tmp_path):
    "A fit after a search is the fit without one, when it finds what was set."
    class Counting(Full):
        "Keeps things that are in no state dict."
        def __init__(self):
            super().__init__()
            self.calls = []
        def training_step(self, batch, batch_idx):
            self.calls.append(batch_idx)
            return super().training_step(batch, batch_idx)
    pl.seed_everything(1, verbose=False)
    first, (train, val) = Counting().eval(), loaders(worker_init_fn=None,
                                                     generator=torch.Generator().manual_seed(2))
    second = copy.deepcopy(first)
    fixed = TunerConfig(True, True, {"num_training": 1, "min_lr": 0.01, "max_lr": 0.1},
                        {"steps_per_trial": 2, "max_val": 16})
    torch.manual_seed(3)
    make(tuner_config=fixed).fit(first, train, val)
    train.generator.manual_seed(2)
    torch.manual_seed(3)
    make(tuner_config=None).fit(second, train, val)
    assert same_weights(first, second) and first.calls == second.calls == [0, 1, 2, 3]
    assert {o.name for o in tmp_path.iterdir()} == {"checkpoints"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_everything_is_put_back_when_a_search_fails(make, tmp_path, error):
    class Fails(WithRate):
        count = 0
        def training_step(self, batch, batch_idx):
            type(self).count += 1
            if type(self).count > 12: raise error("stop")
            return super().training_step(batch, batch_idx)
    model, data, stop = Fails("auto"), Numbers("auto"), pl.callbacks.EarlyStopping("val/loss")
    model.net[1].eval()
    weights, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    trainer = make(callbacks=[stop], tuner_config=BOTH)
    with pytest.raises(error): trainer.fit(model, datamodule=data)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert (model.hparams.lr, data.batch_size, data.hparams.batch_size) == ("auto", "auto", "auto")
    assert model.net[0].training and not model.net[1].training and stop.strict
    assert not [o for o in tmp_path.rglob("*") if o.is_file()]
    assert model._trainer is None and trainer.global_step == 0


@pytest.mark.parametrize("kind", ["locked", "patched", "compiled"])
def test_a_model_that_cannot_be_copied_is_put_back(make, kind):
    import threading
    model = WithRate("auto")
    if kind == "locked": model.lock = threading.Lock()
    if kind == "patched":
        model.configure_optimizers = lambda: torch.optim.Adam(model.parameters(),
                                                              lr=model.hparams.lr)
    given = torch.compile(model, backend="eager") if kind == "compiled" else model
    fixed = TunerConfig(True, False, {"num_training": 1, "min_lr": 0.01, "max_lr": 0.1})
    plain = WithRate(0.01)
    plain.load_state_dict(model.state_dict())
    if kind == "patched":
        plain.configure_optimizers = lambda: torch.optim.Adam(plain.parameters(),
                                                              lr=plain.hparams.lr)
    make(tuner_config=fixed, seed=1).fit(given, *loaders())
    make(seed=1).fit(plain, *loaders())
    assert model.hparams.lr == pytest.approx(0.01) and same_weights(model, plain)


# What cannot be tuned is said before any training

class Manual(Full):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class NoLoss(Full):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * float("nan")


class NoOptimizer(Full):
    def configure_optimizers(self): return None


class OwnRate(Full):
    def configure_optimizers(self): return torch.optim.SGD([dict(params=self.parameters(), lr=0.0)])


@pytest.mark.parametrize("model, train, config, text", [
    (Manual, loaders()[0], RATE, "optimises by hand"),
    (Manual, loaders()[0], SIZE, "optimises by hand"),
    (NoLoss, loaders()[0], RATE, "no finite loss"),
    (NoOptimizer, loaders()[0], RATE, "gives no optimizer"),
    (OwnRate, loaders()[0], RATE, "needs a positive one"),
    (Full, DataLoader(patterns(64), batch_sampler=[[0, 1], [2, 3]]), SIZE,
     "batch sampler of its own"),
    (Full, DataLoader(Stream(), 4), SIZE, "IterableDataset"),
    (Full, [loaders()[0], loaders()[0]], SIZE, "the training data is a list"),
    (Full, [], RATE, "no training batches|No training batches|empty"),
])
def test_what_cannot_be_tuned(make, model, train, config, text):
    module = model()
    weights = copy.deepcopy(module.state_dict())
    trainer = make(tuner_config=config)
    with pytest.raises(ValueError, match=text): trainer.fit(module, train)
    assert trainer.global_step == 0 and all(torch.equal(v, weights[k])
                                            for k, v in module.state_dict().items())


def test_rate_alone_is_searched_on_streams(make):
    trainer = make(tuner_config=TunerConfig(True, False,
                                            {"num_training": 5, "min_lr": 1e-4, "max_lr": 0.01}))
    trainer.fit(Full(), DataLoader(Stream(), 4))
    assert math.isfinite(trainer.lr_finder.suggestion)


def test_off_and_auto_exclude_each_other(make):
    with pytest.raises(ValueError, match="lr='auto' and batch_size='auto' asks for a search, and "
                                         "tuner_config=False"):
        make(tuner_config=False).fit(WithRate("auto"), datamodule=Numbers("auto"))
    trainer = make(tuner_config=False)
    trainer.fit(WithRate(0.01), *loaders())
    assert trainer.tuner_config is None and trainer.tuning.lr is None


def test_none_searches_nothing_but_auto(make):
    trainer = make()
    trainer.fit(WithRate(0.01), datamodule=Numbers(8))
    assert trainer.tuning.lr is None and trainer.tuning.batch_size is None
    assert isinstance(make(tuner_config=True).tuner_config, TunerConfig)


def test_fast_dev_run_searches_nothing(make):
    trainer = make(fast_dev_run=True, tuner_config=True)
    trainer.fit(WithRate("auto"), datamodule=Numbers("auto"))
    assert trainer.tuning.lr is None and trainer.global_step == 1


def test_resuming_needs_to_know_what_was_found(make):
    first = make()
    first.fit(WithRate(0.01), *loaders())
    with pytest.raises(ValueError, match="lr='auto': resuming skips the search"):
        make(max_epochs=2).fit(WithRate("auto"), *loaders(), ckpt_path="last")


# The memory of the real step

class Heavy(Full):
    "Weights of 48 MiB, which grow with no batch."
    def __init__(self, average=False):
        super().__init__()
        self.big, self.average = torch.nn.Linear(1 << 10, 12 << 10, bias=False), average
    def loss(self, batch): return super().loss(batch) + 0 * self.big.weight.sum()
    def on_before_optimizer_step(self, optimizer): time.sleep(0.1)       # for the watch to see it
    def configure_callbacks(self): return pl.callbacks.EMAWeightAveraging() if self.average else []
    def configure_optimizers(self): return torch.optim.SGD(self.parameters(), lr=0.01)


def memory_of_a_trial(make, model, **kwargs):
    "MiB that a batch of 8 takes."
    config = TunerConfig(False, True, None, {"steps_per_trial": 1, "init_val": 8, "max_val": 8})
    found = find_size(make(**kwargs), model, Data(*loaders()), config)
    return dict(zip(found.sizes, found.memory))[8] / 2**20


def test_averages_of_the_weights_are_in_the_memory(make):
    plain, own = memory_of_a_trial(make, Heavy()), memory_of_a_trial(make, Heavy(average=True))
    given = memory_of_a_trial(make, Heavy(average=True), callbacks=[pl.callbacks.WeightAveraging()])
    assert 30 < own - plain < 70 and 30 < given - own < 70, (plain, own, given)


def test_buckets_of_several_processes_are_in_the_memory(make, monkeypatch):
    plain = memory_of_a_trial(make, Heavy())
    monkeypatch.setattr(AutoTrainer, "world_size", property(lambda self: 2), raising=False)
    assert 30 < memory_of_a_trial(make, Heavy()) - plain < 70
    trial, frozen = SizeTrial(1, averages=1, buckets=True), Heavy()
    frozen.big.requires_grad_(False)
    frozen.average = False
    run_trial(make(), frozen, Data(*loaders()), trial)
    weights = [*frozen.parameters(), *frozen.buffers()]
    trained = [o for o in frozen.parameters() if o.requires_grad]
    assert [o.shape for o in trial.held] == [o.shape for o in [*weights, *trained]]


def test_processes_of_a_machine_share_its_memory(make, monkeypatch):
    one = HostMemory(0.5).limit
    monkeypatch.setattr(AutoTrainer, "num_devices", property(lambda self: 2), raising=False)
    assert memory_of(make(), 0.5).limit == pytest.approx(one / 2, rel=0.1)


def test_a_backbone_that_is_thawed_later_counts_as_thawed(make):
    class Thaws(Full):
        thawed = []
        def __init__(self):
            super().__init__()
            self.save_hyperparameters({"unfreeze_after": 3})
            self.net[0].requires_grad_(False)
        def unfreeze_backbone(self):
            self.net[0].requires_grad_(True)
            self.thawed.append(self)
    model = Thaws()
    find_size(make(), model, Data(*loaders()), SIZE)
    assert Thaws.thawed and model not in Thaws.thawed and not model.net[0].weight.requires_grad


def test_validation_must_fit_too(make):
    class Eval(Full):
        sizes = []
        def validation_step(self, batch, batch_idx):
            self.sizes.append((batch_idx, len(batch[0]), torch.is_grad_enabled(), self.training))
            if len(batch[0]) > 8: raise RuntimeError("CUDA out of memory. Tried to allocate 1 GiB")
    train, _ = loaders()
    config = TunerConfig(False, True, None, {"steps_per_trial": 1})
    found = find_size(make(), Eval(), Data(train, DataLoader(patterns(32, 2), 16)), config)
    assert found.suggestion == 8 and found.reason == "16 runs out of memory"
    assert Eval.sizes == [(0, n, False, False) for n in (2, 2, 4, 8, 16, 8)]
    Eval.sizes.clear()                               # of another size than the training's: as it is
    assert find_size(make(), Eval(), Data(train, DataLoader(patterns(32, 2), 4)),
                     config).suggestion == 64
    assert {n for _, n, *_ in Eval.sizes} == {4}
    Eval.sizes.clear()
    assert find_size(make(limit_val_batches=0), Eval(), Data(*loaders()), config).suggestion == 64
    assert not Eval.sizes


def test_a_gpu_keeps_a_tenth_of_its_memory(make, monkeypatch):
    """A stand-in of 8 GB, of which 1 GB is another process's; the weights take 5 GB, and a sample
    40 MB."""
    cuda, calls, size = torch.cuda, [], []
    class Stepping(Full):
        def training_step(self, batch, batch_idx):
            size.append(len(batch[0]))
            if 5000 + 40 * size[-1] > 7000:
                raise RuntimeError("CUDA out of memory. Tried to allocate 1 GiB")
            return super().training_step(batch, batch_idx)
    monkeypatch.setattr(cuda, "empty_cache", lambda: calls.append("empty"))
    monkeypatch.setattr(cuda, "reset_peak_memory_stats", lambda device: calls.append("reset"))
    monkeypatch.setattr(cuda, "mem_get_info", lambda device: (6500 * 10**6, 8000 * 10**6))
    monkeypatch.setattr(cuda, "memory_reserved", lambda device: 500 * 10**6)
    monkeypatch.setattr(cuda, "max_memory_reserved", lambda device: (5000 + 40 * size[-1]) * 10**6)
    memory = CudaMemory(torch.device("cuda", 0))
    assert memory.limit == 6300 * 10**6 and CudaMemory(torch.device("cuda", 0),
                                                       0.5).limit == 3500 * 10**6
    config = TunerConfig(False, True, None, {"steps_per_trial": 1, "mode": "binsearch"})
    found = find_size(make(), Stepping(), Data(*loaders(256)), config, memory)
    # 64 ran out of memory
    assert found.suggestion == 32 and found.sizes == [16, 32, 48, 40, 36, 34, 33]
    assert found.memory[found.sizes.index(48)] == 6920 * 10**6 > memory.limit
    assert calls[:4] == ["empty", "empty", "empty",
                         "reset"] and calls.count("reset") == len(found.sizes) + 1


def test_callbacks_of_a_search_are_left_alone(make):
    """Neither the trainer's nor the model's are run; a configure_callbacks of the instance's own
    stays."""
    class Refuses(pl.callbacks.WeightAveraging):
        def setup(self, *args): raise AssertionError("was run")
    class Own(Full):
        def configure_callbacks(self): return [Refuses()]
    trainer, model = make(callbacks=[Refuses()]), Own()
    model.configure_callbacks = own = lambda: Refuses()
    find_size(trainer, model, Data(*loaders()), SIZE)
    find_rate(trainer, model, Data(*loaders()), RATE)
    assert model.configure_callbacks is own


def test_loaders_are_resized_while_a_block_runs(make):
    train, val = loaders()
    other = DataLoader(patterns(32, 2), 4)
    trainer, plain = make(), make()
    process = trainer.strategy.process_dataloader
    class Two(Full):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            super().validation_step(batch, batch_idx)
    with resized_loaders(trainer, Data(train), 8): trainer.fit(Two(), train, [val, other])
    assert trainer.strategy.process_dataloader == process
    assert trainer.train_dataloader.batch_size == 8 and [o.batch_size
                                                         for o in trainer.val_dataloaders] == [8, 4]
    assert train.batch_size == val.batch_size == 16
    with resized_loaders(plain, Data(train), None): plain.fit(Full(), train, val)
    assert (plain.train_dataloader.dataset is train.dataset
            and plain.train_dataloader.batch_size == train.batch_size)


# Several processes

DDP = """
import json, os, sys
from small_models import *
from test_tuner import BOTH, Numbers, Seen
from autotimm.trainer import AutoTrainer
if __name__ == "__main__":
    folder, strategy = sys.argv[1:]
    seen, model, data = Seen(), WithRate("auto"), Numbers("auto")
    trainer = AutoTrainer(max_epochs=1, devices=2, strategy=strategy, callbacks=[seen], tuner_config=BOTH, default_root_dir=folder, **QUIET)
    trainer.fit(model, datamodule=data)
    if strategy == "ddp": trainer.validate(model, datamodule=data, ckpt_path="best", verbose=False)
    found = dict(weights=[p.sum().item() for p in model.parameters()], folder=str(trainer.run_folder)) | dict(sizes=seen.sizes, rates=seen.rates[:1], size=data.batch_size, lr=model.hparams.lr, history=len(trainer.history), best=os.path.basename(trainer.best_model_path))
    open(f"{folder}/rank{trainer.global_rank}.json", "w").write(json.dumps(found))
"""


def run_script(tmp_path: Path, text: str, *args: str, launcher: tuple[str, ...] = ()) -> list[dict]:
    "What each process of a script came to."
    (tmp_path / "run.py").write_text(text)
    env = {**os.environ, "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(tmp_path / "run.py"), str(tmp_path), *args]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(path.read_text()) for path in sorted(tmp_path.glob("rank*.json"))]


def run_ddp(tmp_path: Path, strategy: str) -> list[dict]:
    "What each process came to."
    return run_script(tmp_path, DDP, strategy)


def test_two_processes_use_what_the_first_one_found(tmp_path):
    first, second = run_ddp(tmp_path, "ddp")
    # Each process names the file by its own loss; the first one's is there
    best = first.pop("best"), second.pop("best")
    assert first == second and first["sizes"] == [32] and first["size"] == 32
    assert (first["rates"][0] == pytest.approx([first["lr"] / 10, first["lr"]])
            and best[0].startswith("best-"))


def test_spawned_processes_too(tmp_path):
    (first,) = run_ddp(tmp_path, "ddp_spawn")  # the main process, which trained nothing itself
    assert (first["size"] == 32 and first["lr"] > 0 and first["history"] == 1
            and first["best"].startswith("best-"))


FOLDS = """
import json, sys, time
from datetime import timedelta
from pytorch_lightning.strategies import DDPStrategy
from torchmetrics.classification import MulticlassAccuracy
from small_models import *
from test_tuner import BOTH, NoLoss, Numbers, Seen
from autotimm.trainer import AutoTrainer

class Synced(WithRate):
    "Talks to the other processes wherever it believes that there are some, and is slow while it is searched."
    rest = 0
    def __init__(self, lr="auto"):
        super().__init__(lr)
        self.accuracy = MulticlassAccuracy(4)
    def training_step(self, batch, batch_idx):
        if self.trainer.world_size == 1: self.wait()
        if torch.distributed.is_initialized(): torch.distributed.all_reduce(torch.ones(1))
        self.accuracy(self(batch[0]), batch[1])
        self.log("train/synced", self.accuracy)
        loss = super().training_step(batch, batch_idx)
        self.log("train/mean", loss, sync_dist=True, on_step=True, on_epoch=True)
        return loss
    def wait(self):
        assert not torch.distributed.is_initialized()
        time.sleep(Synced.rest)
        Synced.rest = 0

if __name__ == "__main__":
    folder, seconds, rest = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    Synced.rest, found = rest, []
    for fold in range(3):
        seen, model, data = Seen(), NoLoss() if fold == 1 else Synced(), Numbers("auto")
        how = DDPStrategy(timeout=timedelta(seconds=seconds))
        trainer = AutoTrainer(max_epochs=1, devices=2, strategy=how, callbacks=[seen], tuner_config=BOTH, default_root_dir=folder, **QUIET)
        try: trainer.fit(model, datamodule=data)
        except ValueError as e: found.append("no finite loss" in str(e))
        else: found.append([model.hparams.lr, data.batch_size, seen.sizes, seen.rates[0]])
    assert torch.distributed.is_initialized()
    open(f"{folder}/rank{trainer.global_rank}.json", "w").write(json.dumps(found))
"""


@pytest.mark.parametrize("start", ["script", "torchrun"])
def test_folds_on_two_processes(tmp_path, start):
    """A search finds the same for all: in a group that is there already, when it fails for one, and
    when it takes longer than the group waits."""
    if start == "script": first, second = run_script(tmp_path, FOLDS, "1800", "0")
    else:
        launcher = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d",
                    "--rdzv-endpoint=localhost:0")
        first, second = run_script(tmp_path, FOLDS, "10", "15", launcher=launcher)
    assert first == second and first[1] is True
    for rate, size, sizes, rates in (first[0], first[2]):
        assert (size, sizes) == (32, [32]) and rates == pytest.approx([rate / 10, rate])


def test_a_search_looks_alone_and_comes_back(tmp_path):
    distributed = torch.distributed
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0,
                                   world_size=1)
    try:
        group = distributed.group.WORLD
        with pytest.raises(OSError), alone():
            assert not distributed.is_initialized()
            raise OSError
        assert distributed.is_initialized() and distributed.group.WORLD is group
        distributed.barrier()
    finally: distributed.destroy_process_group()
    with alone(): assert not distributed.is_initialized()
    assert not distributed.is_initialized()
