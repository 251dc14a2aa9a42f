"""A run that ends inside an epoch, however it does, goes on to the weights and the history of an
unbroken one."""
import contextlib
import glob
import os
import signal
import time
from datetime import timedelta

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from small_models import QUIET, Full, loaders, patterns, same_weights


from autotimm.checkpoints import find_unfinished, read_run
from autotimm import seeding
from autotimm.resuming import BATCH, STOPPED, VALIDATION, state
from autotimm.trainer import AutoTrainer


class Seen(pl.Callback):
    "Notes the batches, and acts at one of them."
    def __init__(self, at=None, act=None): self.batches, self.at, self.act = [], at, act
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append((trainer.current_epoch, batch_idx, float(batch[0].double().sum())))
        if self.at == len(self.batches): self.act()


class FailsOnce(Full):
    """Fails in its sixth step after the forward pass, when BatchNorm, metrics and logs have seen
    the batch."""
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.note_step()
        return loss
    def note_step(self):
        if self.trainer.current_epoch == 1 and self.trainer.fit_loop.epoch_loop.batch_idx == 1:
            raises()


class FailsInBackward(FailsOnce):
    "Fails in the backward pass of its sixth step, when some gradients have been added to."
    def note_step(self): pass
    def on_after_backward(self): FailsOnce.note_step(self)


class BrokenValidation(Full):
    "Fails in the validation of its second epoch."
    def validation_step(self, batch, batch_idx):
        if self.trainer.current_epoch == 1 and batch_idx == 1:
            raise RuntimeError("a validation that fails")
        super().validation_step(batch, batch_idx)


def run(root, ckpt=None, seed=0, model=Full, at=None, act=None, error=None, callbacks=(),
        data=loaders, **how):
    "A run of three epochs of four batches; the trainer, the model, what it saw."
    torch.set_num_threads(1)
    pl.seed_everything(seed, verbose=False)
    seen, model = Seen(at, act), model()
    trainer = AutoTrainer(default_root_dir=str(root), callbacks=[seen, *callbacks],
                          **{**QUIET, "max_epochs": 3, **how})
    with pytest.raises(error) if error else contextlib.nullcontext():
        trainer.fit(model, *data(), ckpt_path=ckpt)
    return trainer, model, seen.batches


def assert_goes_on(whole, root, ckpt="last", **how):
    "Going on from another random state gives what the unbroken run gave."
    trainer, model, seen = run(root, ckpt, seed=7, **how)
    assert seen == whole[2][len(whole[2]) - len(seen):]
    assert trainer.history == whole[0].history and same_weights(model, whole[1])
    return len(seen)


def raises(): raise RuntimeError("a step that fails")


ENDS = {
    "ctrl-c": (dict(at=6, act=lambda: os.kill(os.getpid(), signal.SIGINT), error=SystemExit),
               BATCH, 6),
    "sigterm": (dict(at=6, act=lambda: os.kill(os.getpid(), signal.SIGTERM), error=BaseException),
                BATCH, 6),
    "exception": (dict(at=6, act=raises, error=RuntimeError), BATCH, 7),
    "forward": (dict(model=FailsOnce, error=RuntimeError), BATCH, 7),
    "backward": (dict(model=FailsInBackward, error=RuntimeError), BATCH, 7),
    "validation": (dict(model=BrokenValidation, error=RuntimeError), VALIDATION, 4),
    "max_steps": (dict(max_steps=6, max_epochs=-1), STOPPED, 6),
    "max_time": (dict(at=6, act=lambda: time.sleep(3), max_time=timedelta(seconds=3)), BATCH, 6),
}


@pytest.mark.parametrize("end", ENDS)
def test_a_run_that_ends_inside_an_epoch(end, tmp_path):
    how, place, left = ENDS[end]
    whole = run(tmp_path / "whole")
    trainer, _, _ = run(tmp_path / "broken", **how)
    kept = read_run(trainer.last_model_path)
    assert kept["place"] == place and kept["finished"] == (end == "max_steps")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler or end == "ctrl-c"
    assert assert_goes_on(whole, tmp_path / "broken",
                          "last" if kept["finished"] else "auto") == left


@pytest.mark.parametrize("how", [{}, dict(val_check_interval=0.5), dict(check_val_every_n_epoch=2),
                                 dict(accumulate_grad_batches=3)], ids=str)
def test_any_batch_is_a_good_one_to_stop_at(how, tmp_path):
    "Stopped at every second batch; gradients that are still being accumulated are kept."
    whole = run(tmp_path / "whole", **how)
    for at in range(1, 12, 2):
        run(tmp_path / str(at), at=at, act=lambda: os.kill(os.getpid(), signal.SIGTERM),
            error=BaseException, **how)
        assert assert_goes_on(whole, tmp_path / str(at), **how) == 12 - at


@pytest.mark.parametrize("how", [{}, dict(val_check_interval=0.5)], ids=str)
def test_the_files_of_a_users_model_checkpoint(how, tmp_path):
    "Written in the middle of a hook, also before a validation that is still due."
    keeps = ModelCheckpoint(tmp_path / "own", filename="{step}", every_n_train_steps=1,
                            save_top_k=-1)
    whole = run(tmp_path / "whole", callbacks=[keeps], **how)
    files = sorted(glob.glob(str(tmp_path / "own" / "*.ckpt")), key=os.path.getmtime)
    assert len(files) == 12
    for done, file in enumerate(files[:-1], 1):
        assert assert_goes_on(whole, tmp_path / f"on{done}", file, **how) == 12 - done


def test_a_run_that_had_come_to_its_end_has_its_history(tmp_path):
    whole = run(tmp_path)
    trainer, model, seen = run(tmp_path, "last", seed=7)
    assert seen == [] and trainer.history == whole[0].history and same_weights(model, whole[1])
    assert trainer.callback_metrics["val/loss"] == whole[0].callback_metrics["val/loss"]


class FailsAfterItsStep(Full):
    "Fails when the optimiser has changed the weights."
    def optimizer_step(self, *given):
        super().optimizer_step(*given)
        if self.trainer.global_step == 5: raises()


@pytest.mark.parametrize("model, how", [(FailsAfterItsStep, {}),
                                        (FailsInBackward, dict(accumulate_grad_batches=3))])
def test_a_step_that_cannot_be_taken_back_is_not_written(model, how, tmp_path):
    whole = run(tmp_path / "whole", checkpoint_interval=1, **how)
    with pytest.warns(UserWarning, match="last.ckpt stays as it was"):
        run(tmp_path / "broken", model=model, error=RuntimeError, checkpoint_interval=1, **how)
    assert assert_goes_on(whole, tmp_path / "broken", **how) >= 7


class Prepares(Full):
    "Starts each epoch with a metric and a list of its own."
    def __init__(self):
        super().__init__()
        from torchmetrics import MeanMetric
        self.mean = MeanMetric()
    def on_train_epoch_start(self):
        self.mean.reset()
        self.losses = []
        self.log("start", torch.tensor(2.0), reduce_fx="sum")
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.mean.update(loss.detach())
        self.losses.append(loss.detach())
        return loss
    def on_train_epoch_end(self):
        assert self.losses
        self.log("train/mean", self.mean.compute())


class Thaws(pl.callbacks.BackboneFinetuning):
    "Thaws the first layer in the second epoch, at a rate that grows from epoch to epoch."
    def __init__(self):
        super().__init__(1, lambda epoch: 1.5, backbone_initial_lr=1e-3, train_bn=False)
    def on_fit_start(self, trainer, pl_module):
        pl_module.backbone = pl_module.net[0]
        super().on_fit_start(trainer, pl_module)


class Counts(pl.Callback):
    "Counts epochs, and keeps the count in checkpoints."
    epochs = 0
    def on_train_epoch_start(self, *_): self.epochs += 1
    def state_dict(self): return {"epochs": self.epochs}
    def load_state_dict(self, state): self.epochs = state["epochs"]


class Backbone(Full):
    "Has a backbone that a callback may thaw."
    def __init__(self):
        super().__init__()
        self.backbone = self.net[0]
    def configure_optimizers(self):
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.01)


STARTS = {"module": (Prepares, lambda: []), "counts": (Full, lambda: [Counts()]),
          "accumulates": (Full, lambda: [pl.callbacks.GradientAccumulationScheduler({0: 2, 1: 4})]),
          "averages": (Full,
                       lambda: [pl.callbacks.StochasticWeightAveraging(0.02, swa_epoch_start=1,
                                                                       annealing_epochs=2)]),
          "thaws": (Backbone, lambda: [Thaws()])}


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("at", [6, 7])
def test_what_the_start_of_an_epoch_prepares_is_there_after_a_resume_inside_it(start, at, tmp_path):
    model, callbacks = STARTS[start]
    whole = run(tmp_path / "whole", model=model, callbacks=callbacks())
    run(tmp_path / "broken", model=model, callbacks=callbacks(), at=at,
        act=lambda: os.kill(os.getpid(), signal.SIGINT), error=SystemExit)
    again = callbacks()
    assert assert_goes_on(whole, tmp_path / "broken", model=model,
                          callbacks=again) == 12 - at + 4 * (start == "averages")
    if start == "counts": assert again[0].epochs == 3


def test_another_number_of_processes_begins_the_epoch_again(tmp_path):
    run(tmp_path, at=7, act=lambda: os.kill(os.getpid(), signal.SIGINT), error=SystemExit)
    file, = tmp_path.glob("**/last.ckpt")
    kept = torch.load(file, weights_only=True)
    kept["autotimm"]["processes"] *= 2          # as two would have written it
    torch.save(kept, file)
    with pytest.warns(UserWarning, match="written by 2 processes and is resumed by 1"):
        trainer, _, seen = run(tmp_path, "auto", seed=7)
    assert [o[:2] for o in seen] == [(e, i) for e in (1, 2) for i in range(4)]
    assert (["val/loss" in row for row in trainer.history] == [True] * 3
            and read_run(file)["finished"])


class Stream(torch.utils.data.IterableDataset):
    "Samples without an order that could be gone back to."
    def __init__(self, n=16, said=None): self.data, self.said = patterns(n), said or n
    def __len__(self): return self.said
    def __iter__(self): return iter([self.data[i] for i in range(len(self.data))])


def stream(root, ckpt=None, seed=0, at=None, data=None, **how):
    "A run on a stream, which may fail at a batch."
    return run(root, ckpt, seed, at=at, act=raises, error=RuntimeError if at else None,
               data=lambda: [torch.utils.data.DataLoader(data or Stream(), 4)], **how)


def test_a_stream_starts_its_epoch_again(tmp_path):
    stream(tmp_path, at=7)
    with pytest.warns(UserWarning, match="the epoch starts again"):
        _, _, seen = stream(tmp_path, "auto", seed=3)
    assert [o[:2] for o in seen] == [(e, i) for e in (1, 2) for i in range(4)]


def test_a_stream_between_epochs_goes_on_exactly(tmp_path):
    _, whole, _ = stream(tmp_path / "whole", checkpoint_interval=None)
    stream(tmp_path / "broken", at=5, checkpoint_interval=None)
    assert same_weights(stream(tmp_path / "broken", "last", seed=3)[1], whole)


def test_an_epoch_that_is_shorter_than_its_loader_says_ends_no_run(tmp_path):
    trainer, _, _ = stream(tmp_path, at=8, data=Stream(12, said=16))
    assert not read_run(trainer.last_model_path)["finished"]
    trainer, _, seen = stream(tmp_path, "auto", data=Stream(12, said=16))
    assert trainer.run_folder.name == "version_0" and seen[-1][0] == 2
    assert read_run(trainer.last_model_path)["finished"]


def test_a_run_that_was_told_to_stop_is_finished(tmp_path):
    class Stops(pl.Callback):
        def on_train_batch_end(self, trainer, *_): trainer.should_stop = trainer.global_step == 6
    trainer, _, _ = run(tmp_path, callbacks=[Stops()])
    assert trainer.global_step == 6 and read_run(trainer.last_model_path)["finished"]
    assert find_unfinished(tmp_path / "checkpoints") is None


class Longer(torch.utils.data.Sampler):
    "Says that it has more than it gives."
    def __len__(self): return 64
    def __iter__(self): return iter(range(40))


class Twice(torch.utils.data.DataLoader):
    "Gives each batch twice."
    def __len__(self): return 2 * super().__len__()
    def __iter__(self): return (batch for batch in super().__iter__() for _ in range(2))


@pytest.mark.parametrize("loader",
                         [lambda data: torch.utils.data.DataLoader(data, 16, sampler=Longer()),
                          lambda data: Twice(data, 16)])
def test_loaders_of_another_length_than_their_sampler_train(loader, tmp_path):
    data, steps = loaders()[0].dataset, []
    for kind in (pl.Trainer, AutoTrainer):
        how = (dict(checkpoint_interval=1) if kind is AutoTrainer
               else dict(logger=False, enable_checkpointing=False))
        trainer = kind(max_epochs=2, default_root_dir=str(tmp_path), **QUIET, **how)
        trainer.fit(Full(), loader(data))
        steps.append(trainer.global_step)
    assert steps[0] == steps[1]


def test_loaders_that_are_made_anew_each_epoch(tmp_path):
    class Own(Full):
        def train_dataloader(self): return loaders()[0]
    how = dict(model=Own, data=list, reload_dataloaders_every_n_epochs=1)
    whole = run(tmp_path / "whole", **how)
    run(tmp_path / "broken", at=6, act=lambda: os.kill(os.getpid(), signal.SIGINT),
        error=SystemExit, **how)
    assert assert_goes_on(whole, tmp_path / "broken", **how) == 6


class ByHand(Full):
    "Accumulates two batches in an optimisation of its own."
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
    def training_step(self, batch, batch_idx):
        self.manual_backward(super().training_step(batch, batch_idx))
        if batch_idx % 2:
            self.optimizers().step()
            self.optimizers().zero_grad()


def test_gradients_that_a_module_accumulates_by_itself(tmp_path):
    whole = run(tmp_path / "whole", model=ByHand)
    for at in (6, 7):
        run(tmp_path / str(at), model=ByHand, at=at,
            act=lambda: os.kill(os.getpid(), signal.SIGINT), error=SystemExit)
        assert assert_goes_on(whole, tmp_path / str(at), model=ByHand) == 12 - at


def test_a_file_that_a_callback_writes_while_gradients_are_accumulated(tmp_path):
    class Writes(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.current_epoch == 1: trainer.save_checkpoint(tmp_path / f"{batch_idx}.ckpt")
    how = dict(accumulate_grad_batches=4)
    whole = run(tmp_path / "whole", callbacks=[Writes()], **how)
    for done in (1, 2):
        assert assert_goes_on(whole, tmp_path / f"on{done}", str(tmp_path / f"{done - 1}.ckpt"),
                              **how) == 8 - done


def test_a_quick_look_resumes_nothing(tmp_path):
    run(tmp_path, at=6, act=raises, error=RuntimeError)
    trainer, _, seen = run(tmp_path, "auto", fast_dev_run=True)
    assert len(seen) == 1 and trainer.global_step == 1


def test_an_interval_of_numpy(tmp_path):
    import numpy as np
    trainer, _, _ = run(tmp_path, checkpoint_interval=np.int64(3), max_epochs=1)
    assert trainer.global_step == 4


class Drawn(torch.utils.data.Dataset):
    "Images of validation that draw random numbers."
    def __init__(self, data): self.data = data
    def __len__(self): return len(self.data)
    def __getitem__(self, i): return self.data[i][0] + torch.randn(1), self.data[i][1]


@pytest.mark.parametrize("at", [2, 4, 7, 8])
def test_a_validation_that_draws_random_numbers_draws_the_same_after_a_resume(at, tmp_path):
    "Whether a sanity check or another validation of the epoch came before it in this process."
    def fit(root, seed, ckpt=None, steps=-1):
        torch.set_num_threads(1)
        pl.seed_everything(seed, verbose=False)
        train, val = loaders()
        trainer = AutoTrainer(default_root_dir=str(root), max_epochs=3, max_steps=steps,
                              val_check_interval=0.5, checkpoint_interval=1, **QUIET)
        trainer.fit(Full(), train, torch.utils.data.DataLoader(Drawn(val.dataset), 16),
                    ckpt_path=ckpt)
        return trainer.history
    whole = fit(tmp_path / "whole", 0)
    fit(tmp_path / "broken", 0, steps=at)
    assert fit(tmp_path / "broken", 7, "last") == whole


def test_the_best_checkpoint_of_a_validation_inside_an_epoch(tmp_path):
    "One row an epoch, with its training metrics."
    whole = run(tmp_path / "whole", val_check_interval=0.5)
    trainer, _, _ = run(tmp_path / "on", whole[0].best_model_path, seed=3, val_check_interval=0.5)
    assert [row["epoch"] for row in trainer.history] == [0, 1,
                                                         2] and trainer.history == whole[0].history
    assert all("train/loss" in row for row in trainer.history)


def test_a_run_of_max_steps_goes_on_to_the_end_of_its_schedule(tmp_path):
    class OneCycle(Full):
        "Asks for the length of the training, and so sets the loaders up early."
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20)
            assert self.trainer.estimated_stepping_batches
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle,
                                                             "interval": "step"}}
    whole = run(tmp_path / "whole", model=OneCycle, max_steps=20, max_epochs=-1)
    run(tmp_path / "broken", model=OneCycle, max_steps=15, max_epochs=-1)
    assert assert_goes_on(whole, tmp_path / "broken", model=OneCycle, max_steps=20,
                          max_epochs=-1) == 5


def test_auto_begins_a_run_where_all_are_finished(tmp_path):
    first, _, _ = run(tmp_path, "auto", max_epochs=1)
    assert (read_run(first.last_model_path)["finished"]
            and find_unfinished(tmp_path / "checkpoints") is None)
    second, _, _ = run(tmp_path, "auto", at=2, act=raises, error=RuntimeError)
    third, _, seen = run(tmp_path, "auto")
    assert [o.run_folder.name for o in (first, second, third)] == ["version_0", "version_1",
                                                                   "version_1"] and len(seen) == 11


def test_a_sampler_that_cannot_be_replayed_starts_its_epoch_again(tmp_path):
    class Growing(torch.utils.data.Sampler):
        calls = 0
        def __len__(self): return 64
        def __iter__(self):
            Growing.calls += 1
            return iter([(i + Growing.calls) % 64 for i in range(64)])
    def fit(seed, ckpt=None, at=None):
        seen, model = Seen(at, raises), Full()
        loader = torch.utils.data.DataLoader(loaders()[0].dataset, 16, sampler=Growing())
        trainer = AutoTrainer(max_epochs=2, default_root_dir=str(tmp_path), callbacks=[seen],
                              **QUIET)
        if at is not None:
            with pytest.raises(RuntimeError, match="fails"): trainer.fit(model, loader)
        else:
            with pytest.warns(UserWarning, match="the epoch starts again"):
                trainer.fit(model, loader, ckpt_path=ckpt)
        return seen.batches
    fit(0, at=7)
    assert [o[:2] for o in fit(1, "last")] == [(1, i) for i in range(4)]


def test_a_full_disk_and_a_folder_that_is_gone(tmp_path, monkeypatch):
    def full(obj, file):
        file.write(b"a part")
        raise OSError(28, "No space left on device")
    first, _, _ = run(tmp_path, max_epochs=1)
    before = open(first.last_model_path, "rb").read()
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left on device: the checkpoint could not be "
                                      "written. The one before it is whole"):
        run(tmp_path, "last", max_epochs=2, checkpoint_interval=1, checkpoint_monitor=None)
    monkeypatch.undo()
    assert (open(first.last_model_path, "rb").read() == before
            and [o.name for o in first.run_folder.glob(".*")] == [])
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="Give a default_root_dir"): run(tmp_path / "file")


@pytest.mark.parametrize("bad", [0, -1, timedelta(seconds=-1), "10 minutes", True])
def test_an_interval_that_cannot_be_is_named(bad, tmp_path):
    with pytest.raises((TypeError, ValueError), match="checkpoint_interval must be"):
        AutoTrainer(checkpoint_interval=bad)


class Measured(Full):
    "Measures its validation by a metric of torchmetrics, and breaks off in the middle of one."
    broken = True

    def __init__(self):
        super().__init__()
        from torchmetrics.classification import MulticlassAccuracy
        self.measure = MulticlassAccuracy(4, average="micro")

    def validation_step(self, batch, batch_idx):
        if type(self).broken and self.trainer.current_epoch == 1 and batch_idx == 1:
            raise RuntimeError("a validation that fails")
        self.measure(self(batch[0]), batch[1])
        self.log("val/measured", self.measure, on_step=False, on_epoch=True)
        super().validation_step(batch, batch_idx)


class Unbroken(Measured): broken = False


def test_a_validation_that_is_broken_off_is_not_counted_twice(tmp_path):
    whole = run(tmp_path / "whole", model=Unbroken)
    run(tmp_path / "broken", model=Measured, error=RuntimeError)
    assert assert_goes_on(whole, tmp_path / "broken", model=Unbroken) == 4


def test_states_of_metrics_that_no_checkpoint_may_hold_are_left_out(tmp_path):
    from torchmetrics import Metric
    from autotimm.resuming import metric_states
    class Packed(Metric):
        "Keeps pairs, as a metric of masks does."
        def __init__(self):
            super().__init__()
            self.add_state("pairs", [], dist_reduce_fx=None)
        def update(self): self.pairs.append(((3, 4), b"runs"))
        def compute(self): return torch.tensor(len(self.pairs))
    holder = torch.nn.ModuleDict({"packed": Packed()})
    holder["packed"].update()
    assert metric_states(holder) == {}


def test_the_random_numbers_of_a_gpu_before_a_step_that_fails(tmp_path, monkeypatch):
    """The step comes again with the numbers that it drew; a generator on the CPU stands in for the
    GPU's."""
    gpu = torch.Generator()
    class Draws(Full):
        "Its loss depends on numbers drawn on the GPU, so its weights do."
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx) * (1 + torch.rand((), generator=gpu))
            if self.global_step == self.failing:
                raise RuntimeError("a step that fails after its draw")
            return loss
    class Breaks(Draws): failing = 5
    class Works(Draws): failing = -1
    monkeypatch.setattr(seeding, "accelerator_states", lambda: {"cuda": gpu.get_state()})
    monkeypatch.setattr(state, "accelerator_states", seeding.accelerator_states)
    monkeypatch.setattr(seeding, "set_random_states",
                        lambda states, put_back=seeding.set_random_states: (
                            put_back(states), gpu.set_state(states["cuda"])))
    monkeypatch.setattr(state, "set_random_states", seeding.set_random_states)
    def fit(root, model, seed, ckpt=None):
        torch.set_num_threads(1)
        pl.seed_everything(seed, verbose=False)
        gpu.manual_seed(seed)
        model = model()
        # No statistics that the failing step leaves behind
        model.net[1], model.net[3] = torch.nn.Identity(), torch.nn.Identity()
        trainer = AutoTrainer(max_epochs=3, default_root_dir=str(root), **QUIET)
        with pytest.raises(RuntimeError,
                           match="after its draw") if model.failing > 0 else contextlib.nullcontext():
            trainer.fit(model, *loaders(), ckpt_path=ckpt)
        return model
    whole = fit(tmp_path / "whole", Works, 0)
    fit(tmp_path / "broken", Breaks, 0)
    assert same_weights(fit(tmp_path / "broken", Works, 7, "last"), whole)


@pytest.mark.parametrize("at", [3, 4])
def test_a_callback_that_fails_after_a_batch_with_a_validation_due(tmp_path, at):
    class Fails(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == at: raise RuntimeError("a callback that fails")
    whole = run(tmp_path / "whole")
    run(tmp_path / "broken", callbacks=[Fails()], error=RuntimeError)
    assert assert_goes_on(whole, tmp_path / "broken") == 12 - at


def test_a_second_model_with_a_users_scaler(tmp_path):
    from pytorch_lightning.plugins import MixedPrecision
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1)
    trainer = AutoTrainer(max_epochs=1, default_root_dir=str(tmp_path),
                          plugins=[MixedPrecision("16-mixed", "cpu", scaler)], **QUIET)
    for _ in range(2):
        trainer.fit(Full(), *loaders())
        assert scaler.get_scale() == 8.0 * 2**4


def test_the_trainer_goes_to_spawned_processes(tmp_path):
    import pickle
    trainer = AutoTrainer(default_root_dir=str(tmp_path), **QUIET)
    assert pickle.loads(pickle.dumps(trainer.strategy.process_dataloader)) is not None


def test_what_was_set_and_added_since_stays_for_a_second_model(tmp_path):
    "Lightning's constructor runs again, with the arguments that were given."
    class Collects(pl.Callback):
        "No state that Lightning knows of."
        def __init__(self): self.losses = []
        def on_validation_end(self, trainer, pl_module):
            self.losses.append(float(trainer.callback_metrics["val/loss"]))
    first, later = Collects(), Seen()
    trainer = AutoTrainer(max_epochs=2, default_root_dir=str(tmp_path), callbacks=[first],
                          num_sanity_val_steps=0, **QUIET)
    trainer.fit(Full(), *loaders())
    trainer.callbacks.append(later)
    trainer.limit_train_batches = 3
    trainer.fit_loop.max_epochs = 1
    trainer.fit(Full(), *loaders())
    assert (trainer.current_epoch == 1 and trainer.global_step == 3 and len(later.batches) == 3
            and len(first.losses) == 3)
    assert (trainer.callbacks.count(first) == trainer.callbacks.count(later) == 1
            and trainer.run_folder.name == "version_1")


def test_the_loggers_of_a_run_go_on_with_it(tmp_path):
    "Each value once, in one file, though the run went two steps further than its last checkpoint."
    import csv
    from autotimm.loggers import LoggerConfig
    class Steps(Full):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("train/step_loss", loss, on_step=True, on_epoch=False)
            return loss
    def stop(): os.kill(os.getpid(), signal.SIGKILL)
    how = dict(model=Steps, checkpoint_interval=3, log_every_n_steps=1)
    def logger(): return [LoggerConfig("csv", {"save_dir": str(tmp_path / "csv")})]
    if (child := os.fork()) == 0:
        try: run(tmp_path, "auto", at=9, act=stop, logger=logger(), **how)
        finally: os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    run(tmp_path, "auto", seed=7, logger=logger(), **how)
    file, = tmp_path.glob("csv/**/metrics.csv")
    rows = list(csv.DictReader(file.open()))
    values = [(key, int(row["step"])) for row in rows for key, value in row.items()
              if value and key not in ("step", "epoch")]
    assert len(values) == len(set(values))
    assert [step for key, step in values if key == "train/step_loss"] == list(range(12))
    assert [step for key, step in values if key == "val/loss"] == [3, 7, 11]


def test_a_signal_that_still_waits_at_the_end_is_obeyed_then(tmp_path):
    "It came after the last batch had begun; the run is whole, and the handler is the user's own."
    heard = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    class Last(pl.Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 11: os.kill(os.getpid(), signal.SIGUSR1)
    try: trainer, _, _ = run(tmp_path, callbacks=[Last()])
    finally: signal.signal(signal.SIGUSR1, before)
    assert (heard == [signal.SIGUSR1] and trainer.global_step == 12
            and read_run(trainer.last_model_path)["finished"])
