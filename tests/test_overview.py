"""Every Python block of the overview that concerns classification runs as written, in order, in one
namespace.

The blocks are taken out of `../shared/overview.md` where it stands. Their Hub ids are served by a
`LocalHub` with tiny
weights, CIFAR10 is written in its real on-disk format with the checksums patched, and batches,
epochs, batch size and
tuner trials are limited. Nothing else is changed.
"""
import ast
import re
import warnings
from pathlib import Path

import pytest
import torch
import torchvision
from torch.utils.data import DataLoader, TensorDataset

import autotimm
from autotimm.testing import LocalHub, accept_builtin, write_cifar10

OVERVIEW = Path(__file__).parents[2] / "shared" / "overview.md"
pytestmark = pytest.mark.skipif(not OVERVIEW.exists(),
                                reason="the overview does not stand beside this checkout")
TICKS = "# AutoTimm dependencies"  # a list of ticks and crosses, no Python
SEGMENTATION = "SemanticSegmentor"  # runs once the dense tasks stand


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", OVERVIEW.read_text(), flags=re.S)


def folder_of(classes: int, root: Path) -> None:
    "A folder of images with so many classes: train, val and test."
    for stage in ("train", "val", "test"):
        for i in range(classes):
            folder = root / stage / f"class{i:03d}"
            folder.mkdir(parents=True, exist_ok=True)
            for k in range(2):
                image = torch.randint(0, 256, (3, 40, 40), dtype=torch.uint8)
                torchvision.io.write_png(image, str(folder / f"{k}.png"))


@pytest.fixture
def limited(monkeypatch, tmp_path):
    "Limits on batches, epochs, batch size and tuner trials; a working folder; CIFAR10's checksums."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    trainer_init, data_init, tuner_init = (autotimm.AutoTrainer.__init__,
                                           autotimm.ImageDataModule.__init__,
                                           autotimm.TunerConfig.__init__)

    def trainer(self, *args, **kwargs):
        kwargs["max_epochs"] = min(kwargs.get("max_epochs", 10), 2)
        trainer_init(self, *args, **{**kwargs, "limit_train_batches": 2, "limit_val_batches": 1,
                                     "limit_test_batches": 1})

    def data(self, *args, **kwargs): data_init(self, *args, **{**kwargs, "batch_size": 2})

    def tuner(self, *args, **kwargs):
        tuner_init(self, *args, **{**kwargs, "lr_find_kwargs": {"num_training": 6},
                                   "batch_size_kwargs": {"init_val": 2, "max_trials": 1,
                                                         "steps_per_trial": 1}})

    monkeypatch.setattr(autotimm.AutoTrainer, "__init__", trainer)
    monkeypatch.setattr(autotimm.ImageDataModule, "__init__", data)
    monkeypatch.setattr(autotimm.TunerConfig, "__init__", tuner)
    with accept_builtin(write_cifar10(tmp_path / "data"), "CIFAR10"): yield tmp_path


@pytest.fixture
def hub():
    "The Hub ids of the overview, with tiny weights."
    transformers = pytest.importorskip("transformers")
    with LocalHub() as hub:
        hub.add_timm("timm/resnet50.a1_in1k", "test_resnet", num_classes=1000)
        hub.add_timm("timm/convnext_base.fb_in22k_ft_in1k", "test_convnext", num_classes=1000)
        small = dict(hidden_size=768, num_hidden_layers=1, num_attention_heads=12,
                     intermediate_size=64)
        hub.add_transformers("google/vit-base-patch16-224", transformers.ViTConfig(**small))
        hub.add_transformers("microsoft/beit-base-patch16-224", transformers.BeitConfig(**small))
        yield hub


def prelude(block: str, space: dict, root: Path) -> None:
    "What a block takes for granted: data in ./data, loaders."
    if 'data_dir="./data"' in block and "dataset_name" not in block:
        folder_of(100 if "num_classes=100" in block else 10, root / "data")
    if "train_loader" in block:
        torch.manual_seed(0)
        data = TensorDataset(torch.randn(8, 3, 224, 224), torch.arange(8) % 10)
        space["train_loader"], space["val_loader"] = (DataLoader(data, batch_size=2),
                                                      DataLoader(data, batch_size=2))


def check(block: str, space: dict, before: dict, warned: list[str]) -> None:
    "What must hold after a block."
    if "AutoTrainer(" not in block: return
    trainer = space["trainer"]
    assert trainer.current_epoch == trainer.max_epochs
    assert trainer.global_step > 0
    if "# All three work with PyTorch Lightning!" in block:
        # One trainer, two models: the second is trained in full too.
        assert (trainer.global_step == 2 * trainer.max_epochs
                and trainer.lightning_module is space["vit_model"])
    if "trainer.fit(model, train_loader, val_loader)" in block:
        said = [w for w in warned if "val/accuracy" in w and "train/loss" in w]
        assert len(said) == 1, warned
    if "TunerConfig(" in block: assert trainer.tuner_config is not None
    if "LoggerConfig(" in block: assert len(trainer.loggers) == 2
    if "trainer.test(" in block: assert "test/accuracy" in trainer.callback_metrics


@pytest.mark.timeout(900)
def test_every_block_runs_as_written(limited, hub):
    space: dict = {"torch": torch}
    ran = 0
    for number, block in enumerate(blocks(), 1):
        if block.startswith(TICKS): continue
        prelude(block, space, limited)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            exec(compile(block, f"overview block {number}", "exec"), space)  # noqa: S102
        check(block, space, {}, [str(w.message) for w in caught])
        ran += 1
    assert ran >= 13 and SEGMENTATION in space


def test_the_blocks_left_out_are_the_ones_named():
    left = [b for b in blocks() if b.startswith(TICKS)]
    assert len(left) == 1
    with pytest.raises(SyntaxError): ast.parse(left[0])
    assert sum(SEGMENTATION in b for b in blocks()) == 1
