"""One process of a job of examples/cluster, watched and, if asked for, killed: python
cluster_run.py SETTINGS.json ARGUMENTS OF TRAIN.PY."""
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "cluster"))

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from train import build, parse

from autotimm.testing import make_shapes


class Curve(pl.Callback):
    "The loss of each step, over all processes."
    def __init__(self) -> None: self.losses: dict[int, float] = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.losses[trainer.global_step] = float(
            trainer.strategy.reduce(outputs["loss"].detach(), reduce_op="mean"))


class Send(pl.Callback):
    """Sends this process a signal after a step, once: a file remembers that it was done. Says who
    it is before."""
    def __init__(self, folder: Path, rank: int | str, step: int, name: str) -> None:
        self.folder, self.rank, self.step, self.signal = folder, rank, step, getattr(signal, name)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        done = self.folder / f"sent-{trainer.global_rank}"
        if trainer.global_step < self.step or self.rank not in (trainer.global_rank,
                                                                "all") or done.exists():
            return
        done.write_text(str(os.getpid()))
        os.kill(os.getpid(), self.signal)


def plain_loader(trainer: pl.Trainer, batch_size: int) -> DataLoader:
    """A user's own loader that deals images out in order; without a sampler of its own Lightning
    would shuffle them."""
    scenes = make_shapes(48, image_size=32, max_objects=1, seed=0)
    images = torch.stack([torch.from_numpy(o.image).permute(2, 0, 1).float() / 127.5 - 1
                          for o in scenes])
    data = TensorDataset(images, torch.tensor([int(o.label) for o in scenes]))
    return DataLoader(data, batch_size, sampler=DistributedSampler(data, trainer.world_size,
                                                                   trainer.global_rank,
                                                                   shuffle=False))


def main(settings: dict[str, Any], arguments: list[str]) -> None:
    "Train as train.py does, and write down what came of it."
    args, folder, curve = parse(arguments), Path(settings["folder"]), Curve()
    callbacks: list[pl.Callback] = [curve]
    if "send" in settings: callbacks.append(Send(folder, **settings["send"]))
    model, data, trainer = build(args, callbacks=callbacks, enable_progress_bar=False,
                                 enable_model_summary=False, **settings.get("trainer", {}))
    if settings.get("plain"): trainer.fit(model, plain_loader(trainer, int(data.batch_size)))
    else: trainer.fit(model, datamodule=data, ckpt_path=settings.get("ckpt_path", "auto"))
    if trainer.is_global_zero:
        torch.save({"losses": curve.losses, "weights": model.state_dict(),
                    "history": trainer.history, "processes": trainer.world_size},
                   folder / "result.pt")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), sys.argv[2:])
