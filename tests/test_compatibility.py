"""Eight backbone families in every task, more as classifiers, through benchmarks/compatibility.py,
and bad input to it."""
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hf_routes import HAS_TRANSFORMERS

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "compatibility.py"
spec = importlib.util.spec_from_file_location("compatibility", SCRIPT)
assert spec is not None and spec.loader is not None
compatibility = importlib.util.module_from_spec(spec)
sys.modules["compatibility"] = compatibility
spec.loader.exec_module(compatibility)

# Small, and each of a kind: widened heads, NHWC maps, one stride, three levels, no drop path,
# distilled heads.
FAMILIES = {"resnet": "test_resnet", "mobilenetv3": "lcnet_035", "convnext": "test_convnext",
            "vision_transformer": "test_vit",
            "maxxvit": "test_coatnet", "mambaout": "test_mambaout", "nfnet": "test_nfnet",
            "byobnet": "test_byobnet",
            "levit": "levit_128s", "repvit": "repvit_m1", "efficientvit_mit": "efficientvit_b0",
            "starnet": "starnet_s050"}


# A CNN, NHWC maps, a plain ViT, three levels with biases kept in eval mode; one stride of 16 and of
# 14, windows, hierarchical.
IN_EVERY_TASK = {"resnet", "mambaout", "vision_transformer", "levit", "ViT", "Dinov2",
                 "Swin", "Segformer"}


def check(library, family):
    tasks = compatibility.TASKS if family in IN_EVERY_TASK else ("classification",)
    row = compatibility.check(library, family, tasks)
    assert row.reason == "" and row.tasks == dict.fromkeys(tasks, "yes"), row
    assert row.width > 0 and row.features.startswith("[")


@pytest.mark.parametrize("family", FAMILIES)
def test_timm_family(family, monkeypatch):
    monkeypatch.setattr(compatibility, "smallest_model", FAMILIES.__getitem__)
    check("timm", family)


@pytest.mark.skipif(not HAS_TRANSFORMERS, reason="transformers is not installed")
@pytest.mark.parametrize("family", ["ViT", "DeiT", "Dinov2", "Dinov2WithRegisters",
                                    "DINOv3ConvNext", "Swin", "Hiera", "ConvNext", "Segformer",
                                    "SiglipVision", "CLIPVision", "MobileNetV2"])
def test_transformers_class(family):
    check("transformers", family)


@pytest.fixture(scope="module")
def backbones():
    from autotimm.backbones import BackboneConfig
    return compatibility.build(BackboneConfig("test_resnet", pretrained=False))


@pytest.mark.parametrize("name", compatibility.TASKS)
def test_a_parameter_without_a_gradient_is_noticed(name, backbones):
    model = compatibility.task(name, backbones[name != "classification"])
    model.spare = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="no gradient: .'spare'"):
        compatibility.train(model, compatibility.batch(name, torch.randn(2, 3, 128, 128)))


@pytest.mark.parametrize("wrong", [{"boxes": torch.tensor([[0.0, 0, 200, 50]])},
                                   {"boxes": torch.tensor([[9.0, 9, 9, 20]])},
                                   {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0),
                                    "labels": torch.zeros(0, dtype=torch.int64),
                                    "masks": torch.zeros(0, 64, 64, dtype=torch.bool)},
                                   {"labels": torch.tensor([3])},
                                   {"scores": torch.tensor([float("nan")])},
                                   {"masks": torch.ones(1, 28, 28, dtype=torch.bool)}, {}])
def test_a_wrong_prediction_is_noticed(wrong):
    good = dict(boxes=torch.tensor([[1.0, 2, 60, 64]]), scores=torch.ones(1),
                labels=torch.tensor([2]), masks=torch.ones(1, 64, 64, dtype=torch.bool))

    class Model:
        def predict(self, images): return [good, {**good, **wrong}]
    found = lambda: compatibility.predict("instance segmentation", Model(),
                                          torch.zeros(2, 3, 64, 64))
    if not wrong: assert len(found()) == 8
    else:
        with pytest.raises(ValueError, match="predictions"): found()


def test_a_reloaded_model_that_differs_is_noticed(backbones, monkeypatch):
    found = iter([[torch.zeros(2)], [torch.ones(2)]])
    monkeypatch.setattr(compatibility, "predict", lambda *args: next(found))
    assert compatibility.check_task("classification",
                                    backbones[0]) == "reloaded, it predicts something else"


def test_a_family_without_feature_maps_is_a_classifier_alone(monkeypatch):
    build = compatibility.build
    monkeypatch.setattr(compatibility, "smallest_model", FAMILIES.__getitem__)
    monkeypatch.setattr(compatibility, "build", lambda *args: (build(*args)[0], "it has none"))
    row = compatibility.check("timm", "resnet")
    assert row.tasks == {**dict.fromkeys(compatibility.TASKS, "no feature maps"),
                         "classification": "yes"}
    assert (row.features, row.reason) == ("it has none", "")


def test_the_smallest_model_of_a_family():
    assert compatibility.smallest_model("starnet") == FAMILIES["starnet"]


def test_a_failure_is_a_row(monkeypatch):
    monkeypatch.setattr(compatibility, "smallest_model", lambda family: "no_such_model")
    row = compatibility.check("timm", "resnet")
    assert (row.reason and "no_such_model" in compatibility.table([row])
            and "0 of 1 timm" in compatibility.table([row]))


def test_an_unknown_family_is_refused():
    done = subprocess.run([sys.executable, str(SCRIPT), "--family", "resnut"],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "unknown families: resnut" in done.stderr
