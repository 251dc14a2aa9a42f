"""What no notebook of the hub can hold: the real tasks in every library, real clients over
LocalHub, a process that dies while it saves."""
import getpass
import json
import os
import re
import socket
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import timm
import torch
import transformers
from huggingface_hub import ModelCard, list_repo_commits, list_repo_files, model_info
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline

from autotimm import (BackboneConfig, HubError, ImageClassifier, InstanceSegmentor,
                      ObjectDetector, SemanticSegmentor, YOLOXDetector)
from autotimm.backbones import (HubAccessError, HubCorruptError, HubNotFoundError,
                                HubOfflineError, create_backbone, create_feature_backbone)
from autotimm.hub import (convert_checkpoint, folder_to_checkpoint, is_pretrained_folder,
                          load_pretrained, push_to_hub, save_pretrained)
from autotimm.testing import LocalHub

SMALL = BackboneConfig("test_resnet", pretrained=False)
ODD = ["a: 'b' \"c\"", "<b>|`x`|</b>\n# head", "---", "---", "雪 ☃", ""]
TOKENS = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=64,
              image_size=64, patch_size=16)
DINO = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, image_size=56,
            patch_size=14)
STAGES = dict(hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 2, 1])
WINDOWS = dict(embed_dim=12, depths=[1, 1, 2, 1], num_heads=[1, 2, 2, 4], window_size=4,
               image_size=128)
HEADS = dict(num_attention_heads=[1, 2, 2, 4], hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1])
NATIVE = {
    "ViT": TOKENS, "DeiT": TOKENS, "Beit": TOKENS, "ViTMSN": TOKENS, "Dinov2": DINO,
    "Dinov2WithRegisters": DINO, "Swin": WINDOWS, "Swinv2": WINDOWS,
    "ConvNext": {**STAGES, "image_size": 64}, "ConvNextV2": {**STAGES, "image_size": 64},
    "ResNet": {**STAGES, "embedding_size": 16},
    "RegNet": {**STAGES, "embedding_size": 16, "groups_width": 8}, "Segformer": HEADS,
    "PvtV2": {**HEADS, "image_size": 64},
    "Hiera": dict(embed_dim=16, depths=[1, 1, 2, 1], num_heads=[1, 2, 4, 8], image_size=[64, 64]),
    "MobileViT": dict(image_size=64),
    "MobileNetV2": dict(depth_multiplier=0.35, image_size=64),
    "EfficientNet": dict(width_coefficient=0.35, depth_coefficient=0.35, hidden_dim=448,
                         image_size=64)}


@pytest.fixture(autouse=True)
def no_bars(): transformers.utils.logging.disable_progress_bar()


def classifier(backbone=SMALL, classes=3, **kwargs) -> ImageClassifier:
    torch.manual_seed(0)
    model = ImageClassifier(backbone, classes, **kwargs).eval()
    with torch.no_grad():
        for p in model.head.parameters(): p.normal_(0, 0.1)
    return model


def batch(model) -> torch.Tensor:
    return torch.randn(2, *model.data_config["input_size"],
                       generator=torch.Generator().manual_seed(1))


def logits(model, x): return model.eval()(x).detach()


def photo(width=131, height=90) -> Image.Image:
    return Image.effect_mandelbrot((width, height), (-3, -2.5, 2, 2.5), 100).convert("RGB")


def config(folder) -> dict: return json.loads((Path(folder) / "config.json").read_text())


# ---- classifiers on timm

@pytest.mark.parametrize("name, exact", [("test_resnet", True), ("test_vit", True),
                                         ("dla46_c", True), ("shvit_s1", True),
                                         ("levit_128s", True),
                                         ("deit_tiny_distilled_patch16_224", False),
                                         ("efficientvim_m1", False)])
def test_a_classifier_is_a_timm_repository(name, exact, tmp_path):
    model = classifier(BackboneConfig(name, pretrained=False), class_names=["one", "two", "three"])
    folder, x = model.save_pretrained(tmp_path / "net"), batch(model)
    ours = logits(model, x)
    in_timm = logits(timm.create_model(f"local-dir:{folder}", pretrained=True), x)
    assert torch.equal(in_timm, ours) if exact else torch.allclose(in_timm, ours, atol=1e-5)
    other = AutoModelForImageClassification.from_pretrained(folder).eval()
    assert torch.allclose(other(x).logits, ours, atol=1e-5)
    assert list(other.config.id2label.values()) == ["one", "two",
                                                    "three"] and other.config.label2id["three"] == 2
    again = load_pretrained(folder)
    assert type(again) is ImageClassifier and not again.training
    assert torch.allclose(logits(again, x), ours, atol=1e-6)


def test_pipeline_says_what_predict_says(tmp_path):
    model = classifier(BackboneConfig("test_vit", pretrained=False),
                       class_names=["one", "two", "three"], image_size=96)
    folder = model.save_pretrained(tmp_path / "net")
    said = {o["label"]: o["score"] for o in pipeline("image-classification",
                                                     model=str(folder))(photo())}
    result = model.predict([photo()])[0]
    assert said == pytest.approx(dict(zip(["one", "two", "three"], result.probabilities.tolist())),
                                 abs=1e-3)


@pytest.mark.parametrize("backbone", [SMALL, transformers.ViTConfig(**TOKENS)],
                         ids=["timm", "transformers"])
def test_several_labels_use_a_sigmoid(backbone, tmp_path):
    model = classifier(backbone, class_names=["one", "two", "three"], multi_label=True)
    folder = model.save_pretrained(tmp_path / "net")
    assert config(folder)["problem_type"] == "multi_label_classification"
    said = {o["label"]: o["score"] for o in pipeline("image-classification",
                                                     model=str(folder))(photo())}
    assert (said
            == pytest.approx(dict(zip(["one", "two", "three"],
                                      model.predict([photo()])[0].probabilities.tolist())),
                             abs=1e-3))
    assert load_pretrained(folder).multi_label


def test_arguments_of_the_network_travel(tmp_path):
    model = classifier(BackboneConfig("test_vit", pretrained=False, drop_path_rate=0.1,
                                      extra_kwargs=dict(global_pool="avg")), in_chans=1,
                       image_size=64)
    folder, x = model.save_pretrained(tmp_path / "net"), batch(model)
    assert x.shape == (2, 1, 64, 64)
    assert config(folder)["model_args"] == {"in_chans": 1, "img_size": 64, "global_pool": "avg"}
    other = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert torch.equal(logits(other, x), logits(model, x))
    found = timm.data.resolve_model_data_config(other)
    for key in ("input_size", "mean", "std", "crop_pct", "interpolation"):
        assert np.array_equal(found[key], model.data_config[key]), key
    assert load_pretrained(folder).hparams["backbone"]["args"]["drop_path_rate"] == 0.1


@pytest.mark.parametrize("size", [(131, 90), (90, 131), (64, 64), (500, 375)])
def test_pixels_of_every_library_agree(size, tmp_path):
    model = classifier(image_size=64)
    folder = model.save_pretrained(tmp_path / "net")
    ours, grey = model.preprocess(photo(*size))[0], 1.01 / 255 / min(model.data_config["std"])
    in_timm = timm.data.create_transform(**timm.data.resolve_model_data_config(
        timm.create_model(f"local-dir:{folder}")), is_training=False)(photo(*size))
    in_transformers = AutoImageProcessor.from_pretrained(folder)(photo(*size)).pixel_values[0]
    for other in (in_timm, in_transformers):
        assert other.shape == ours.shape and (other - ours).abs().max() <= grey


def test_a_cropped_image_has_the_same_pixels_on_transformers(tmp_path):
    model = classifier(transformers.ViTConfig(**TOKENS), transform_config=dict(crop_pct=0.8))
    assert model.data_config["crop_mode"] == "squash"
    processor = AutoImageProcessor.from_pretrained(model.save_pretrained(tmp_path / "net"))
    assert (processor(photo(), return_tensors="pt").pixel_values[0]
            - model.preprocess(photo())[0]).abs().max() < 1.01 / 255 / min(model.data_config["std"])


def test_names_of_any_kind_and_letters_that_are_none(tmp_path):
    for names, said in ((np.array(["a", "b", "c"]), ["a", "b", "c"]), ((1, 2, 3), ["1", "2", "3"]),
                        (["\udc80", "b", "c"], ["\udc80", "b", "c"])):
        model = classifier(class_names=names)
        assert load_pretrained(model.save_pretrained(tmp_path / "net")).class_names == said
    assert (classifier(class_weights=np.array([1.0, 2.0, 3.0])).hparams["class_weights"]
            == [1.0, 2.0, 3.0])


def test_odd_names_break_nothing(tmp_path):
    model = classifier(classes=6, class_names=ODD)
    folder = model.save_pretrained(tmp_path / "net", metrics={"a: |b|": 0.5, "n": float("inf")},
                                   data="x: [y]\n- z", card="## Hello", tags=["a: b", "c"])
    text = (folder / "README.md").read_text(encoding="utf-8")
    card = ModelCard(text)
    assert card.data.tags == ["image-classification", "timm", "autotimm", "a: b", "c"]
    assert [(o.metric_name, o.metric_value) for o in card.data.eval_results] == [("a: |b|", 0.5)]
    rows = [o for o in text.split("## Classes")[1].splitlines() if o.startswith("| ")]
    assert len(rows) == 7 and all(len(re.findall(r"(?<!\\)\|", o)) == 3
                                  for o in rows) and "<b>" not in text
    other = AutoModelForImageClassification.from_pretrained(folder)
    assert list(other.config.id2label.values()) == ODD
    assert load_pretrained(folder).class_names == ODD
    assert pipeline("image-classification", model=str(folder))(photo())[0]["label"] in ODD


def test_a_thousand_classes_without_names_are_not_imagenet(tmp_path):
    folder = classifier(classes=1000).save_pretrained(tmp_path / "net")
    assert AutoModelForImageClassification.from_pretrained(folder).config.id2label[7] == "7"
    assert load_pretrained(folder).class_names is None
    assert "900 more are in config.json" in (folder / "README.md").read_text()


def test_licence_and_origin_of_the_weights_stand_in_the_card(tmp_path):
    with LocalHub() as hub:
        hub.add_timm("timm/test_vit.r160_in1k", "test_vit")
        model = classifier("test_vit")
        again = ImageClassifier(model.hparams["backbone"], 3)
    for o in (model, again):
        data = ModelCard.load(o.save_pretrained(tmp_path / "net") / "README.md").data
        assert data.license == "apache-2.0" and data.base_model == "timm/test_vit.r160_in1k"
    assert ModelCard.load(classifier().save_pretrained(tmp_path / "net")
                          / "README.md").data.license is None
    other = ModelCard.load(classifier().save_pretrained(tmp_path / "net", license="house rules")
                           / "README.md").data.to_dict()
    assert (other["license"], other["license_name"]) == ("other", "house rules")


def test_nothing_of_the_machine_is_told(tmp_path):
    timm.models.save_for_hf(timm.create_model("test_resnet"), tmp_path / "weights",
                            safe_serialization=True)
    model = classifier(BackboneConfig(str(tmp_path / "weights")))
    folder = model.save_pretrained(tmp_path / "net", data=str(tmp_path / "photos"),
                                   training={"data_dir": str(tmp_path / "photos")})
    secrets = [str(tmp_path), str(Path.home()), os.getcwd(),
               *(o for o in (socket.gethostname(), getpass.getuser()) if len(o) > 4)]
    for path in folder.iterdir():
        head = path.read_bytes() if path.suffix != ".safetensors" else path.read_bytes()[:20000]
        for secret in secrets:
            assert len(secret) < 4 or secret.encode() not in head, (path.name, secret)


@pytest.mark.parametrize("backbone, channels",
                         [(SMALL, 1), (SMALL, 4), (transformers.ViTConfig(**TOKENS), 1)],
                         ids=["timm-1", "timm-4", "transformers-1"])
def test_the_code_in_a_card_runs_for_images_that_are_not_rgb(backbone, channels, tmp_path,
                                                             monkeypatch):
    model = classifier(backbone, in_chans=channels, image_size=64)
    text = (model.save_pretrained(tmp_path / "net") / "README.md").read_text()
    monkeypatch.chdir(tmp_path)
    photo().save("photo.jpg")
    said = logits(model, model.preprocess(Image.open("photo.jpg")))
    codes = dict(re.findall(r"### (.*?)\n\n```python\n(.*?)\n```", text, re.S))
    assert list(codes) == ["autotimm", *(["timm"] if backbone is SMALL else []),
                           "transformers", "ONNX Runtime"]
    for kind, code in codes.items():
        if kind == "ONNX Runtime": continue
        exec(code.replace("path/to/folder", str(tmp_path / "net")), found := {})
        if kind != "autotimm": assert torch.allclose(found["logits"].detach(), said, atol=0.05)


def test_the_code_in_a_card_says_what_else_is_needed(tmp_path):
    class Own(nn.Module):
        num_features, data_config = 5, dict(input_size=(5, 32, 32), mean=(0.5,) * 5,
                                            std=(0.5,) * 5, interpolation="bilinear", crop_pct=1.0)
        def forward(self, x): return x.mean((2, 3))
    text = (classifier(Own()).save_pretrained(tmp_path / "own") / "README.md").read_text()
    assert ('"path/to/folder", backbone=backbone)' in text and "a tensor (B, 5, H, W)" in text
            and "photo.jpg" not in text)
    text = (InstanceSegmentor(SMALL, 3).eval().save_pretrained(tmp_path / "instances")
            / "README.md").read_text()
    assert 'export_to_onnx(model, "model.onnx", postprocess=True)' in text


@pytest.mark.parametrize("backbone", [SMALL, transformers.ViTConfig(**TOKENS)],
                         ids=["timm", "transformers"])
def test_one_class_alone_loads_everywhere(backbone, tmp_path):
    model = classifier(backbone, 1, class_names=["only"])
    folder, x = model.save_pretrained(tmp_path / "net"), batch(model)
    assert torch.allclose(AutoModelForImageClassification.from_pretrained(folder).eval()(x).logits,
                          logits(model, x), atol=1e-5)
    assert pipeline("image-classification", model=str(folder))(photo())[0]["label"] == "only"
    assert torch.equal(logits(load_pretrained(folder), x), logits(model, x))


# ---- classifiers on transformers

@pytest.mark.parametrize("family", NATIVE)
@pytest.mark.filterwarnings("ignore")
def test_a_classifier_is_transformers_own_class(family, tmp_path):
    values = NATIVE[family]
    backbone = create_backbone(getattr(transformers, f"{family}Config")(**values),
                               **({} if "image_size" in values else dict(image_size=64)))
    model = classifier(backbone, class_names=["one", "two", "three"])
    folder, x = model.save_pretrained(tmp_path / "net"), batch(model)
    assert config(folder)["architectures"] == [f"{family}ForImageClassification"]
    other = AutoModelForImageClassification.from_pretrained(folder).eval()
    assert torch.allclose(other(x).logits, logits(model, x),
                          atol=1e-5) and other.config.id2label[2] == "three"
    assert torch.equal(logits(load_pretrained(folder), x), logits(model, x))
    processor = AutoImageProcessor.from_pretrained(folder)
    assert (processor(photo(128, 96), return_tensors="pt").pixel_values[0]
            - model.preprocess(photo(128, 96))[0]).abs().max() < 1e-5
    found = pipeline("image-classification", model=other, image_processor=processor)(photo(128, 96))
    assert {o["label"]: o["score"] for o in found} == pytest.approx(
        dict(zip(["one", "two", "three"],
                 model.predict([photo(128, 96)])[0].probabilities.tolist())), abs=1e-4)


@pytest.mark.parametrize("family, values, pooling, start",
                         [("Dinov2", DINO, "mean", 48), ("SiglipVision", TOKENS, "mean", 0),
                          ("CLIPVision", TOKENS, "mean", 0)])
@pytest.mark.filterwarnings("ignore")
def test_pooling_decides_whether_there_is_a_native_class(family, values, pooling, start, tmp_path):
    made = getattr(transformers, f"{family}Config")(**values)
    model = classifier(create_backbone(made, pooling=pooling))
    folder, x = model.save_pretrained(tmp_path / "net"), batch(model)
    assert config(folder)["autotimm"]["features_from"] == start
    assert torch.allclose(AutoModelForImageClassification.from_pretrained(folder).eval()(x).logits,
                          logits(model, x), atol=1e-5)
    assert torch.equal(logits(load_pretrained(folder), x), logits(model, x))


@pytest.mark.parametrize("family, values, why",
                         [("PoolFormer", STAGES, "logits differ"),
                          ("DINOv3ViT", TOKENS, "no class for image classification"),
                                                 ("SiglipVision", TOKENS, "logits differ")])
def test_what_transformers_cannot_express_says_so(family, values, why, tmp_path):
    model = classifier(create_backbone(getattr(transformers, f"{family}Config")(**values),
                                       **({} if "image_size" in values else dict(image_size=64))))
    with pytest.warns(UserWarning, match=f"only autotimm loads, since .*{why}"):
        folder = save_pretrained(model, tmp_path / "net")
    assert config(folder)["autotimm"]["format"] == "autotimm" and "model_type" not in config(folder)
    text = (folder / "README.md").read_text()
    assert why.split()[-1] in text and "transformers import" not in text
    assert torch.equal(logits(load_pretrained(folder), batch(model)), logits(model, batch(model)))


# ---- dense tasks and backbones

@pytest.mark.parametrize("make", [lambda: SemanticSegmentor(SMALL, 3),
                                  lambda: ObjectDetector(SMALL, 3),
                                  lambda: InstanceSegmentor(SMALL, 3),
                                  lambda: YOLOXDetector("yolox-nano", 3)],
                         ids=["segmentor", "detector", "instances", "yolox"])
def test_dense_tasks_come_back(make, tmp_path):
    torch.manual_seed(0)
    model = make().eval()
    model.hparams["class_names"] = ["one", "two", "three"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folder = model.save_pretrained(tmp_path / "net", metrics={"val/map": 0.5})
    again = type(model).from_pretrained(folder)
    assert type(again) is type(model) and again.class_names == ["one", "two", "three"]
    a, b = model.state_dict(), again.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    x = torch.rand(1, 3, 64, 64)
    one, two = (json.dumps([o.tolist() for o in _flat(o.predict(x))]) for o in (model, again))
    assert one == two
    assert config(folder)["id2label"] == {"0": "one", "1": "two", "2": "three"}
    with pytest.raises((RuntimeError, KeyError)): timm.create_model(f"local-dir:{folder}")
    # A checkpoint and back, the class found by its hyperparameters.
    run = folder_to_checkpoint(folder, tmp_path / "run.ckpt")
    loaded = type(model).load_from_checkpoint(run).state_dict()
    assert all(torch.equal(a[k], loaded[k]) for k in a)
    assert type(load_pretrained(convert_checkpoint(run, tmp_path / "back"))) is type(model)


def _flat(output):
    if isinstance(output, torch.Tensor): return [output]
    return [t for o in (output.values() if isinstance(output, dict) else output) for t in _flat(o)]


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
def test_a_timm_backbone_is_taken_out(name, tmp_path):
    model = SemanticSegmentor(BackboneConfig(name, pretrained=False), 3).eval()
    folder = model.backbone.save_pretrained(tmp_path / "backbone")
    x = torch.randn(2, *model.data_config["input_size"])
    whole = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()        # strict
    indices = [o["index"] for o in model.backbone.feature_info]
    for a, b in zip(model.backbone(x), whole.forward_intermediates(x, indices=indices,
                                                                   intermediates_only=True)):
        assert torch.allclose(a, b, atol=1e-5)
    own, fresh = whole.state_dict(), config(folder)["autotimm"]["fresh"]
    assert set(fresh) == set(own) - set(model.backbone.model.state_dict())
    again = create_feature_backbone(str(folder), out_indices=tuple(indices)).eval()
    for a, b in zip(model.backbone(x), again(x)): assert torch.allclose(a, b, atol=1e-5)
    assert AutoModel.from_pretrained(folder).eval()(x).last_hidden_state.isfinite().all()
    with pytest.raises(HubCorruptError, match="has no classifier"): load_pretrained(folder)


def test_a_transformers_backbone_is_taken_out(tmp_path):
    model = classifier(transformers.Dinov2Config(**DINO))
    folder = model.backbone.save_pretrained(tmp_path / "backbone")
    other, x = AutoModel.from_pretrained(folder).eval(), batch(model)
    assert torch.allclose(other(x).last_hidden_state,
                          model.backbone.model(pixel_values=x).last_hidden_state, atol=1e-5)
    assert torch.allclose(create_backbone(str(folder)).eval()(x), model.backbone(x), atol=1e-5)


def test_ones_own_module_cannot_be_taken_out(tmp_path):
    class Own(nn.Module):
        num_features, data_config = 3, dict(input_size=(3, 32, 32), mean=(0.5,) * 3,
                                            std=(0.5,) * 3, interpolation="bilinear", crop_pct=1.0)
        def __init__(self): super().__init__(); self.scale = nn.Parameter(torch.ones(3))
        def forward(self, x): return x.mean((2, 3)) * self.scale
    model = classifier(Own())
    with pytest.raises(ValueError, match="your own module"):
        model.backbone.save_pretrained(tmp_path / "backbone")
    folder = model.save_pretrained(tmp_path / "net")
    with pytest.raises(ValueError, match="your own module"): load_pretrained(folder)
    x = batch(model)
    assert torch.equal(logits(load_pretrained(folder, backbone=Own()), x), logits(model, x))


# ---- folders

def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="diary.txt"):
        classifier().save_pretrained(tmp_path / "notes")
    assert [o.name for o in (tmp_path / "notes").iterdir()] == ["diary.txt"]
    timm.models.save_for_hf(timm.create_model("test_resnet"), tmp_path / "other",
                            safe_serialization=True)
    with pytest.raises(FileExistsError, match="not saved by this library"):
        classifier().save_pretrained(tmp_path / "other")
    (tmp_path / "empty").mkdir()
    assert is_pretrained_folder(classifier().save_pretrained(tmp_path / "empty"))


def test_what_a_link_leads_to_is_replaced(tmp_path):
    model = classifier()
    for name, there in (("empty", True), ("none", False)):
        if there: (tmp_path / name).mkdir()
        (tmp_path / f"to-{name}").symlink_to(tmp_path / name)
        model.save_pretrained(tmp_path / f"to-{name}")
        assert (tmp_path / f"to-{name}").is_symlink() and is_pretrained_folder(tmp_path / name)


def test_the_folder_that_a_process_works_in_is_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for place in (".", "", "../here", tmp_path / "here"):
        with pytest.raises(FileExistsError, match="works in"): classifier().save_pretrained(place)
    assert os.listdir(tmp_path) == ["here"] and os.listdir(".") == []
    assert is_pretrained_folder(classifier().save_pretrained("net"))


@pytest.mark.parametrize("wrong, error", [(dict(metrics=0.5), TypeError),
                                          (dict(metrics=[("a", 1)]), TypeError),
                                          (dict(training=[1]), TypeError),
    (dict(data=["a"]), TypeError), (dict(license=3), TypeError), (dict(card=Path("a")), TypeError),
                                          (dict(tags="cats"), TypeError),
                                          (dict(tags=[1]), TypeError),
    (dict(repo_id='a/b"c'), ValueError)])
def test_what_no_card_can_hold_is_named_at_once(wrong, error, tmp_path):
    with pytest.raises(error, match=next(iter(wrong))):
        classifier().save_pretrained(tmp_path / "net", **wrong)
    with pytest.raises(TypeError, match="a Linear has no hparams"):
        save_pretrained(nn.Linear(2, 2), tmp_path / "net")
    assert os.listdir(tmp_path) == []


def test_parts_that_are_compiled_are_saved_by_their_own_names(tmp_path):
    model, x = classifier(), batch(classifier())
    said = logits(model, x)
    whole = torch.compile(model)
    assert torch.equal(logits(load_pretrained(save_pretrained(whole, tmp_path / "whole")), x), said)
    model.backbone.model = inner = torch.compile(model.backbone.model)
    folder = model.save_pretrained(tmp_path / "inner")
    assert model.backbone.model is inner and config(folder)["autotimm"]["format"] == "timm"
    assert torch.equal(logits(load_pretrained(folder), x), said)
    dense = SemanticSegmentor(SMALL, 3)
    dense.head = torch.compile(dense.head)
    assert not any("_orig_mod" in k
                   for k in load_pretrained(dense.save_pretrained(tmp_path / "dense")).state_dict())


def test_what_its_folder_alone_cannot_load_says_so(tmp_path):
    model = classifier()
    nn.utils.parametrizations.weight_norm(model.head.fc)
    with pytest.warns(UserWarning) as told: folder = model.save_pretrained(tmp_path / "net")
    assert ("its folder alone does not load: The weights of folder '...' are not those" in str(
        told[-1].message))
    assert "does not load from this folder alone" in (folder / "README.md").read_text()


def test_a_process_killed_while_it_saves_leaves_the_old_folder(tmp_path):
    old = classifier()
    old.save_pretrained(tmp_path / "net")
    before = {o.name: o.read_bytes() for o in (tmp_path / "net").iterdir()}
    code = f"""
        import os, signal
        from autotimm import BackboneConfig, ImageClassifier
        from autotimm.hub import formats, save
        model = ImageClassifier(BackboneConfig("test_resnet", pretrained=False), 7)
        for module, moment in ((formats, "write_json"), (formats, "write_weights"), (save, "check_written"), (save, "make_card")):
            if not (child := os.fork()):
                real = getattr(module, moment)
                def die(*args, **kwargs):
                    real(*args, **kwargs)
                    os.kill(os.getpid(), signal.SIGKILL)
                setattr(module, moment, die)
                model.save_pretrained({str(tmp_path / "net")!r})
            assert os.waitpid(child, 0)[1] == signal.SIGKILL, moment
    """
    # One thread: OpenMP's do not survive a fork, and the child would wait for them for ever.
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True,
                          text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    assert {o.name: o.read_bytes() for o in (tmp_path / "net").iterdir()} == before
    assert torch.equal(logits(load_pretrained(tmp_path / "net"), batch(old)),
                       logits(old, batch(old)))


def test_broken_folders_are_clear_errors(tmp_path):
    model = classifier()
    def spoil(change):
        folder = model.save_pretrained(tmp_path / "net")
        change(folder)
        return folder
    def cut(folder):
        (folder / "model.safetensors").write_bytes((folder
                                                    / "model.safetensors").read_bytes()[:-1000])
    def other(folder):
        (folder / "model.safetensors").write_bytes((
            classifier(BackboneConfig("test_vit", pretrained=False)).save_pretrained(tmp_path / "o")
                                                                   / "model.safetensors").read_bytes())
    def pickled(folder): (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    for change, error, says in ((cut, HubCorruptError, "cut or broken"),
                                (other, HubCorruptError, "lack"),
                                (pickled, HubCorruptError, "only as a pickle"),
                                (lambda o: (o / "config.json").write_text("{"), HubCorruptError,
                                 "not valid JSON"),
                                (lambda o: (o / "config.json").unlink(), HubCorruptError,
                                 "no config.json")):
        folder = spoil(change)
        with pytest.raises(error, match=says): load_pretrained(folder)
        for o in folder.iterdir(): o.unlink()
        folder.rmdir()


@pytest.mark.parametrize("change", [dict(hparams={}), dict(task=["ImageClassifier"]),
                                    dict(task=None), dict(format=["timm"]),
                                    dict(format="transformers"),
    dict(task="SemanticSegmentor"), dict(hparams=dict(bogus=1)), dict(hparams=dict(allow=["os"])),
                                    dict(hparams=dict(backbone="resnet18")),
    dict(hparams=dict(backbone=dict(kind="timm"))),
                                    dict(hparams=dict(num_classes=10**12, class_names=None))],
                         ids=str)
def test_a_config_that_describes_no_model_is_a_clear_error(change, tmp_path):
    folder = classifier().save_pretrained(tmp_path / "net")
    values = config(folder)
    if change.get("hparams"):
        change = dict(hparams={**values["autotimm"]["hparams"], **change["hparams"]})
    (folder / "config.json").write_text(json.dumps({**values,
                                                    "autotimm": {**values["autotimm"], **change}}))
    with pytest.raises(HubError, match="net'|no task"): load_pretrained(folder)


def test_timm_reads_the_weights_that_were_looked_at(tmp_path):
    timm.models.save_for_hf(made := timm.create_model("test_resnet", num_classes=3),
                            tmp_path, safe_serialization=True)
    (tmp_path / "model.safetensors").rename(tmp_path / "weights.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"timm would rather have this one")
    model = load_pretrained(tmp_path)
    assert torch.equal(logits(model, batch(model)), logits(made, batch(model)))


def test_what_is_settled_or_has_no_revision_is_refused(tmp_path):
    timm.models.save_for_hf(timm.create_model("test_resnet", num_classes=3), tmp_path / "plain",
                            safe_serialization=True)
    with pytest.raises(ValueError, match="num_classes=5 cannot be set"):
        load_pretrained(tmp_path / "plain", num_classes=5)
    with pytest.raises(ValueError, match="has no revisions"):
        load_pretrained(tmp_path / "plain", revision="v1")
    with pytest.raises(ValueError, match="two revisions"): load_pretrained("me/net@a", revision="b")


def test_another_number_of_classes_takes_a_new_head(tmp_path):
    model = classifier(class_names=["one", "two", "three"])
    folder = model.save_pretrained(tmp_path / "net")
    with pytest.warns(UserWarning, match="New head for 5 classes"):
        other = load_pretrained(folder, num_classes=5)
    assert other.num_classes == 5 and other.class_names is None
    assert torch.equal(other.backbone(batch(model)), model.backbone(batch(model)))


# ---- the Hub

@pytest.fixture
def hub():
    with LocalHub(login=True) as hub: yield hub


def test_push_and_load_everywhere(hub):
    model, x = classifier(class_names=["one", "two", "three"]), None
    address = model.push_to_hub("me/net", private=True, metrics={"val/accuracy": 0.75})
    x = batch(model)
    assert address.startswith(f"{hub.url}/me/net/commit/") and hub.repos["me/net"].private
    assert list_repo_files("me/net") == [".gitattributes", "README.md", "config.json",
                                         "model.safetensors"]
    for text in ("me/net", "hf-hub:me/net", "me/net@main"):
        assert torch.equal(logits(ImageClassifier.from_pretrained(text), x), logits(model, x))
    assert torch.equal(logits(timm.create_model("hf-hub:me/net", pretrained=True), x),
                       logits(model, x))
    assert torch.allclose(AutoModelForImageClassification.from_pretrained("me/net").eval()(
        x).logits, logits(model, x), atol=1e-5)
    assert (pipeline("image-classification",
                     model="me/net")(photo())[0]["label"] in model.class_names)
    assert 'timm.create_model("hf-hub:me/net"' in ModelCard.load("me/net").text
    assert ModelCard.load("me/net").data.eval_results[0].metric_value == 0.75
    for content in hub.repos["me/net"].commits[model_info("me/net").sha].values():
        assert hub.token.encode() not in content


def test_a_push_replaces_what_an_older_one_left(hub):
    classifier(transformers.ViTConfig(**TOKENS)).push_to_hub("me/net")
    assert "preprocessor_config.json" in list_repo_files("me/net")
    model = classifier()
    hub.add_files("me/net", {"notes.md": "mine", "pytorch_model.bin": b"old"})
    count = len(list_repo_commits("me/net"))
    model.push_to_hub("me/net")
    assert list_repo_files("me/net") == [".gitattributes", "README.md", "config.json",
                                         "model.safetensors", "notes.md"]
    assert len(list_repo_commits("me/net")) == count + 1
    assert torch.equal(logits(load_pretrained("me/net"), batch(model)), logits(model, batch(model)))


@pytest.mark.parametrize("kind, made", [("torn", False), ("lost", True)])
def test_a_push_that_is_cut_can_be_repeated(hub, kind, made):
    old, new = classifier(), classifier(classes=4)
    old.push_to_hub("me/net")
    first = model_info("me/net").sha
    hub.fault(kind, times=1)
    with pytest.raises(HubOfflineError, match="No half of it is there"): new.push_to_hub("me/net")
    assert (model_info("me/net").sha != first) == made
    held = new if made else old
    assert torch.equal(logits(load_pretrained("me/net"), batch(old)), logits(held, batch(old)))
    new.push_to_hub("me/net")
    assert torch.equal(logits(load_pretrained("me/net"), batch(old)), logits(new, batch(old)))
    assert len(list_repo_commits("me/net")) == 3        # the Hub's own first one, and two of ours


def test_the_card_of_a_saved_folder_names_the_repository_it_is_pushed_to(hub, tmp_path):
    folder = classifier(class_names=["one", "two", "three"]).save_pretrained(
        tmp_path / "model", metrics={"val/accuracy": 0.5}, card="# My words")
    push_to_hub(folder, "me/net")
    card, kept = ModelCard.load("me/net"), (folder / "README.md").read_text()
    assert "path/to/folder" in kept and "# model" in kept  # the folder itself stays as it is
    assert "path/to/folder" not in card.content and 'timm.create_model("hf-hub:me/net"' in card.text
    assert [o for o in card.text.splitlines()
            if o.startswith("# ")] == ["# net", "# My words"] and card.data.model_name == "net"


@pytest.mark.parametrize("kind, error", [("401", HubAccessError), ("403", HubAccessError),
                                         ("404", HubNotFoundError), ("500", HubError),
                                         ("down", HubOfflineError)])
def test_errors_of_a_push_come_soon_and_say_what_to_do(hub, kind, error, tmp_path):
    model = classifier()
    model.push_to_hub("me/net")
    before = model_info("me/net").sha
    folder = model.save_pretrained(tmp_path / "net", card="another")
    hub.fault(kind)
    start = time.monotonic()
    with pytest.raises(error) as e: push_to_hub(folder, "me/net")
    assert time.monotonic() - start < 8 and hub.token not in str(e.value)
    start = time.monotonic()
    with pytest.raises(HubError): load_pretrained("me/other", token="wrong")
    assert time.monotonic() - start < 12
    hub.clear_faults()
    assert model_info("me/net").sha == before


def test_what_cannot_be_pushed_is_refused_before_anything_is_sent(hub, tmp_path):
    model = classifier()
    hub.requests.clear()
    for wrong in (None, 3, "net", "me/né", "me/net.git", "me/a--b", "me/" + "x" * 100,
                  "me/net\n", "hf-hub:me/net"):
        with pytest.raises(ValueError, match="repo_id must look like"): model.push_to_hub(wrong)
    for token in ("hf_secret\n", "", "hf secret"):
        for call in (model.push_to_hub, load_pretrained):
            with pytest.raises(ValueError, match="token is empty, or holds") as e:
                call("me/net", token=token)
            assert "secret" not in str(e.value)
    with pytest.raises(TypeError, match="private"): model.push_to_hub("me/net", private="yes")
    with pytest.raises(ValueError, match="commit_message"):
        model.push_to_hub("me/net", commit_message=" ")
    folder = model.save_pretrained(tmp_path / "net")
    whole = (folder / "model.safetensors").read_bytes()
    for content, says in ((whole[:-100], "cut or broken"), (None, "has no weights")):
        if content is None: (folder / "model.safetensors").unlink()
        else: (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(HubCorruptError, match=says): push_to_hub(folder, "me/net")
    assert not hub.requests and not hub.repos


def test_a_private_model_does_not_go_where_all_can_see_it(hub):
    model = classifier()
    model.push_to_hub("me/open")
    before = model_info("me/open").sha
    with pytest.raises(HubError, match="there already and public"):
        classifier(classes=4).push_to_hub("me/open", private=True)
    assert model_info("me/open").sha == before
    model.push_to_hub("me/closed", private=True)
    model.push_to_hub("me/closed", private=True, card="again")


def test_hidden_files_stay_at_home_and_a_backbone_is_pushed_too(hub, tmp_path):
    model = classifier()
    folder = model.save_pretrained(tmp_path / "net", metrics={"val/accuracy": 0.5})
    (folder / ".env").write_text("HF_TOKEN=secret")
    (folder / "notes.md").write_text("mine")
    push_to_hub(folder, "me/123")
    assert list_repo_files("me/123") == [".gitattributes", "README.md", "config.json",
                                         "model.safetensors", "notes.md"]
    assert ModelCard.load("me/123").data.model_name == "123"  # in YAML a number, were it not quoted
    push_to_hub(model.backbone.save_pretrained(tmp_path / "backbone"), "me/backbone")
    assert torch.equal(create_backbone("hf-hub:me/backbone").eval()(batch(model)),
                       model.backbone(batch(model)))


def test_tokens(hub):
    model = classifier()
    with pytest.raises(HubAccessError, match="401"): model.push_to_hub("me/net", token="wrong")
    with LocalHub() as other:
        with pytest.raises(HubAccessError): model.push_to_hub("me/net")
        model.push_to_hub("me/net", token=other.token, private=True)
        with pytest.raises(HubNotFoundError): load_pretrained("me/net")
        assert torch.equal(logits(load_pretrained("me/net", token=other.token), batch(model)),
                           logits(model, batch(model)))


def test_a_revision_is_made_and_loaded(hub):
    model = classifier()
    classifier(classes=4).push_to_hub("me/net")
    model.push_to_hub("me/net", revision="next")
    assert load_pretrained("me/net").num_classes == 4
    for o in (load_pretrained("me/net", revision="next"), load_pretrained("me/net@next")):
        assert o.num_classes == 3
    with pytest.raises(HubNotFoundError, match="Revision 'none'"):
        load_pretrained("me/net", revision="none")


def test_any_classifier_of_the_hub_predicts_here(hub):
    hub.add_timm("me/plain", "test_vit", num_classes=4)
    hub.add_timm("me/imagenet", "test_vit")
    made = transformers.ViTForImageClassification(transformers.ViTConfig(
        **TOKENS, id2label={0: "one", 1: "two"}, label2id={"one": 0, "two": 1}))
    hub.add_transformers("me/vit", made)
    plain = load_pretrained("me/plain")
    x = batch(plain)
    assert (torch.equal(logits(plain, x), logits(
        timm.create_model("hf-hub:me/plain", pretrained=True), x)) and plain.class_names is None)
    assert load_pretrained("me/imagenet").class_names[1] == "goldfish, Carassius auratus"
    vit = load_pretrained("me/vit")
    assert (vit.class_names == ["one", "two"]
            and torch.allclose(logits(vit, batch(vit)), made.eval()(batch(vit)).logits, atol=1e-5))
    assert vit.predict([photo()])[0].label in ("one", "two")
    hub.add_transformers("me/bare", transformers.ViTConfig(**TOKENS))
    hub.add_transformers("me/dino", transformers.Dinov2ForImageClassification(
        transformers.Dinov2Config(**DINO)))
    with pytest.raises(HubCorruptError, match="may be a backbone"): load_pretrained("me/bare")
    with pytest.raises(HubError, match="cannot be taken over"): load_pretrained("me/dino")


def test_a_folder_needs_no_network(tmp_path, hub):
    model = classifier()
    folder = model.save_pretrained(tmp_path / "net")
    hub.requests.clear()
    load_pretrained(folder)
    assert not hub.requests
    model.push_to_hub("me/net")
    load_pretrained("me/net")
    hub.fault("down")
    with pytest.warns(UserWarning, match="taken from the cache"): again = load_pretrained("me/net")
    assert np.array_equal(logits(again, batch(model)), logits(model, batch(model)))


def test_a_class_that_a_folder_names_is_not_imported(tmp_path):
    folder = classifier().save_pretrained(tmp_path / "net")
    for name in ("os.system", "subprocess.Popen", "BackboneConfig", "AutoTrainer"):
        values = config(folder)
        values["autotimm"]["task"] = name
        (folder / "config.json").write_text(json.dumps(values))
        with pytest.raises(HubCorruptError, match="There is no task"): load_pretrained(folder)
    values["autotimm"] |= {"task": "ImageClassifier",
                           "hparams": {**values["autotimm"]["hparams"],
                                       "optimizer": {"class": "os.system", "params": {}}}}
    (folder / "config.json").write_text(json.dumps(values))
    model = load_pretrained(folder)
    with pytest.raises(ImportError, match="must come from"): model.configure_optimizers()


def test_a_folder_does_not_say_where_weights_are_read(tmp_path):
    folder = classifier().save_pretrained(tmp_path / "net")
    opened = tmp_path / "opened"
    # A pickle that makes a folder
    (folder / "notes.bin").write_bytes(b"cos\nmkdir\n(V" + str(opened).encode() + b"\ntR.")
    values = config(folder)
    for extra in ({"checkpoint_path": str(folder / "notes.bin")},
                  {"pretrained": True, "pretrained_cfg": {"file": str(folder / "notes.bin")}}):
        values["autotimm"]["hparams"]["backbone"]["args"] |= extra
        (folder / "config.json").write_text(json.dumps(values))
        assert (not set(load_pretrained(folder).hparams["backbone"]["args"]) & set(extra)
                and not opened.exists())
    values["autotimm"]["hparams"]["backbone"]["architecture"] = "local-dir:" + str(folder)
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="no architecture of timm"): load_pretrained(folder)


def test_a_class_of_ones_own_does_not_take_the_name_of_the_librarys():
    from autotimm.hub import TASKS
    ours = ImageClassifier
    type("ImageClassifier", (ours,), {"__module__": "mine"})
    mine = type("MyClassifier", (ours,), {"__module__": "mine"})
    assert TASKS["ImageClassifier"] is ours and TASKS["MyClassifier"] is mine


# ---- checkpoints

def run_of(model, folder):
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False,
                         enable_model_summary=False, enable_checkpointing=False)
    trainer.fit(model, DataLoader(TensorDataset(torch.randn(4, *model.data_config["input_size"]),
                                                torch.arange(4) % 3), 2))
    trainer.save_checkpoint(folder / "run.ckpt")
    return folder / "run.ckpt"


@pytest.mark.filterwarnings("ignore")
def test_training_goes_on_from_a_folder(tmp_path):
    settings = dict(image_size=32, lr=0.02, optimizer="sgd", label_smoothing=0.1,
                    threshold=0.4, class_names=["a", "b", "c"])
    model = classifier(**settings)
    run = run_of(model, tmp_path)
    back = folder_to_checkpoint(convert_checkpoint(run, tmp_path / "net"), tmp_path / "back.ckpt")
    again = ImageClassifier.load_from_checkpoint(back)
    assert {k: again.hparams[k] for k in settings
            if k != "image_size"} == {k: v for k, v in settings.items() if k != "image_size"}
    other = classifier(**settings, weight_decay=0.0, scheduler=None)
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False,
                         enable_model_summary=False, enable_checkpointing=False,
                         limit_train_batches=1)
    other.lr = 1e-12
    trainer.fit(other, DataLoader(TensorDataset(torch.randn(4, 3, 32, 32), torch.arange(4) % 3), 2),
                ckpt_path=back)
    for a, b in zip(other.parameters(), again.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_damaged_and_compiled_checkpoints(tmp_path):
    model = classifier(image_size=32)
    found = torch.load(run_of(model, tmp_path), weights_only=True)
    for name in ("backbone.model._orig_mod.", "_orig_mod.backbone.model."):
        state = {k.replace("backbone.model.", name): v for k, v in found["state_dict"].items()}
        torch.save({**found, "state_dict": state}, tmp_path / "compiled.ckpt")
        folder = convert_checkpoint(tmp_path / "compiled.ckpt", tmp_path / "net")
        assert torch.equal(logits(load_pretrained(folder), batch(model)),
                           logits(model, batch(model)))
    whole = (tmp_path / "run.ckpt").read_bytes()
    place = whole.index(b"backbone_name")                       # in the pickle's text
    for content in (b"", whole[:-500], whole[:place] + b"\xff\xff" + whole[place + 2:],
                    b"no checkpoint"):
        (tmp_path / "bad.ckpt").write_bytes(content)
        with pytest.raises(ValueError, match="'bad.ckpt' cannot be read as a checkpoint") as e:
            convert_checkpoint(tmp_path / "bad.ckpt", tmp_path / "none")
        assert type(e.value) is ValueError and "weights_only" not in str(e.value)
    for change in (dict(hyper_parameters=[1]), dict(hyper_parameters=None), dict(state_dict=[1])):
        torch.save({**found, **change}, tmp_path / "bad.ckpt")
        with pytest.raises(ValueError, match="bad.ckpt"):
            convert_checkpoint(tmp_path / "bad.ckpt", tmp_path / "none")
    assert not (tmp_path / "none").exists()
