"""One training run in a process of its own, for test_resume.py: python resume_run.py SETTINGS.json
..."""
import os
import random
import signal

import numpy as np
import pytorch_lightning as pl
import torch
from forked import run_files
from small_models import QUIET, WithRate, patterns
from torch.utils.data import DataLoader, Dataset, RandomSampler

from autotimm.trainer import AutoTrainer
from autotimm.tuning import TunerConfig


class Noisy(Dataset):
    "Augments with all three kinds of random numbers."
    def __init__(self, data): self.data = data
    def __len__(self): return len(self.data)
    def __getitem__(self, i):
        x, y = self.data[i]
        return x + 0.1 * torch.randn(8) + 0.1 * random.random() + 0.1 * np.random.rand(), y


class Module(WithRate):
    def __init__(self, lr=0.01, schedule="none", draws=False):
        super().__init__(lr)
        self.save_hyperparameters()

    def on_train_epoch_start(self):
        if self.hparams.draws: torch.rand(3)

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        if self.hparams.schedule == "plateau":
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0,
                                                                   factor=0.3, threshold=0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler,
                                                             "monitor": "val/loss",
                                                             "frequency": self.trainer.check_val_every_n_epoch}}
        if self.hparams.schedule == "step":
            return {"optimizer": optimizer,
                    "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(
                        optimizer, 40), "interval": "step"}}
        return optimizer


class Kill(pl.Callback):
    "Ends the process as the system would, in the middle of an epoch."
    def __init__(self, epoch, batch): self.epoch, self.batch = epoch, batch
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == self.epoch and batch_idx == self.batch:
            os.kill(os.getpid(), signal.SIGKILL)


class OneSampler(RandomSampler):
    "Shuffles with a generator of its own."


def main(s: dict) -> None:
    torch.set_num_threads(1)
    sampler = (OneSampler(range(64), generator=torch.Generator().manual_seed(5))
               if s.get("sampler") else None)
    train = DataLoader(Noisy(patterns(64)), 16, shuffle=None if sampler else True,
                       sampler=sampler, num_workers=s.get("workers", 0))
    val = DataLoader(patterns(32, 2), 16, num_workers=s.get("workers", 0))
    limits = {"max_steps": s["steps"]} if "steps" in s else {"max_epochs": s.get("epochs", 4)}
    callbacks = ([pl.callbacks.EarlyStopping("val/loss", patience=50)]
                 + ([Kill(*s["kill"])] if s.get("kill") else []))
    if s.get("ema"): callbacks.append(pl.callbacks.EMAWeightAveraging(decay=0.8))
    tuner = TunerConfig(True, True, {"num_training": 12, "min_lr": 1e-4, "max_lr": 0.1},
                        {"max_val": 32, "steps_per_trial": 1}) if s.get("tune") else None
    # Another state: all must come from the file
    pl.seed_everything(0 if not s.get("resume") else 99, verbose=False)
    trainer = AutoTrainer(**limits, default_root_dir=s["root"], callbacks=callbacks,
                          tuner_config=tuner, devices=s.get("devices", 1),
                          strategy=s.get("strategy", "auto"),
                          accumulate_grad_batches=s.get("accumulate", 1),
                          check_val_every_n_epoch=s.get("every", 1),
                          seed=None if not s.get("seed") else s["seed"], **QUIET)
    model = Module("auto" if s.get("tune") else 0.01, s.get("schedule", "none"),
                   s.get("draws", False))
    trainer.fit(model, train, val, ckpt_path="last" if s.get("resume") else None)
    if trainer.is_global_zero:
        torch.save({"weights": model.state_dict(), "history": trainer.history,
                    "epoch": trainer.current_epoch, "step": trainer.global_step,
                    "lr": model.hparams.lr, "batch_size": trainer.tuned_values["batch_size"],
                    "best": os.path.basename(trainer.best_model_path),
                    "folder": str(trainer.run_folder)}, s["out"])


if __name__ == "__main__": run_files(main)
