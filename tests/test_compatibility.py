"""Twelve timm families and a few transformers classes through benchmarks/compatibility.py, and bad input to it."""
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from hf_routes import HAS_TRANSFORMERS

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "compatibility.py"
spec = importlib.util.spec_from_file_location("compatibility", SCRIPT)
assert spec is not None and spec.loader is not None
compatibility = importlib.util.module_from_spec(spec)
sys.modules["compatibility"] = compatibility
spec.loader.exec_module(compatibility)

# Small, and each of a kind: widened heads, NHWC maps, one stride, three levels, no drop path, distilled heads.
FAMILIES = {"resnet": "test_resnet", "mobilenetv3": "lcnet_035", "convnext": "test_convnext", "vision_transformer": "test_vit",
            "maxxvit": "test_coatnet", "mambaout": "test_mambaout", "nfnet": "test_nfnet", "byobnet": "test_byobnet",
            "levit": "levit_128s", "repvit": "repvit_m1", "efficientvit_mit": "efficientvit_b0", "starnet": "starnet_s050"}


@pytest.mark.parametrize("family", FAMILIES)
def test_timm_family(family, monkeypatch):
    monkeypatch.setattr(compatibility, "smallest_model", FAMILIES.__getitem__)
    row = compatibility.check("timm", family)
    assert (row.reason, row.trains, row.reloads) == ("", "yes", "yes"), row
    assert row.width > 0 and row.features.startswith("[")


@pytest.mark.skipif(not HAS_TRANSFORMERS, reason="transformers is not installed")
@pytest.mark.parametrize("family", ["ViT", "DeiT", "Dinov2WithRegisters", "DINOv3ConvNext", "Swin", "Hiera", "ConvNext", "Segformer",
                                    "SiglipVision", "CLIPVision", "MobileNetV2"])
def test_transformers_class(family):
    row = compatibility.check("transformers", family)
    assert (row.reason, row.trains, row.reloads) == ("", "yes", "yes"), row


def test_the_smallest_model_of_a_family():
    assert compatibility.smallest_model("starnet") == FAMILIES["starnet"]


def test_a_failure_is_a_row(monkeypatch):
    monkeypatch.setattr(compatibility, "smallest_model", lambda family: "no_such_model")
    row = compatibility.check("timm", "resnet")
    assert row.reason and "no_such_model" in compatibility.table([row]) and "0 of 1 timm" in compatibility.table([row])


def test_an_unknown_family_is_refused():
    done = subprocess.run([sys.executable, str(SCRIPT), "--family", "resnut"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "unknown families: resnut" in done.stderr
