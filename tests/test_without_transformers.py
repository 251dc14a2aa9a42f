"""Everything of route 1 works where transformers is not installed."""
import os
import re
import subprocess
import sys
import sysconfig
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GONE = re.compile(
    r"(transformers|tokenizers|datasets|pandas|albumentations|albucore|onnx|sklearn|scikit_learn|tensorboard|"
                  r"wandb|mlflow|autotimm)(_\w+)?([-.].*)?$")


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    "An environment that has what is installed here, less transformers and the other extras."
    folder = tmp_path_factory.mktemp("bare")
    for place in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(place).iterdir():
            if not GONE.match(entry.name) and not (folder / entry.name).exists():
                (folder / entry.name).symlink_to(entry)
    return {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}",
            "PYTHONDONTWRITEBYTECODE": "1"}


def run(code: str, cwd: Path, environment: dict[str, str]) -> str:
    "What a fresh interpreter without site packages of its own prints."
    done = subprocess.run([sys.executable, "-S", "-c", textwrap.dedent(code)],
                          capture_output=True, text=True, cwd=cwd,
                          env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_whole_of_route_one(tmp_path, bare):
    out = run("""
        import torch
        from autotimm import AutoTrainer, ImageClassifier, ImageDataModule, MetricConfig, create_feature_backbone, list_backbones
        from autotimm.testing import LocalHub, write_folders

        data = ImageDataModule(write_folders("photos", splits={"train": 24, "val": 9, "test": 9}, image_size=48),
                               batch_size=8, num_workers=0)
        metrics = [MetricConfig("f1", "torchmetrics", "F1Score", {}, ["val", "test"])]
        with LocalHub() as hub:
            hub.add_timm("org/net", "test_resnet", num_classes=7)
            model = ImageClassifier(backbone="hf-hub:org/net", num_classes=3, image_size=48, metrics=metrics)
            print(len(create_feature_backbone("org/net")(torch.zeros(1, 3, 64, 64))))
        trainer = AutoTrainer(max_epochs=1, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu")
        trainer.fit(model, datamodule=data)
        print(sorted(trainer.test(model, datamodule=data, verbose=False)[0]))
        same = ImageClassifier.load_from_checkpoint(trainer.checkpoint_callback.best_model_path)
        x = torch.zeros(1, 3, 48, 48)
        assert torch.equal(same(x), ImageClassifier.load_from_checkpoint(trainer.checkpoint_callback.best_model_path)(x))
        assert len(list_backbones("resnet*")) > 30
        assert "transformers" not in __import__("sys").modules
    """, tmp_path, bare)
    assert "['test/f1', 'test/loss']" in out


def test_the_other_routes_name_the_extra(tmp_path, bare):
    out = run("""
        from autotimm import ImageClassifier
        from autotimm.testing import LocalHub
        import json
        with LocalHub() as hub:
            hub.add_files("org/vit", {"config.json": json.dumps({"model_type": "vit"}), "model.safetensors": b""})
            try: ImageClassifier(backbone="hf-hub:org/vit", num_classes=3)
            except ImportError as e: print(e)
    """, tmp_path, bare)
    assert 'pip install "autotimm[transformers]"' in out
