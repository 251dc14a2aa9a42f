"""`AutoTrainer` on several processes sees each image of a validation once: the numbers are those of
one process."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SCRIPT = """
import json, sys, torch, pytest
from pathlib import Path
from torch.utils.data import DataLoader, TensorDataset
import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelCheckpoint
from autotimm import AutoTrainer, BackboneConfig, FeatureBackboneConfig, DetectionDataModule, ImageClassifier, ImageDataModule, ObjectDetector
from small_models import Full, QUIET, patterns

class Synced(Full):
    "A user's module: means over all processes, weighted by the images of each."
    def validation_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("val/loss", loss, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(batch[1]))

class Lopsided(Full):
    "Logs a metric in its first process alone."
    def validation_step(self, batch, batch_idx):
        if self.global_rank == 0: self.log("val/lopsided", self.loss(batch))

if __name__ == "__main__":
    torch.set_num_threads(1)
    data, devices = Path(sys.argv[1]), int(sys.argv[2])
    how = dict(**QUIET, devices=devices, strategy="ddp" if devices > 1 else "auto", enable_checkpointing=False, logger=False)
    found = {}
    for name, val in (("folders5", 5), ("folders1", 1)):
        module = ImageDataModule(data / name, image_size=32, batch_size=2, num_workers=0)
        model = ImageClassifier(BackboneConfig("test_resnet", pretrained=False), num_classes=module.num_classes, seed=0)
        found[name] = AutoTrainer(**how).validate(model, datamodule=module, verbose=False)[0]
    boxes = DetectionDataModule(data / "coco", image_size=64, batch_size=2, num_workers=0)
    detector = ObjectDetector(FeatureBackboneConfig("test_resnet", pretrained=False), num_classes=boxes.num_classes, fpn_channels=16, head_num_convs=1, seed=0)
    found["boxes"] = AutoTrainer(**how).validate(detector, datamodule=boxes, verbose=False)[0]
    pl.seed_everything(0, verbose=False)
    trainer = AutoTrainer(**how)
    found["own"] = trainer.validate(Synced(), DataLoader(patterns(5), 2), verbose=False)[0]
    if devices > 1:         # no process waits for another that has nothing to save
        best = ModelCheckpoint(data / f"best{devices}", monitor="val/lopsided")
        trainer, loaders = AutoTrainer(**{**how, "enable_checkpointing": True}, max_epochs=2, callbacks=[best], default_root_dir=data), [DataLoader(patterns(n), 2) for n in (12, 6)]
        trainer.fit(Lopsided(), *loaders)
        assert best.best_model_path == "", best.best_model_path
        alone = AutoTrainer(**{**how, "enable_checkpointing": True}, max_epochs=3, default_root_dir=data)
        with pytest.raises(RuntimeError, match="Some processes resume a run"):
            alone.fit(Lopsided(), *loaders, ckpt_path=trainer.last_model_path if alone.is_global_zero else None)
    if trainer.is_global_zero: Path(sys.argv[3]).write_text(json.dumps(found))
"""


def numbers(folder: Path, devices: int) -> dict[str, dict[str, float]]:
    "What each model is measured at by so many processes."
    (folder / "run.py").write_text(SCRIPT)
    out = folder / f"{devices}.json"
    env = {**os.environ, "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, folder / "run.py", folder, str(devices), out],
                          env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    from autotimm.testing import write_coco, write_folders
    folder = tmp_path_factory.mktemp("data")
    for n in (5, 1):
        write_folders(folder / f"folders{n}", splits=dict(train=6, val=n), image_size=40)
    write_coco(folder / "coco", splits=dict(train=4, val=5), image_size=64, num_classes=2)
    return folder


@pytest.mark.timeout(500)
@pytest.mark.parametrize("devices", [2, 3])
def test_a_validation_on_several_processes_is_that_of_one(folder, devices):
    one = (numbers(folder, 1) if not (folder / "1.json").exists()
           else json.loads((folder / "1.json").read_text()))
    several = numbers(folder, devices)
    for name, expected in one.items():
        assert several[name] == pytest.approx(expected, rel=1e-5, abs=1e-6), name
