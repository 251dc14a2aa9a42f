"""README.md agrees with its notebook, and every example in it runs."""
import re
import sys
from pathlib import Path

import pytest
import torch

import autotimm
from autotimm.testing import LocalHub, write_coco, write_folders

sys.path.insert(0, str(Path(__file__).parent))
from readme import GALLERY, ROOT, gallery, render  # noqa: E402

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_it_shows_the_notebook(): assert README == render(ROOT / "nbs" / "index.ipynb")


def test_the_two_commands_stand_there():
    assert 'pip install ".[demo]" && autotimm demo' in README
    assert 'pip install -e ".[dev]" && nbdev-test && pytest -n 2 --dist loadfile' in README


def test_pictures_stand_in_the_repository():
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", README)
    assert len(pictures) == 3
    for picture in pictures: assert (ROOT / picture).stat().st_size > 1000


def test_the_gallery_is_what_the_notebooks_show():
    "Each picture of the site's first page is the kept output of a cell, and each stands there."
    pictures = gallery()
    assert {o.stem: o.read_bytes() for o in GALLERY.glob("*.png")} == pictures
    index = (ROOT / "nbs" / "index.ipynb").read_text(encoding="utf-8")
    assert sorted(re.findall(r"images/gallery/([\w-]+)\.png", index)) == sorted(pictures)


@pytest.mark.timeout(600)
def test_every_example_runs(tmp_path, monkeypatch):
    "In order, in one namespace; Hub ids served with tiny weights, epochs limited."
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    write_folders(tmp_path / "photos", splits={"train": 16, "val": 8}, num_classes=2, image_size=48)
    write_coco(tmp_path / "cells", splits={"train2017": 16, "val2017": 8}, image_size=64)
    init = autotimm.AutoTrainer.__init__

    def limited(self, *args, **kwargs):
        init(self, *args, **{**kwargs, "max_epochs": 1, "limit_train_batches": 2,
                             "limit_val_batches": 1})

    monkeypatch.setattr(autotimm.AutoTrainer, "__init__", limited)
    tuner = autotimm.TunerConfig.__init__
    monkeypatch.setattr(autotimm.TunerConfig, "__init__",
                        lambda self, *a,
                        **kw: tuner(self, *a, **{**kw, "lr_find_kwargs": {"num_training": 8}}))
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    assert len(blocks) == 6
    space: dict = {}
    with LocalHub(login=True, user="you") as hub:
        hub.add_timm("timm/resnet50.a1_in1k", "test_resnet", num_classes=1000)
        hub.add_transformers("google/vit-base-patch16-224", transformers.ViTConfig(
            hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64))
        for number, block in enumerate(blocks, 1):
            exec(compile(block, f"README block {number}", "exec"), space)  # noqa: S102
            if number == 1:
                assert space["trainer"].global_step == 1 or space["trainer"].global_step == 2
                assert space["model"].class_names == space["data"].class_names
            if number == 2: assert space["best"].class_names == space["data"].class_names
            if number == 3:
                assert isinstance(space["model"](torch.zeros(1, 3, 224, 224)), torch.Tensor)
            if number == 4:
                assert space["trainer"].logged_metrics["val/map"] >= 0
                assert space["detector"].class_names == space["cells"].class_names
            if number == 5:
                assert len(space["found"]) == 8 and (tmp_path
                                                     / "found.csv").read_text().count("\n") == 9
                x = torch.randn(2, 3, 224, 224)
                with torch.no_grad(): wanted = space["best"](x)
                for place in ("ants-bees", "you/ants-bees"):
                    with torch.no_grad():
                        assert torch.equal(autotimm.ImageClassifier.from_pretrained(place)(x),
                                           wanted)
                assert [o.label
                        for o in autotimm.load_onnx("ants-bees.onnx").predict("photos/val")] == \
                    [o.label for o in space["best"].predict("photos/val")]
    assert space["trainer"].lightning_module is not None
