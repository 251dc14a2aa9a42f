"""Every task as ONNX, raw and with results, against the model and its own predict; what is refused;
int8; torch's own formats."""
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils._pytree import tree_leaves

from autotimm.backbones import BackboneConfig, FeatureBackboneConfig
from autotimm.core import MissingExtraError
from autotimm.export import (ExportError, export_checkpoint_to_onnx,
                             export_checkpoint_to_torchscript, export_program, export_to_onnx,
                             export_to_torchscript, exportable, load_onnx, load_program,
                             load_torchscript, pick_objects, quantize_onnx, read_proto,
                             validate_onnx_export, validate_torchscript_export)
from autotimm.results import ClassificationResult, DetectionResult, SegmentationResult
from autotimm.tasks import (ImageClassifier, InstanceSegmentor, ObjectDetector,
                            SemanticSegmentor, YOLOXDetector)
from autotimm.testing import make_shapes, write_folders

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
NAMES = ["circle", "square", "triangle"]
SMALL = dict(image_size=64, class_names=NAMES)
DENSE = dict(**SMALL, fpn_channels=16, head_num_convs=1)


def features(): return FeatureBackboneConfig("test_resnet", pretrained=False)


def transformers_vit():
    from transformers import ViTConfig
    return ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                     intermediate_size=64, image_size=64, patch_size=16)


BUILD = {
    "classifier": lambda: ImageClassifier(BackboneConfig("test_resnet", pretrained=False),
                                          3, **SMALL),
    "labels": lambda: ImageClassifier(BackboneConfig("test_vit", pretrained=False), 3,
                                      multi_label=True, threshold=0.4, **SMALL),
    "transformers": lambda: ImageClassifier(transformers_vit(), 3, class_names=NAMES),
    "segmentor": lambda: SemanticSegmentor(features(), 3, "fcn", **SMALL),
    "fcos": lambda: ObjectDetector(features(), 3, strides=(8, 16, 32), **DENSE),
    "yolox-head": lambda: ObjectDetector(features(), 3, "yolox", strides=(8, 16, 32), **DENSE),
    "yolox": lambda: YOLOXDetector("yolox-nano", 3, **SMALL),
    "instances": lambda: InstanceSegmentor(features(), 3, strides=(4, 8, 16, 32),
                                           mask_size=14, max_detections_per_image=20, **DENSE),
}


def build(name: str) -> pl.LightningModule:
    "A model of that kind whose outputs differ from place to place, as a trained one's do."
    torch.manual_seed(0)
    model, g = BUILD[name](), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for o in model.modules():
            if isinstance(o, nn.BatchNorm2d):
                o.running_mean.copy_(torch.randn(o.running_mean.shape, generator=g) * 0.1)
                o.running_var.copy_(torch.rand(o.running_var.shape, generator=g) + 0.5)
        for n, p in model.named_parameters():
            if "predictor" in n or n.startswith(("head", "mask_head")):
                p.add_(torch.randn(p.shape, generator=g) * 0.1)
            # Classes and objectness start at 1%: so close to nothing all scores are alike.
            if n.endswith("bias") and ("cls_preds" in n or "obj_preds" in n): p.add_(4)
    return model


def images(n: int = 3, size: int = 64) -> torch.Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(7))


def modes(model: nn.Module) -> list[bool]: return [o.training for o in model.modules()]


def shape(path: str) -> list:
    return [d.dim_param or d.dim_value
            for d in read_proto(path).graph.input[0].type.tensor_type.shape.dim]


def close(a, b, atol=1e-3) -> None:
    a, b = torch.as_tensor(np.asarray(a)), torch.as_tensor(np.asarray(b))
    assert a.shape == b.shape
    assert torch.allclose(a.double(), b.double(), atol=atol,
                          rtol=1e-3), float((a.double() - b.double()).abs().max())


def rows(found) -> torch.Tensor:
    "Objects as rows in an order that ties do not change."
    table = torch.cat([found["labels"][:, None].double(), found["boxes"].double(),
                       found["scores"][:, None].double()], 1)
    return table[np.lexsort(table.T.round(decimals=2).numpy())]


@pytest.fixture(scope="module")
def folder(tmp_path_factory): return tmp_path_factory.mktemp("exported")


@pytest.fixture(scope="module")
def classifier_file(folder) -> str:
    return export_to_onnx(build("classifier"), folder / "classifier.onnx")


@pytest.fixture(scope="module")
def learned(folder):
    "A classifier that knows the shapes, its file, and images with labels that it has not seen."
    model, scenes = build("classifier"), make_shapes(224, image_size=64, max_objects=1, seed=1)
    x, y = model.preprocess([o.image for o in scenes]), torch.tensor([o.label for o in scenes])
    optimiser = torch.optim.AdamW(model.train().parameters(), lr=2e-3)
    torch.manual_seed(0)
    for part in (torch.randperm(160).split(16) * 3):
        loss = nn.functional.cross_entropy(model(x[part]), y[part])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval(), export_to_onnx(model, folder / "learned.onnx",
                                        dynamic_size=False), x, y, scenes


def test_a_classifier_gives_the_models_logits_at_any_size(classifier_file):
    model, found = build("classifier").eval(), load_onnx(classifier_file, threads=1)
    assert (shape(classifier_file) == ["batch", 3, "height", "width"]
            and [o.name for o in found.get_outputs()] == ["output"])
    for x in (images(1), images(5), torch.randn(2, 3, 97, 75)):
        with torch.no_grad(): close(found(x)["output"], model(x), 1e-5)
    said = found.metadata
    assert (said["task"], said["class_names"], said["postprocess"],
            said["multi_label"]) == ("classification", NAMES, False, False)
    assert (said["checked"]["inputs"] == 5 and said["checked"]["largest_difference"] < 1e-5
            and said["size_step"] == 1)


def test_a_transformers_backbone(folder):
    model = build("transformers").eval()
    found = load_onnx(export_to_onnx(model, folder / "transformers.onnx", dynamic_size=False),
                      threads=1)
    with torch.no_grad(): close(found(images(5))["output"], model(images(5)), 1e-5)
    with pytest.raises(ValueError, match="got \\(1, 3, 96, 96\\)"): found(images(1, 96))


def test_a_classifier_predicts_as_the_model_does(folder):
    model = build("labels").eval()
    path = export_to_onnx(model, folder / "labels.onnx", postprocess=True)
    found = load_onnx(path, threads=1)
    assert ([o.name for o in found.get_outputs()] == ["probabilities"]
            and shape(path) == ["batch", 3, "height", "width"])
    for x in (images(), torch.randn(2, 3, 96, 80)):
        with torch.no_grad(): close(found(x)["probabilities"], model.probabilities(model(x)), 1e-5)
    # A patch of 16 pixels divides no other size.
    with pytest.raises(ValueError, match="in steps of 16 pixels"): found(images(1, 65))
    scenes = make_shapes(3, image_size=80)
    got = found.predict([o.image for o in scenes], batch_size=2)
    with torch.no_grad():
        expected = model.probabilities(model(model.preprocess([o.image for o in scenes])))
    assert all(isinstance(o, ClassificationResult) for o in got) and got[0].size == (80, 80)
    close(torch.stack([o.probabilities for o in got]), expected, 1e-5)
    assert got[0].multi_label and got[0].class_names == NAMES and got[0].threshold == 0.4


def test_segmentor_raw_and_with_classes_of_pixels(folder):
    model = build("segmentor").eval()
    raw = load_onnx(export_to_onnx(model, folder / "seg.onnx", dynamic_size=False), threads=1)
    ready = load_onnx(export_to_onnx(model, folder / "segmentor_p.onnx", postprocess=True),
                      threads=1)
    with torch.no_grad(): close(raw(images())["output"], model(images()))
    with torch.no_grad(): masks = model.predict(images(), full_size=True)
    got = ready(images())["mask"]
    assert got.shape == (3, 64, 64) and (got == masks).float().mean() > 0.999
    # The size is open where the head lets it; then the classes of larger images agree too.
    if ready.metadata["size_step"] is not None:
        larger = torch.randn(2, 3, 96, 128)
        assert ((ready(larger)["mask"] == model.predict(larger, full_size=True)).float().mean()
                > 0.999)
    image = make_shapes(1, image_size=96)[0].image[:72]
    a, b = raw.predict(image)[0], ready.predict(image)[0]
    assert isinstance(a, SegmentationResult) and a.mask.shape == b.mask.shape == (72, 96)
    assert (a.mask == b.mask).float().mean() > 0.9


@pytest.mark.parametrize("name", ["fcos", "yolox-head", "yolox"])
def test_detectors_give_objects_as_predict_does(name, folder):
    model = build(name)
    before = modes(model)
    path = export_to_onnx(model, folder / f"{name}_p.onnx", postprocess=True, dynamic_size=False)
    found = load_onnx(path, threads=1)
    assert modes(model) == before
    assert [o.name for o in found.get_outputs()] == ["boxes", "scores", "labels", "num_detections"]
    assert shape(path) == ["batch", 3, 64, 64]
    for n in (1, 2, 5):
        got, expected = found(images(n)), model.predict(images(n))
        for i, wanted in enumerate(expected):
            count = int(got["num_detections"][i])
            assert count == len(wanted["labels"]) > 0
            close(rows({k: got[k][i, :count] for k in ("boxes", "scores", "labels")}),
                  rows(wanted), 2e-2)
            assert ((got["labels"][i, count:] == -1).all() and not got["scores"][i, count:].any()
                    and not got["boxes"][i, count:].any())
    result = found.predict(make_shapes(1, image_size=96)[0].image)[0]
    assert (isinstance(result, DetectionResult) and result.size == (96, 96)
            and float(result.boxes.max()) <= 96)


def test_maps_of_a_detector_at_any_size_and_objects_made_of_them_outside(folder):
    model = build("fcos").eval()
    path = export_to_onnx(model, folder / "fcos.onnx")
    found = load_onnx(path, threads=1)
    assert ([o.name for o in found.get_outputs()]
            == [f"{kind}_p{i}" for kind in ("cls", "reg", "ctr") for i in (3, 4, 5)])
    assert shape(path) == ["batch", 3, "height", "width"]
    for x in (images(2), torch.randn(1, 3, 160, 96), torch.randn(5, 3, 33, 70)):
        with torch.no_grad(): expected = tree_leaves(model(x))
        for a, b in zip(found(x).values(), expected): close(a, b)
    image = make_shapes(1, image_size=64)[0].image
    close(rows(found.predict(image)[0]),
          rows(model.predict(torch.stack([model.get_transform()(image)]))[0]), 2e-2)
    # An instance segmentor's maps are such maps: there are no masks in them.
    found.metadata["task"] = "instance_segmentation"
    with pytest.raises(ValueError, match="postprocess=True"): found.predict(image)


def test_instance_segmentor_with_masks(folder):
    model = build("instances")
    found = load_onnx(export_to_onnx(model, folder / "instances_p.onnx", postprocess=True,
                                     dynamic_size=False), threads=1)
    assert [o.name for o in found.get_outputs()][-1] == "masks"
    got, expected = found(images(2)), model.predict(images(2))
    assert got["masks"].shape == (2, 20, 14, 14)
    for i, wanted in enumerate(expected):
        count = int(got["num_detections"][i])
        close(rows({k: got[k][i, :count] for k in ("boxes", "scores", "labels")}),
              rows(wanted), 2e-2)
        if torch.allclose(got["boxes"][i, :count], wanted["boxes"], atol=1e-2):
            pasted = model._paste(got["masks"][i, :count], got["boxes"][i, :count], (64, 64))
            assert (pasted == wanted["masks"]).float().mean() > 0.999
    image = make_shapes(1, image_size=80)[0].image
    result = found.predict(image)[0]
    assert result.masks.shape == (len(result.labels), 80, 80) and result.masks.dtype == torch.bool


@pytest.mark.parametrize("opset", [17, 20])
def test_the_opset_is_the_one_asked_for(opset, folder):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                          nn.Flatten(), nn.Linear(8, 2)).eval()
    path = export_to_onnx(model, folder / f"opset{opset}.onnx", images(2), opset_version=opset,
                          dynamic_size=False)
    assert [o.version for o in read_proto(path).opset_import if o.domain == ""] == [opset]
    with torch.no_grad(): close(load_onnx(path)(images(5))["output"], model(images(5)), 1e-5)


def test_an_opset_that_cannot_be_had_is_refused(folder):
    with pytest.raises(ExportError):
        export_to_onnx(build("classifier"), folder / "no.onnx", opset_version=5)
    with pytest.raises(ValueError, match="opset_version 18 or more"):
        export_to_onnx(build("classifier"), folder / "no.onnx", opset_version=17, postprocess=True)
    with pytest.raises(ValueError, match="must be an int"):
        export_to_onnx(build("classifier"), folder / "no.onnx", opset_version="18")
    assert not (folder / "no.onnx").exists()


def test_one_file_without_this_machines_paths(classifier_file):
    proto, data = read_proto(classifier_file), Path(classifier_file).read_bytes()
    assert not any(o.data_location == onnx.TensorProto.EXTERNAL for o in proto.graph.initializer)
    assert str(Path(__file__).parents[1]).encode() not in data and b"site-packages" not in data
    onnx.checker.check_model(classifier_file)
    said = json.loads({o.key: o.value for o in proto.metadata_props}["autotimm"])
    assert said["data_config"]["input_size"] == [3, 64, 64] and said["backbone"] == "test_resnet"


def test_weights_in_a_second_file_if_asked_and_gone_again(tmp_path):
    model, path = nn.Linear(64, 32), tmp_path / "a.onnx"
    x = torch.randn(2, 64)
    export_to_onnx(model, path, x, external_data=True)
    assert sorted(o.name for o in tmp_path.iterdir()) == ["a.onnx", "a.onnx.data"]
    close(load_onnx(path)(x)["output"], model(x).detach())
    export_to_onnx(model, path, x)
    assert [o.name for o in tmp_path.iterdir()] == ["a.onnx"]


class Two(nn.Module):
    "Made up: two inputs, a dict of outputs."
    def forward(self, image: torch.Tensor, weight: torch.Tensor):
        return {"sum": image.mean((1, 2, 3)) + weight, "product": image.mean((1, 2, 3)) * weight}


def test_any_module_with_names_for_all(tmp_path):
    path = export_to_onnx(Two(), tmp_path / "two.onnx", (torch.randn(2, 3, 8, 8), torch.randn(2)))
    found = load_onnx(path)
    assert ([o.name for o in found.get_inputs()] == ["image", "weight"]
            and [o.name for o in found.get_outputs()] == ["sum", "product"])
    x, w = torch.randn(4, 3, 8, 8), torch.randn(4)
    close(found(x, w)["product"], Two()(x, w)["product"])
    assert validate_onnx_export(Two(), path, (x, w))
    with pytest.raises(ValueError, match="does not say which task"):
        found.predict(np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="takes 2 inputs"): found(x)
    export_to_onnx(nn.Flatten(), tmp_path / "one.onnx", torch.randn(2, 3, 4, 4),
                   output_names=["flat"], input_names=["pixels"], dynamic_axes={"pixels": {0: "n"}})
    assert ([o.name for o in load_onnx(tmp_path / "one.onnx").get_outputs()] == ["flat"]
            and shape(tmp_path / "one.onnx")[1:] == [3, 4, 4])
    with pytest.raises(ValueError, match="1 different names"):
        export_to_onnx(nn.Flatten(), tmp_path / "one.onnx", torch.randn(2, 3),
                       output_names=["a", "b"])
    with pytest.raises(ValueError, match="names dimension 1"):
        export_to_onnx(nn.Flatten(), tmp_path / "one.onnx", torch.randn(2, 3),
                       dynamic_axes={"input": {1: "n"}})


def test_a_fixed_batch_is_filled_up(tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    path = export_to_onnx(model, tmp_path / "fixed.onnx", torch.randn(4, 3, 2, 2),
                          dynamic_batch=False)
    assert shape(path) == [4, 3, 2, 2]
    x = torch.randn(7, 3, 2, 2)
    close(load_onnx(path)(x)["output"], model(x).detach())


class Differs(nn.Module):
    "Made up: another result each time it is called."
    calls = 0

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x):
        self.calls += 1
        return self.layer(x) + 0.5 * (self.calls % 2)


def test_a_file_that_differs_is_not_written_and_the_old_one_stays(tmp_path):
    path, model = tmp_path / "a.onnx", Differs().train()
    export_to_onnx(model.layer, path, torch.randn(2, 4))
    old = path.read_bytes()
    with pytest.raises(ExportError, match="differs from the model's by up to 0.5") as e:
        export_to_onnx(model, path, torch.randn(2, 4))
    assert (e.value.difference == pytest.approx(0.5, abs=1e-4) and e.value.output == "output"
            and isinstance(e.value, RuntimeError))
    assert (path.read_bytes() == old and [o.name for o in tmp_path.iterdir()] == ["a.onnx"]
            and model.training)


class CountsOnTwo(nn.Module):
    "Made up: its graph holds the batch size."
    def forward(self, x): return x * (1.0 if len(x) == 2 else 2.0)


def test_bad_inputs_are_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="example_input is needed"):
        export_to_onnx(nn.Linear(2, 2), tmp_path / "a.onnx")
    with pytest.raises(TypeError, match="must be a tensor"):
        export_to_onnx(nn.Linear(2, 2), tmp_path / "a.onnx", "image.png")
    with pytest.raises(ValueError, match="must end on '.onnx'"):
        export_to_onnx(nn.Linear(2, 2), tmp_path / "a.pt", torch.randn(1, 2))
    with pytest.raises(ValueError, match="which it has"):
        export_to_onnx(nn.Linear(2, 2), tmp_path / "a.onnx", torch.randn(1, 2), postprocess=True)
    with pytest.raises(ValueError, match="float16"):
        export_to_onnx(nn.Linear(2, 2).half(), tmp_path / "a.onnx", torch.randn(1, 2))
    with pytest.raises(ValueError, match="'meta' device"):
        export_to_onnx(nn.Linear(2, 2, device="meta"), tmp_path / "a.onnx", torch.randn(1, 2))
    with pytest.raises(ExportError, match="dynamic_batch=False"):
        export_to_onnx(CountsOnTwo(), tmp_path / "a.onnx", torch.randn(2, 2))
    with pytest.raises(ExportError, match="alone"):
        export_to_onnx(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), tmp_path / "a.onnx",
                       torch.randn(2, 3, 2, 2), dynamic_size=True)
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(IsADirectoryError):
        export_to_onnx(nn.Linear(2, 2), tmp_path / "folder.onnx", torch.randn(1, 2))
    with pytest.raises(FileNotFoundError): load_onnx(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(ExportError, match="does not take"): load_onnx(tmp_path / "text.onnx")
    # A folder that is not there yet is made.
    assert Path(export_to_onnx(nn.Linear(2, 2), tmp_path / "new" / "a.onnx",
                               torch.randn(1, 2))).is_file()
    monkeypatch.setattr("autotimm.core.has_module", lambda name: name != "onnx")
    with pytest.raises(MissingExtraError, match="autotimm\\[onnx\\]"):
        export_to_onnx(nn.Linear(2, 2), tmp_path / "b.onnx", torch.randn(1, 2))


def test_the_model_is_left_as_it_was_also_a_compiled_one(tmp_path):
    model = build("classifier").train()
    model.backbone.eval()
    before, state = modes(model), {k: v.clone() for k, v in model.state_dict().items()}
    model.backbone.compile(backend="eager")
    call, numbers = model.backbone._compiled_call_impl, torch.get_rng_state()
    path = export_to_onnx(torch.compile(model, backend="eager"), tmp_path / "a.onnx",
                          dynamic_size=False)
    assert (modes(model) == before and model.backbone._compiled_call_impl is call
            and "_jit_is_scripting" not in model.__dict__)
    assert (all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
            and torch.equal(torch.get_rng_state(), numbers))
    assert load_onnx(path).class_names == NAMES
    with pytest.raises(KeyError), exportable(model): raise KeyError("of the user")
    assert modes(model) == before


def test_a_checkpoint_as_onnx_and_torchscript(tmp_path):
    model = build("transformers").eval()
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False,
                         enable_model_summary=False, accelerator="cpu")
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    path = export_checkpoint_to_onnx(tmp_path / "a.ckpt", tmp_path / "a.onnx", ImageClassifier,
                                     dynamic_size=False)
    with torch.no_grad(): close(load_onnx(path)(images())["output"], model(images()), 1e-5)
    script = export_checkpoint_to_torchscript(tmp_path / "a.ckpt", tmp_path / "a.pt",
                                              ImageClassifier, images())
    with torch.no_grad(): close(script(images(2)), model(images(2)), 1e-5)


@pytest.mark.parametrize("name", ["classifier", "fcos"])
def test_torchscript(name, tmp_path):
    model = build(name).train()
    script = export_to_torchscript(model, tmp_path / "a.pt", images(2))
    loaded = load_torchscript(tmp_path / "a.pt")
    assert model.training and not loaded.training
    for a, b in zip(tree_leaves(script(images(3))), tree_leaves(loaded(images(3)))):
        close(a.detach(), b.detach())
    assert validate_torchscript_export(model, loaded, images(5), atol=1e-4)
    data = (tmp_path / "a.pt").read_bytes()
    assert b"debug_pkl" not in data and b"site-packages" not in data
    with pytest.raises(RuntimeError, match="method='trace'"):
        export_to_torchscript(model, tmp_path / "b.pt", method="script")
    with pytest.raises(RuntimeError, match="example_input is needed"):
        export_to_torchscript(nn.Linear(2, 2), tmp_path / "b.pt")
    with pytest.raises(RuntimeError, match="'trace' or 'script'"):
        export_to_torchscript(model, tmp_path / "b.pt", method="guess")
    with pytest.raises(ExportError, match="differs"):
        export_to_torchscript(Differs(), tmp_path / "b.pt", torch.randn(2, 4))
    assert model.training and not (tmp_path / "b.pt").exists()
    assert export_to_torchscript(nn.Linear(2, 2), tmp_path / "c.pt", torch.ones(1, 2),
                                 "script")(torch.ones(3, 2)).shape == (3, 2)


@pytest.mark.parametrize("name", ["classifier", "segmentor", "fcos", "yolox-head", "instances"])
def test_torchscript_with_results(name, tmp_path):
    model = build(name).train()
    export_to_torchscript(model, tmp_path / "a.pt", postprocess=True)
    found = load_torchscript(tmp_path / "a.pt")
    assert (model.training and found.metadata["class_names"] == NAMES
            and found.metadata["data_config"]["input_size"] == [3, 64, 64])
    assert not any("autotimm" in o.kind() for o in found.inlined_graph.nodes())
    model.eval()
    for x in (images(5), torch.randn(1, 3, 96, 128)):
        made = found(x)
        got = dict(zip(found.metadata["outputs"], made if isinstance(made, tuple) else [made],
                       strict=True))
        if name == "classifier":
            with torch.no_grad(): close(got["probabilities"].detach(), model(x).softmax(1), 1e-5)
        elif name == "segmentor":
            assert (got["mask"] == model.predict(x, full_size=True)).float().mean() > 0.999
        else:
            for i, wanted in enumerate(model.predict(x)):
                count = int(got["num_detections"][i])
                close(rows({k: got[k][i, :count].detach() for k in ("boxes", "scores", "labels")}),
                      rows(wanted), 2e-2)
    with pytest.raises(RuntimeError, match="method='trace'"):
        export_to_torchscript(model, tmp_path / "b.pt", method="script", postprocess=True)


def test_programs(tmp_path):
    model = build("fcos")
    before = modes(model)
    program = load_program(export_program(model, tmp_path / "a.pt2", postprocess=True))
    assert modes(model) == before
    got, expected = program(images(3)), model.predict(images(3))
    assert [int(o) for o in got["num_detections"]] == [len(o["labels"]) for o in expected]
    assert program.metadata["class_names"] == NAMES
    assert str(Path(__file__).parents[1]).encode() not in (tmp_path / "a.pt2").read_bytes()
    sizes = load_program(export_program(build("classifier"), tmp_path / "b.pt2", dynamic_size=True))
    assert sizes(torch.randn(1, 3, 200, 150))["output"].shape == (1, 3)
    with pytest.raises(FileNotFoundError): load_program(tmp_path / "none.pt2")


def test_eight_bits(learned, tmp_path):
    model, path, x, y, scenes = learned
    data = DataLoader(TensorDataset(x[160:], y[160:]), 16)
    with torch.no_grad(): right = float((model(x[160:]).argmax(1) == y[160:]).float().mean())
    static = quantize_onnx(path, tmp_path / "static.onnx", calibration=x[:96], evaluate=data,
                           threads=1, verbose=False)
    assert (static.measure == "accuracy" and static.before == pytest.approx(right)
            and right > 0.7 and static.after > right - 0.1)
    assert static.bytes_after < 0.4 * static.bytes_before and "accuracy on 64" in repr(static)
    small = load_onnx(static.path)
    assert small.class_names == NAMES and small.metadata["quantized"] == "static"
    assert {o.op_type for o in read_proto(static.path).graph.node} & {"QuantizeLinear"}
    assert len(small.predict([o.image for o in scenes[:3]])) == 3
    dynamic = quantize_onnx(path, tmp_path / "dynamic.onnx", evaluate=data, verbose=False)
    assert (dynamic.kind == "dynamic" and dynamic.after > right - 0.1
            and dynamic.bytes_after < 0.4 * dynamic.bytes_before)


def test_eight_bits_on_a_folder_and_without_labels(learned, tmp_path, capsys):
    _, path, _, _, scenes = learned
    photos = write_folders(tmp_path / "photos", n=12, image_size=64, max_objects=1, seed=3)
    found = quantize_onnx(path, tmp_path / "a.onnx", calibration=photos, evaluate=photos)
    assert (found.images == 12 and found.measure == "accuracy"
            and "int8, static" in capsys.readouterr().out)
    alone = quantize_onnx(path, tmp_path / "b.onnx", calibration=[o.image for o in scenes[:20]],
                          verbose=False)
    assert alone.measure == "agreement" and alone.after > 0.8 and alone.images == 20
    (photos / "hexagon").mkdir()
    with pytest.raises(ValueError, match="hexagon"):
        quantize_onnx(path, tmp_path / "c.onnx", evaluate=photos)
    with pytest.raises(ValueError, match="Name another"): quantize_onnx(path, path)
    assert not (tmp_path / "c.onnx").exists()


def test_bad_images_are_reported_by_a_file_too(classifier_file, tmp_path):
    photos = write_folders(tmp_path / "photos", n=3, image_size=32)
    (photos / "broken.png").write_bytes(b"\x89PNG broken")
    found = load_onnx(classifier_file)
    with pytest.warns(UserWarning): results = found.predict(photos, on_bad_image="report")
    assert len(results) == 3 and len(results.bad) == 1
    assert results.to_csv().startswith("name,label,score")


def test_loading_needs_no_task_and_no_trainer(classifier_file):
    import subprocess
    code = ("import sys; from autotimm.export import load_onnx; load_onnx(sys.argv[1]); "
            "print([o for o in ('autotimm.tasks.base', 'onnxscript', 'transformers') if o in "
            "sys.modules])")
    assert subprocess.run([sys.executable, "-c", code, classifier_file], capture_output=True,
                          text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize("write", [export_to_onnx, export_program, export_to_torchscript])
def test_the_callers_autocast_does_not_become_part_of_the_file(write, tmp_path):
    model = build("classifier").eval()
    path = tmp_path / {export_to_onnx: "a.onnx", export_program: "a.pt2",
                       export_to_torchscript: "a.pt"}[write]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        write(model, path, **({"dynamic_size": False} if write is export_to_onnx else {}))
    found = {export_to_onnx: load_onnx, export_program: load_program,
             export_to_torchscript: load_torchscript}[write](path)(images())
    with torch.no_grad():
        close(found if write is export_to_torchscript else found["output"], model(images()), 1e-5)


def test_open_dimensions_by_name(tmp_path):
    model, x, path = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1),
                                   nn.Flatten()), torch.randn(2, 3, 32, 32), tmp_path / "a.onnx"
    out = lambda: [d.dim_param or d.dim_value
                   for d in read_proto(path).graph.output[0].type.tensor_type.shape.dim]
    for opset in (17, 18):
        export_to_onnx(model, path, x, opset,
                       {"input": {0: "n", 2: "rows", -1: "columns"}, "output": {0: "n"}})
        assert shape(path) == ["n", 3, "rows", "columns"] and out() == ["n", 4]
    export_to_onnx(model, path, x, dynamic_axes={"input": [0]})
    assert shape(path) == ["batch", 3, 32, 32]
    # Axes of outputs follow from those of inputs.
    export_to_onnx(model, path, x, dynamic_axes={"output": {0: "n"}})
    assert shape(path) == [2, 3, 32, 32]
    with pytest.raises(ValueError, match="names 'image'; the inputs are input"):
        export_to_onnx(model, path, x, dynamic_axes={"image": {0: "n"}})
    with pytest.raises(ValueError, match="names dimension 9"):
        export_to_onnx(model, path, x, dynamic_axes={"input": {9: "n"}})


class Pair(nn.Module):
    "Made up: two outputs, of which each may be wanted by the other's name."
    def forward(self, x): return {"a": x.relu(), "b": x.sigmoid()}


def test_any_output_name_can_be_had_but_that_of_an_input(tmp_path):
    x, path = torch.randn(2, 3), tmp_path / "a.onnx"
    for names in (["b", "a"], ["sigmoid", "relu"], ["x", "y"]):
        export_to_onnx(Pair(), path, x, 18, None, None, names)
        found = load_onnx(path)(x)
        assert list(found) == names
        close(found[names[0]], x.relu())
        close(found[names[1]], x.sigmoid())
    with pytest.raises(ValueError, match="'input' is the name of an input and of an output"):
        export_to_onnx(Pair(), path, x, output_names=["input", "b"])
    inner = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    close(load_onnx(export_to_onnx(inner, path, x, output_names=["relu"]))(x)["relu"],
          inner(x).detach(), 1e-5)
    close(load_onnx(export_to_onnx(inner, path, x, output_names=["model.0.weight"]))(
        x)["model.0.weight"], inner(x).detach(), 1e-5)


def test_what_is_no_module_and_what_cannot_be_written_is_named_before_the_work(tmp_path):
    x = torch.randn(1, 3)
    with pytest.raises(TypeError, match="must be a torch.nn.Module, got str"):
        export_to_onnx("model", tmp_path / "a.onnx", x)
    with pytest.raises(TypeError, match="is TorchScript already"):
        export_to_onnx(torch.jit.trace(nn.Linear(3, 2), x), tmp_path / "a.onnx", x)
    with pytest.raises(TypeError, match="got int"):
        export_to_onnx(nn.Linear(3, 2), tmp_path / "a.onnx", 5)
    (tmp_path / "file").write_text("")
    calls = Differs()
    with pytest.raises(NotADirectoryError, match="which is no folder"):
        export_to_onnx(calls, tmp_path / "file" / "a.onnx", torch.randn(2, 4))
    with pytest.raises(RuntimeError, match="is a folder"):
        export_to_torchscript(calls, tmp_path, torch.randn(2, 4))
    assert calls.calls == 0


def test_a_home_folder_is_expanded_for_torchscript_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    export_to_torchscript(nn.Linear(3, 2), "~/a.pt", torch.randn(1, 3))
    assert (tmp_path / "a.pt").is_file()


def test_weights_that_do_not_fit_in_one_file(tmp_path, monkeypatch):
    monkeypatch.setattr("autotimm.export.onnx._LARGEST", 1000)
    model, path, x = nn.Linear(64, 32), tmp_path / "a.onnx", torch.randn(2, 64)
    with pytest.raises(ExportError, match="external_data=None"):
        export_to_onnx(model, path, x, external_data=False)
    assert not list(tmp_path.iterdir())
    export_to_onnx(model, path, x)
    assert sorted(o.name for o in tmp_path.iterdir()) == ["a.onnx", "a.onnx.data"]


def test_providers_that_are_not_there(classifier_file):
    with pytest.raises(ValueError, match="providers must be some of .*got 'Foo'"):
        load_onnx(classifier_file, ["Foo", "CPUExecutionProvider"])
    with pytest.raises(ValueError, match="got 'OpenVINOExecutionProvider'"):
        load_onnx(classifier_file, "OpenVINOExecutionProvider")
    assert (load_onnx(classifier_file, "CPUExecutionProvider").get_providers()
            == ["CPUExecutionProvider"])
    assert (load_onnx(classifier_file, [("CPUExecutionProvider", {})]).get_providers()
            == ["CPUExecutionProvider"])


def test_no_image_gives_no_row(tmp_path):
    # The group norms of FCOS do not run on a batch of none in onnxruntime.
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4))
    for dynamic in (True, False):
        path = export_to_onnx(model, tmp_path / "a.onnx", torch.randn(2, 3, 8, 8),
                              dynamic_batch=dynamic, dynamic_size=False)
        assert load_onnx(path)(torch.zeros(0, 3, 8, 8))["output"].shape == (0, 4, 8, 8)
    with pytest.raises(ValueError, match="got \\(2,\\)"): load_onnx(path)([1, 2])


def test_places_without_numbers_are_no_objects():
    boxes, scores = torch.full((1, 5, 4), float("nan")), torch.full((1, 5, 2), 0.9)
    found, _, labels, count = pick_objects(boxes, scores, (8, 8), 0.1, 0.5, 3)
    assert int(count) == 0 and bool((labels == -1).all()) and bool((found == 0).all())


def test_a_dataloader_is_predicted_as_the_model_does(classifier_file, folder):
    loader = DataLoader(TensorDataset(images(5), torch.arange(5)), 2)
    a, b = load_onnx(classifier_file).predict(loader), build("classifier").eval().predict(loader)
    assert (len(a) == len(b) == 5 and [o.label for o in a] == [o.label for o in b]
            and a[0].class_names == NAMES)
    close(torch.stack([o.probabilities for o in a]), torch.stack([o.probabilities for o in b]),
          1e-5)
    with pytest.raises(ValueError, match="A batch must hold normalised images"):
        load_onnx(classifier_file).predict(DataLoader([{"pixels": 1}]))


def test_a_task_that_is_not_known_is_said_before_predicting(tmp_path):
    config = build("classifier").data_config
    for task in ("detection", "depth"):
        path = export_to_onnx(nn.Conv2d(3, 4, 1), tmp_path / "a.onnx", images(2),
                              metadata={"task": task, "data_config": config})
        with pytest.raises(ValueError, match=f"for the task '{task}' is not known"):
            load_onnx(path).predict(np.zeros((64, 64, 3), np.uint8))


def test_a_file_with_fewer_outputs_does_not_agree(tmp_path):
    path = export_to_onnx(nn.ReLU(), tmp_path / "a.onnx", torch.randn(2, 3))
    class Both(nn.Module):
        def forward(self, x): return x.relu(), x.relu() + 1
    assert (validate_onnx_export(nn.ReLU(), path, torch.randn(2, 3))
            and not validate_onnx_export(Both(), path, torch.randn(2, 3)))


def test_eight_bits_of_bad_calibration(classifier_file, tmp_path):
    target, scenes = tmp_path / "q.onnx", [o.image for o in make_shapes(3, image_size=64)]
    with pytest.raises(ValueError, match="no image to predict"):
        quantize_onnx(classifier_file, target, calibration=[])
    with pytest.raises(ExportError, match="no image to calibrate"):
        quantize_onnx(classifier_file, target, calibration=torch.zeros(0, 3, 64, 64))
    with pytest.raises(ValueError, match="batch_size must be"):
        quantize_onnx(classifier_file, target, calibration=scenes, batch_size=0)
    with pytest.raises(ValueError, match="max_images must be"):
        quantize_onnx(classifier_file, target, calibration=scenes, max_images=0)
    with pytest.raises(ValueError, match="Image '.*none.png' cannot be read"):
        quantize_onnx(classifier_file, target, calibration=[tmp_path / "none.png"])
    with pytest.raises(ValueError, match="batches of images and labels, got dict"):
        quantize_onnx(classifier_file, target, evaluate=DataLoader([{"image": images(1)[0]}]))
    with pytest.raises(ValueError, match="known .*says None"):
        quantize_onnx(export_to_onnx(nn.Linear(4, 2), tmp_path / "plain.onnx", torch.randn(2, 4)),
                      target, evaluate=DataLoader([1]))
    assert not target.exists()
    # A generator is read twice: once to calibrate, once to measure.
    assert quantize_onnx(classifier_file, target, calibration=(o for o in scenes),
                         verbose=False).images == 3
    assert quantize_onnx(classifier_file, target, calibration=scenes[0], verbose=False).images == 1
    with pytest.raises(ValueError, match="in int8 already"):
        quantize_onnx(target, tmp_path / "r.onnx")


def test_eight_bits_of_a_fixed_batch_and_of_old_opsets(tmp_path):
    model = build("classifier")
    fixed = export_to_onnx(model, tmp_path / "fixed.onnx", images(4), dynamic_batch=False,
                           dynamic_size=False)
    assert quantize_onnx(fixed, tmp_path / "q.onnx", calibration=images(6),
                         verbose=False).images == 6
    old = export_to_onnx(model, tmp_path / "old.onnx", images(2), 11)
    with pytest.raises(ExportError, match="has opset 11, .* needs 13"):
        quantize_onnx(old, tmp_path / "q.onnx", calibration=images(6), verbose=False)
    assert quantize_onnx(old, tmp_path / "q.onnx", calibration=images(6), per_channel=False,
                         verbose=False).after > 0.5


@pytest.mark.parametrize(("name", "measure", "logged"),
                         [("segmentor", "mean IoU", "val/miou"), ("fcos", "mAP", "val/map"),
                          ("yolox", "mAP", "val/map"),
                                                         ("instances", "mAP", "val/mask_map")])
def test_eight_bits_of_dense_tasks(name, measure, logged, folder, tmp_path):
    "Measured as the trainer measures the model, on what the model itself says, shifted a little."
    if measure == "mAP": pytest.importorskip("pycocotools")
    model, x = build(name).eval(), images(4)
    path = folder / f"{name}_p.onnx"
    if not path.is_file(): export_to_onnx(model, path, postprocess=True, dynamic_size=False)
    truth = load_onnx(path, threads=1).results(x,
                                               torch.tensor([1.0, 1.0, 0, 0, 64, 64]).expand(4, 6))
    if name == "segmentor":
        samples = [{"image": a, "mask": o.mask.roll(4, 1).index_fill(0, torch.arange(8), 255)}
                   for a, o in zip(x, truth)]
    else:
        samples = [{"images": a, "boxes": (o.boxes + torch.tensor([0, 0, 0, 3])).clamp(max=64),
                    "labels": o.labels, **({"masks": o.masks} if name == "instances" else {})}
                     for a, o in zip(x, truth)]
    gather = lambda part: {k: torch.stack([o[k] for o in part]) if k in ("image", "images", "mask")
                           else [o[k] for o in part] for k in part[0]}
    loader = DataLoader(samples, 2, collate_fn=gather)
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False,
                         enable_model_summary=False, accelerator="cpu")
    expected = trainer.validate(model, loader, verbose=False)[0][logged]
    for how in ({}, {"calibration": x}):
        found = quantize_onnx(path, tmp_path / "q.onnx", evaluate=loader, threads=1,
                              verbose=False, **how)
        assert ((found.measure, found.images) == (measure, 4)
                and found.before == pytest.approx(expected, abs=0.01) and 0.2 < expected < 1)
        assert 0.5 * expected < found.after <= 1 and found.bytes_after < 0.5 * found.bytes_before
    # Without labels, also of a dynamic one.
    found = quantize_onnx(path, tmp_path / "q.onnx",
                          evaluate=[o.image for o in make_shapes(3, image_size=80)],
                          threads=1, verbose=False)
    assert (found.measure, found.images, found.kind) == ("agreement", 3,
                                                         "dynamic") and found.after > 0.5
    assert len(load_onnx(found.path).predict(make_shapes(1, image_size=80)[0].image)) == 1


def test_eight_bits_of_maps_without_masks_are_written_unmeasured(tmp_path):
    path = export_to_onnx(build("instances"), tmp_path / "a.onnx", dynamic_size=False)
    assert quantize_onnx(path, tmp_path / "q.onnx", calibration=images(2),
                         verbose=False).measure is None
