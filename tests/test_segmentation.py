"""Segmentation through AutoTrainer: checkpoint, resume, precision, two processes; and a sample of
backbones."""
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from autotimm import AutoTrainer, FeatureBackboneConfig, SegmentationDataModule, SemanticSegmentor
from autotimm.testing import LocalHub, write_masks

QUIET = dict(accelerator="cpu", enable_progress_bar=False, enable_model_summary=False,
             checkpoint_monitor="val/miou", checkpoint_mode="max")
SMALL = FeatureBackboneConfig("test_resnet", pretrained=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_masks(tmp_path_factory.mktemp("masks"), splits=dict(train=16, val=8),
                       image_size=32)


def data(folder: Path, **kwargs) -> SegmentationDataModule:
    return SegmentationDataModule(folder, **{"image_size": 32, "batch_size": 4,
                                             "num_workers": 0, **kwargs})


def segmentor(**kwargs) -> SemanticSegmentor:
    return SemanticSegmentor(SMALL, 4, **{"head_type": "fpn", "image_size": 32, "lr": 3e-3,
                                          "seed": 0, **kwargs})


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in model.state_dict().values()])


def test_the_best_checkpoint_is_that_of_the_best_mean_iou(folder, tmp_path):
    trainer = AutoTrainer(max_epochs=3, default_root_dir=tmp_path, **QUIET)
    trainer.fit(model := segmentor(), datamodule=data(folder))
    scores = [o["val/miou"] for o in trainer.history]
    assert f"epoch={max(range(3), key=scores.__getitem__):02d}" in trainer.best_model_path
    again = SemanticSegmentor.load_from_checkpoint(trainer.best_model_path)
    assert again.class_names == ["background", "circle", "square", "triangle"] == model.class_names
    found = trainer.validate(again, datamodule=data(folder), verbose=False)[0]
    assert found["val/miou"] == pytest.approx(max(scores), abs=1e-6)


def test_a_resumed_run_ends_with_the_weights_of_an_unbroken_one(folder, tmp_path):
    def run(name: str, epochs: int, **kwargs) -> SemanticSegmentor:
        trainer = AutoTrainer(max_epochs=epochs, default_root_dir=tmp_path / name, seed=3, **QUIET)
        trainer.fit(model := segmentor(scheduler=None), datamodule=data(folder), **kwargs)
        return model
    whole = run("whole", 3)
    run("parts", 2)
    assert torch.equal(weights(run("parts", 3, ckpt_path="last")), weights(whole))


def test_bf16_mixed_precision(folder, tmp_path):
    trainer = AutoTrainer(max_epochs=2, default_root_dir=tmp_path, precision="bf16-mixed", **QUIET)
    trainer.fit(segmentor(), datamodule=data(folder))
    assert (trainer.history[-1]["train/loss"] < trainer.history[0]["train/loss"]
            and "val/miou" in trainer.history[-1])


def test_two_processes_measure_what_one_does(folder, tmp_path):
    """The numbers of the validation set are the same, however it is divided; both processes end
    with the same weights."""
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent(f"""
        import sys, torch
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path
        from autotimm import AutoTrainer
        from test_segmentation import QUIET, data, segmentor, weights
        count = int(sys.argv[1])
        how = dict(devices=2, strategy="ddp") if count == 2 else dict(devices=1)
        trainer = AutoTrainer(max_epochs=1, default_root_dir=sys.argv[2], seed=0, **how, **QUIET)
        model = segmentor()
        before = trainer.validate(model, datamodule=data(Path({str(folder)!r})), verbose=False)[0]
        trainer.fit(model, datamodule=data(Path({str(folder)!r})))
        mine = weights(model).double()
        equal = torch.equal(*trainer.strategy.all_gather(mine)) if count == 2 else True
        if trainer.is_global_zero: print("found", before["val/miou"], before["val/loss"], before["val/dice"], equal)
    """))
    found = []
    for count in (1, 2):
        done = subprocess.run([sys.executable, str(script), str(count), str(tmp_path / str(count))],
                              capture_output=True, text=True,
                              timeout=300, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-3000:]
        line = next(o for o in done.stdout.splitlines() if o.startswith("found")).split()
        assert line.pop() == "True"
        found.append([float(o) for o in line[1:]])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.parametrize("name", ["test_convnext", "test_efficientnet", "test_mambaout",
                                  "test_resnet", "test_vit", "swin", "segformer", "dinov2"])
def test_a_sample_of_backbones_trains_predicts_and_reloads(name, tmp_path):
    if name.startswith("test_"): backbone = FeatureBackboneConfig(name, pretrained=False)
    else:
        transformers = pytest.importorskip("transformers")
        tiny = dict(hidden_size=24, num_hidden_layers=4, num_attention_heads=2, image_size=64)
        backbone = {"swin": lambda: transformers.SwinConfig(embed_dim=12, depths=[1, 1, 1, 1],
                                                            num_heads=[1, 1, 2, 2],
                                                            window_size=2, image_size=64),
                    "segformer": lambda: transformers.SegformerConfig(hidden_sizes=[8, 16, 24, 32],
                                                                      depths=[1, 1, 1, 1],
                                                                      num_attention_heads=[1, 1, 2, 2],
                                                                     decoder_hidden_size=16),
                    "dinov2": lambda: transformers.Dinov2Config(patch_size=16, **tiny)}[name]()
    model = SemanticSegmentor(backbone, 3, image_size=64, seed=0)
    x, mask = torch.randn(2, 3, 64, 64), torch.randint(0, 3, (2, 64, 64))
    model.compute({"image": x, "mask": mask}, "train").losses["loss"].backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert (grads and all(torch.isfinite(g).all() for g in grads)
            and sum(float(g.abs().sum()) for g in model.backbone.parameters() for g in [g.grad]
                    if g is not None) > 0)
    assert model.predict(x, full_size=True).shape == (2, 64, 64)
    trainer = AutoTrainer(max_epochs=1, default_root_dir=tmp_path, enable_checkpointing=False,
                          **{k: v for k, v in QUIET.items() if "monitor" not in k
                             and "mode" not in k})
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = SemanticSegmentor.load_from_checkpoint(tmp_path / "a.ckpt")
    with torch.no_grad(): assert torch.equal(again(x), model.eval()(x))


def test_a_hub_backbone():
    with LocalHub() as hub:
        hub.add_timm("me/tiny", "test_resnet")
        model = SemanticSegmentor("hf-hub:me/tiny", 4, image_size=64)
        assert (model(torch.randn(1, 3, 64, 64)).shape[:2] == (1, 4)
                and model.hparams["backbone_name"] == "hf-hub:me/tiny")


def test_what_does_not_fit_is_said_before_the_first_step(folder, tmp_path):
    trainer = AutoTrainer(max_epochs=1, default_root_dir=tmp_path, **QUIET)
    with pytest.raises(ValueError, match="num_classes=3, the data has 4: background"):
        trainer.fit(SemanticSegmentor(SMALL, 3, image_size=32), datamodule=data(folder))
    with pytest.raises(ValueError, match="ignore_index=255, the data 250"):
        trainer.fit(segmentor(), datamodule=data(folder, ignore_index=250))
