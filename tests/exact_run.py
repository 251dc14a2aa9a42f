"""One training run in a process of its own, for test_exact.py and the benchmark: python
exact_run.py SETTINGS.json ...

Settings: kind ('classifier', 'boxes', 'own', 'plain'), root, out, workers, context, accelerator,
devices, precision, interval,
kill or fail [epoch, batch], resume, train (images), slow (seconds that each batch waits), trace,
and what differs from the
defaults of the kind. All that can differ between a whole run and a broken one ends up in `out`;
what a run that is killed from
outside has seen is in the files `trace`.RANK."""
import json
import os
import random
import signal
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from forked import run_files
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics.classification import MulticlassAccuracy

from autotimm import (AutoTrainer, BackboneConfig, DetectionDataModule, FeatureBackboneConfig,
                      ImageClassifier, ImageDataModule,
                      ObjectDetector)
from autotimm.testing import write_coco, write_folders

QUIET = dict(enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1)


class Own(pl.LightningModule):
    """A user's module: logs by numbers and by a metric, draws in its hooks, and asks how long the
    training will be."""

    def __init__(self, side: int = 16, schedule: str = "onecycle"):
        super().__init__()
        self.schedule = schedule
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(3 * side * side, 12),
                                 nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.2), nn.Linear(12, 2))
        self.accuracy = MulticlassAccuracy(2, average="micro")
        self.seen: list[list[float]] = []

    def step(self, batch, stage):
        x, y = batch
        logits = self.net(x)
        loss = nn.functional.cross_entropy(logits, y)
        # The best file is that of all processes
        how = dict(on_step=False, on_epoch=True, sync_dist=stage == "val")
        self.log(f"{stage}/loss", loss, **how)
        self.log(f"{stage}/largest", loss, reduce_fx="max", **how)
        if stage == "train":
            self.accuracy(logits, y)
            self.log("train/accuracy", self.accuracy, on_step=False, on_epoch=True)
        return loss

    def training_step(self, batch, batch_idx): return self.step(batch, "train")
    def validation_step(self, batch, batch_idx): self.step(batch, "val")
    def on_train_epoch_start(self): torch.rand(3)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        if self.schedule == "plateau":
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0,
                                                                   factor=0.3, threshold=0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler,
                                                             "monitor": "val/loss"}}
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01,
                                                        int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler,
                                                         "interval": "step"}}


class Noisy(Dataset):
    "Small images, augmented with all three kinds of random numbers."
    def __init__(self, n: int = 22): self.n = n
    def __len__(self): return self.n
    def __getitem__(self, i):
        g = torch.Generator().manual_seed(i)
        x = torch.randn(3, 16, 16, generator=g) + i % 2
        return x + 0.1 * torch.randn(1) + 0.1 * random.random() + 0.1 * np.random.rand(), i % 2


class Watch(pl.Callback):
    """Notes what each step sees, also in a file that outlives the process, and ends the process
    where it is told to."""
    def __init__(self, kill=None, fail=None, trace=None, slow=0.0):
        self.kill, self.fail, self.trace, self.slow, self.seen = kill, fail, trace, slow, []
    def on_train_start(self, trainer, pl_module): self.note(trainer, "process", os.getpid())
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        first = batch["images"] if isinstance(batch, dict) else batch[0]
        self.seen.append([trainer.current_epoch, batch_idx,
                          *first.double().flatten(1).sum(1).tolist()])
        self.note(trainer, *self.seen[-1])
        if self.kill == [trainer.current_epoch, batch_idx]: os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.slow)
    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if not trainer.sanity_checking:
            self.note(trainer, "validation", trainer.current_epoch, batch_idx)
    def note(self, trainer, *what):
        if self.trace is None: return
        with open(f"{self.trace}.{trainer.global_rank}", "a") as file:
            file.write(json.dumps(what) + "\n")

    def on_before_backward(self, trainer, pl_module, loss):
        if self.fail == self.seen[-1][:2]:
            raise RuntimeError("A step that fails after it has drawn random numbers.")


def classifier(s):
    folder = write_folders(Path(s["data"]) / "folders",
                           splits=dict(train=s.get("train", 22), val=9), image_size=24)
    data = ImageDataModule(folder, image_size=16, batch_size=4, num_workers=s.get("workers", 0),
                           balanced_sampling=s.get("balanced", False),
                           augmentation_preset="strong", persistent_workers=s.get("persistent"))
    model = ImageClassifier(BackboneConfig("test_resnet", pretrained=False),
                            num_classes=data.num_classes, ema_decay=0.9, mixup_alpha=0.2,
                            unfreeze_after=s.get("unfreeze", 1),
                            lr=0.01, seed=None, drop_rate=0.2,
                            scheduler=s.get("scheduler", "cosine"))
    return model, data


def boxes(s):
    folder = write_coco(Path(s["data"]) / "coco", splits=dict(train=s.get("train", 14), val=5),
                        image_size=64, num_classes=2)
    data = DetectionDataModule(folder, image_size=64, batch_size=4, num_workers=s.get("workers", 0),
                               mosaic=0.5, mixup=0.3, multi_scale=(0.5, 1.0),
                               persistent_workers=s.get("persistent"))
    model = ObjectDetector(FeatureBackboneConfig("test_resnet", pretrained=False),
                           num_classes=data.num_classes, fpn_channels=16, head_num_convs=1,
                           lr=0.001)
    return model, data


def own(s):
    _, data = classifier(s)
    module = Own(schedule=s.get("schedule", "onecycle"))
    module.net[-1] = nn.Linear(12, data.num_classes)
    module.accuracy = MulticlassAccuracy(data.num_classes, average="micro")
    return module, data


def plain(s):
    loader = lambda n, shuffle: DataLoader(Noisy(n), 4, shuffle=shuffle,
                                           num_workers=s.get("workers", 0))
    return Own(schedule=s.get("schedule", "onecycle")), (loader(s.get("train", 22), True),
                                                         loader(9, False))


def main(s: dict) -> None:
    torch.set_num_threads(1)
    if s.get("context"): torch.multiprocessing.set_start_method(s["context"], force=True)
    # Another state: all must come from the file
    pl.seed_everything(99 if s.get("resume") else 0, verbose=False)
    model, data = dict(classifier=classifier, boxes=boxes, own=own, plain=plain)[s["kind"]](s)
    watch = Watch(s.get("kill"), s.get("fail"), s.get("trace"), s.get("slow", 0))
    limits = {"max_steps": s["steps"]} if "steps" in s else {"max_epochs": s.get("epochs", 3)}
    if "limits" in s:
        limits = {k: timedelta(seconds=v) if k == "max_time" else v for k, v in s["limits"].items()}
    interval = s.get("interval", 1)
    trainer = AutoTrainer(**limits, default_root_dir=s["root"],
                          callbacks=[watch, *s.get("callbacks", [])],
                          accelerator=s.get("accelerator", "cpu"), devices=s.get("devices", 1),
                          deterministic=s.get("deterministic", False),
                          strategy=s.get("strategy", "auto"),
                          accumulate_grad_batches=s.get("accumulate", 1),
                          precision=s.get("precision", 32),
                          val_check_interval=s.get("val_check_interval", 1.0),
                          gradient_clip_val=1.0,
                          checkpoint_interval=timedelta(seconds=interval)
                          if isinstance(interval, float) else interval, **QUIET)
    given = ({"datamodule": data} if isinstance(data, pl.LightningDataModule)
             else dict(zip(("train_dataloaders", "val_dataloaders"), data)))
    trainer.fit(model, **given, ckpt_path=s.get("ckpt", "last") if s.get("resume") else None)
    out = f"{s['out']}.{trainer.global_rank}" if trainer.world_size > 1 else s["out"]
    cuda = torch.cuda.get_rng_state() if trainer.strategy.root_device.type == "cuda" else None
    torch.save({"scale": trainer.precision_plugin.state_dict(), "cuda": cuda,
                "weights": model.state_dict(), "history": trainer.history,
                "epoch": trainer.current_epoch, "step": trainer.global_step, "seen": watch.seen,
                "best": os.path.basename(trainer.best_model_path),
                "optimizer": trainer.optimizers[0].state_dict()["state"] if trainer.optimizers
                else {}}, out)


if __name__ == "__main__": run_files(main)
