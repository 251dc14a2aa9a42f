"""Writes what stands in this folder: checkpoints, model folders and a run folder, as they were on
2026-11-30.

`python tests/before/make.py FOLDER` writes them anew with the code of today. What is kept here is
never written over: it says
that later versions read what this one wrote. The recipes are used by test_before.py too.
"""
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from small_models import QUIET, Full, loaders  # noqa: E402

from autotimm.backbones import BackboneConfig, FeatureBackboneConfig  # noqa: E402
from autotimm.cli import main as autotimm  # noqa: E402
from autotimm.data import ImageDataModule  # noqa: E402
from autotimm.tasks import ImageClassifier, ObjectDetector  # noqa: E402
from autotimm.testing import write_folders  # noqa: E402
from autotimm.trainer import AutoTrainer  # noqa: E402

EPOCHS, STEPS = 4, 4                                # a whole run; batches an epoch
VIT = dict(embed_dim=4, depth=1, num_heads=2, patch_size=4)
RESNET = dict(channels=(4, 8, 8, 8), stem_width=8)
CLASSES = ["circle", "square", "triangle"]


def classifier() -> ImageClassifier:
    "With a schedule of steps, a moving average and mixup."
    return ImageClassifier(BackboneConfig("vit_tiny_patch16_224", False, extra_kwargs=VIT),
                           3, image_size=24, lr=0.01,
                           scheduler="cosine", scheduler_kwargs={"warmup_epochs": 1},
                           ema_decay=0.9, mixup_alpha=0.2)


def detector() -> ObjectDetector:
    return ObjectDetector(FeatureBackboneConfig("resnet10t", False, extra_kwargs=RESNET),
                          3, image_size=64, fpn_channels=4,
                          head_num_convs=1, class_names=CLASSES).eval()


def photos(folder: Path) -> Path:
    "Sixteen images to train on, six to validate."
    return write_folders(folder / "photos", splits=dict(train=16, val=6, test=6),
                         image_size=24, max_objects=1)


def data_of(name: str, folder: Path) -> dict[str, Any]:
    "What `fit` is given beside the model, four batches an epoch."
    if name == "classifier":
        return {"datamodule": ImageDataModule(photos(folder), batch_size=4, num_workers=0,
                                              image_size=24)}
    return dict(zip(("train_dataloaders", "val_dataloaders"), loaders()))


MODELS = {"classifier": classifier, "own": Full}


def probe(name: str) -> Tensor:
    "Two inputs of a model, the same everywhere."
    shape = {"classifier": (2, 3, 24, 24), "run": (2, 3, 24, 24), "folder": (2, 3, 32, 32),
             "detector": (2, 3, 64, 64), "own": (2, 8)}[name]
    return torch.arange(torch.Size(shape).numel()).mul(0.37).sin().reshape(shape)


def answers(model: pl.LightningModule, name: str) -> list[float]:
    "What a model says of the probe, as a list."
    with torch.inference_mode(): found = model.eval()(probe(name))
    parts = [found] if isinstance(found, Tensor) else [o for part in found for o in part]
    return [round(o, 6) for part in parts for o in part.flatten().tolist()]


class CopyLast(pl.Callback):
    "Keeps the checkpoint that was written when the second epoch was over."
    def __init__(self, path: Path): self.path = path
    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 2: shutil.copy(trainer.run_folder / "last.ckpt", self.path)


def make_checkpoints(folder: Path, work: Path, name: str) -> dict[str, Any]:
    """`NAME_epoch.ckpt` after two of four epochs, `NAME_step.ckpt` two batches later; what the
    whole run came to."""
    within = pl.callbacks.ModelCheckpoint(work / name, filename="step",
                                          every_n_train_steps=2 * STEPS + 2, save_top_k=-1)
    trainer = AutoTrainer(EPOCHS, default_root_dir=str(work / name), seed=0,
                          callbacks=[within, CopyLast(folder / f"{name}_epoch.ckpt")], **QUIET)
    pl.seed_everything(0, verbose=False)
    model = MODELS[name]()
    trainer.fit(model, **data_of(name, work))
    shutil.copy(work / name / "step.ckpt", folder / f"{name}_step.ckpt")
    said = {o: answers(type(model).load_from_checkpoint(folder / f"{name}_{o}.ckpt"), name)
            for o in ("epoch", "step")}
    return {"answers": said, "history": trainer.history,
            "lr": trainer.optimizers[0].param_groups[0]["lr"]}


def make_folders(folder: Path) -> dict[str, Any]:
    "A classifier and a detector, as `save_pretrained` writes them."
    torch.manual_seed(0)
    model = ImageClassifier(BackboneConfig("resnet10t", False, extra_kwargs=RESNET), 3,
                            image_size=32, class_names=CLASSES).eval()
    found = {}
    for name, one in (("folder", model), ("detector", detector())):
        one.save_pretrained(folder / name)
        found[name] = {"answers": answers(one, name)}
    return found


CONFIG = """
task: classification
seed_everything: 0
trainer: {max_epochs: 2, accelerator: cpu, enable_progress_bar: false, enable_model_summary: false}
model:
  backbone: {model_name: vit_tiny_patch16_224, pretrained: false, extra_kwargs: {embed_dim: 4, depth: 1, num_heads: 2, patch_size: 4}}
  image_size: 24
  mixup_alpha: 0.2
  scheduler_kwargs: {warmup_epochs: 1}
data: {data_dir: photos, batch_size: 4, num_workers: 0}
"""


def make_run(folder: Path, work: Path) -> dict[str, Any]:
    "The run folder of `autotimm fit`, as far as a later run needs it."
    photos(work)
    (work / "tiny.yaml").write_text(CONFIG)
    os.chdir(work)
    assert autotimm(["fit", "--config", "tiny.yaml", "--out", "run"]) == 0
    for file in ("config.yaml", "run.json", "history.json", "checkpoints/version_0/last.ckpt"):
        (folder / "run" / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(work / "run" / file, folder / "run" / file)
    shutil.copytree(work / "run/model", folder / "run/model")
    model = ImageClassifier.from_pretrained(folder / "run/model")
    return {"answers": answers(model, "run")}


def main(target: str) -> None:
    folder = Path(target).absolute()
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as work:
        expected = {name: make_checkpoints(folder, Path(work), name) for name in MODELS}
        expected |= make_folders(folder)
        expected["run"] = make_run(folder, Path(work))
    shutil.copytree(HERE.parents[1] / "examples", folder / "examples")
    parts = [f" {json.dumps(name)}: {json.dumps(found)}" for name, found in expected.items()]
    (folder / "expected.json").write_text("{\n" + ",\n".join(parts) + "\n}\n")


if __name__ == "__main__": main(sys.argv[1])
