"""Backbones from the Hub: the real clients over HTTP against LocalHub, faults and a missing network
included."""
import json
import socket
import subprocess
import sys
import threading
import time
import warnings

import pytest
import timm
import torch
import huggingface_hub
from huggingface_hub import constants, snapshot_download
from hf_routes import HAS_TRANSFORMERS

from autotimm.backbones import (Backbone, BackboneConfig, FeatureBackboneConfig,
                                HubAccessError, HubCorruptError, HubError,
                                HubNotFoundError, HubOfflineError, ModelSource, create_backbone,
                                create_feature_backbone,
                                get_feature_channels, get_feature_strides, get_model_source,
                                list_backbones,
                                list_hf_hub_backbones)
from autotimm.testing import LocalHub

TOKEN = "hf_secret_of_this_test"
VIT = dict(hidden_size=48, num_hidden_layers=3, num_attention_heads=3, intermediate_size=64,
           image_size=64, patch_size=16)
needs_transformers = pytest.mark.skipif(not HAS_TRANSFORMERS,
                                        reason="transformers is not installed")


@pytest.fixture(scope="module")
def hub():
    "A Hub with a few tiny models."
    with LocalHub(token=TOKEN) as hub:
        hub.add_timm("timm/resnet50.a1_in1k", "test_resnet", num_classes=10)
        hub.add_timm("timm/test_resnet.r160_in1k", "test_resnet.r160_in1k")
        hub.add_timm("me/vit", "test_vit", num_classes=5, img_size=96, in_chans=1, tag="v1")
        hub.add_timm("me/private", "test_convnext", private=True)
        hub.add_timm("me/gated", "test_convnext", gated=True)
        yield hub


@pytest.fixture
def faulty(hub):
    "The same, its faults cleared afterwards."
    yield hub
    hub.clear_faults()


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def refused(call, kind, *parts) -> str:
    """The message of the error that `call` raises; it must be of `kind`, hold all `parts`, and no
    token."""
    with pytest.raises(kind) as e: call()
    message = str(e.value)
    for part in parts: assert part in message, message
    assert TOKEN not in message
    return message


@pytest.mark.parametrize("name", ["hf-hub:timm/resnet50.a1_in1k", "hf_hub:timm/resnet50.a1_in1k",
                                  "timm/resnet50.a1_in1k",
                                  "timm/resnet50.a1_in1k@main"])
def test_every_way_to_write_a_timm_id(hub, name):
    b = create_backbone(name).eval()
    assert (b.library, b.source, b.name, b.num_features) == ("timm", ModelSource.HF_HUB, name, 96)
    assert b.commit == hub.repos["timm/resnet50.a1_in1k"].branches["main"]
    model, x = timm.create_model("hf-hub:timm/resnet50.a1_in1k", pretrained=True,
                                 num_classes=0).eval(), torch.randn(2, 3, 160, 160)
    assert torch.equal(b(x), model(x))


def test_a_plain_timm_name_has_the_weights_of_its_repository(hub):
    b = create_backbone("test_resnet").eval()
    model, x = timm.create_model("test_resnet", pretrained=True,
                                 num_classes=0).eval(), torch.randn(2, 3, 160, 160)
    assert torch.equal(b(x), model(x))
    assert (b.source is ModelSource.TIMM and b.commit
            == hub.repos["timm/test_resnet.r160_in1k"].branches["main"])


def test_the_revision_decides(hub):
    first = hub.repos["me/vit"].tags["v1"]
    hub.add_timm("me/moving", "test_vit", num_classes=5, tag="v1", seed=1)
    hub.add_timm("me/moving", "test_vit", num_classes=5, seed=2)
    old, new = create_backbone("me/moving@v1"), create_backbone("me/moving")
    assert (old.commit == hub.repos["me/moving"].tags["v1"] != new.commit
            == hub.repos["me/moving"].branches["main"])
    assert not torch.equal(next(old.parameters()), next(new.parameters()))
    by_commit = create_backbone(f"me/moving@{old.commit}")
    assert all(torch.equal(a, b) for a, b in zip(old.parameters(), by_commit.parameters(),
                                                 strict=True))
    assert create_backbone("me/vit@v1").commit == first
    refused(lambda: create_backbone("me/vit@v9"), HubNotFoundError, "'v9'", "me/vit")


def test_the_repository_states_size_and_channels(hub):
    b = create_backbone("me/vit")
    assert b.data_config["input_size"] == (1, 96, 96) and len(b.data_config["mean"]) == 1
    assert b(torch.zeros(2, 1, 96, 96)).shape == (2, b.num_features)
    colour = create_backbone("me/vit", in_chans=3, image_size=64)
    assert colour.data_config["input_size"] == (3, 64, 64) and len(colour.data_config["std"]) == 3
    assert colour(torch.zeros(2, 3, 64, 64)).shape == (2, b.num_features)


def test_config_fields_are_honoured(hub):
    random = create_backbone(BackboneConfig("me/vit", pretrained=False, drop_path_rate=0.3))
    assert not torch.equal(random.model.cls_token, create_backbone("me/vit").model.cls_token)
    assert max(m.drop_prob for m in random.modules()
               if hasattr(m, "drop_prob")) == pytest.approx(0.3)
    maps = create_feature_backbone(FeatureBackboneConfig("timm/resnet50.a1_in1k",
                                                         out_indices=(1, -1)))
    assert (get_feature_strides(maps) == [4, 32]
            and get_feature_channels(maps) == [o.shape[1] for o in maps(torch.zeros(1, 3, 64, 64))])
    refused(lambda: create_backbone(BackboneConfig("me/vit", extra_kwargs={"colour": 1})),
            ValueError, "colour=1")
    weights_asked_for = [p for m, p in hub.requests if "model.safetensors" in p]
    create_backbone("timm/resnet50.a1_in1k", pretrained=False)
    assert [p for m, p in hub.requests if "model.safetensors" in p] == weights_asked_for


def test_a_spec_needs_no_hub(hub, monkeypatch):
    b = create_backbone("me/vit").eval()
    asked = len(hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    same = Backbone.from_spec(json.loads(json.dumps(b.to_spec()))).eval()
    same.load_state_dict(b.state_dict())
    x = torch.randn(2, 1, 96, 96)
    assert torch.equal(b(x), same(x)) and len(hub.requests) == asked
    assert (same.commit, same.name, same.source) == (b.commit, b.name, b.source)
    assert str(hub.cache) not in json.dumps(b.to_spec())


@needs_transformers
def test_the_config_decides_for_transformers(hub):
    import transformers
    hub.add_transformers("google/vit", transformers.ViTForImageClassification(
        transformers.ViTConfig(**VIT, num_labels=7)))
    b = create_backbone("google/vit").eval()
    assert (b.library, b.source) == ("transformers", ModelSource.HF_HUB) and b.training is False
    x = torch.randn(2, 3, 64, 64)
    model = transformers.AutoModelForImageClassification.from_pretrained("google/vit").eval()
    assert torch.allclose(model.classifier(b(x)), model(x).logits, atol=1e-6)
    assert b.data_config["mean"] == (0.5, 0.5, 0.5)
    assert (create_backbone("hf-hub:google/vit@main").commit
            == hub.repos["google/vit"].branches["main"])


@needs_transformers
def test_the_processor_of_the_repository_is_used(hub):
    import transformers
    processor = dict(image_processor_type="ViTImageProcessor", do_resize=True,
                     size={"shortest_edge": 80}, do_center_crop=True,
                     crop_size={"height": 64, "width": 64}, do_normalize=True,
                     image_mean=[0.1, 0.2, 0.3],
                     image_std=[0.4, 0.5, 0.6], resample=3)
    hub.add_transformers("google/cropped", transformers.ViTConfig(**VIT), processor=processor)
    assert create_backbone("google/cropped").data_config == dict(
        input_size=(3, 64, 64), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), interpolation="bicubic",
        crop_pct=0.8,
        crop_mode="center")


@needs_transformers
def test_a_processor_that_squashes_and_crops(hub):
    import numpy as np
    import transformers
    from PIL import Image

    from autotimm import ImageClassifier
    processor = dict(image_processor_type="DeiTImageProcessor", size={"height": 80, "width": 80},
                     crop_size={"height": 64, "width": 64}, resample=3)
    hub.add_transformers("facebook/deit", transformers.DeiTConfig(**VIT), processor=processor)
    picture = Image.effect_mandelbrot((150, 90), (-3, -2.5, 2, 2.5), 100).convert("RGB")
    model = ImageClassifier(create_backbone("facebook/deit"), 3)
    theirs = transformers.AutoImageProcessor.from_pretrained("facebook/deit")(
        picture, return_tensors="np").pixel_values[0]
    assert (np.abs(model.preprocess(picture)[0].numpy() - theirs).max() < 1.01 / 255
            / min(model.data_config["std"]))


@needs_transformers
def test_only_the_vision_tower_of_a_clip(hub):
    import transformers
    tower = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=64)
    hub.add_transformers("openai/clip", transformers.CLIPModel(transformers.CLIPConfig(
        vision_config={**tower, "image_size": 64, "patch_size": 16},
        text_config={**tower, "vocab_size": 100})))
    b, x = create_backbone("openai/clip").eval(), torch.randn(2, 3, 64, 64)
    model = transformers.CLIPModel.from_pretrained("openai/clip").eval()
    assert torch.allclose(b(x), model.vision_model(x).pooler_output, atol=1e-6)
    assert not any("text" in n for n, _ in b.named_parameters())


def test_a_folder_wins_over_a_hub_id(hub, tmp_path, monkeypatch):
    folder = snapshot_download("me/vit")
    (tmp_path / "me").mkdir()
    (tmp_path / "me" / "vit").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    asked = len(hub.requests)
    b = create_backbone("me/vit")
    assert (b.source, b.library, b.commit) == (ModelSource.LOCAL, "timm",
                                               None) and len(hub.requests) == asked
    assert create_backbone("hf-hub:me/vit").source is ModelSource.HF_HUB
    assert get_model_source("me/vit") is ModelSource.HF_HUB
    spec = json.dumps(create_backbone(f"local-dir:{folder}").to_spec())
    assert str(tmp_path) not in spec and folder not in spec


def test_private_and_gated(hub, monkeypatch):
    refused(lambda: create_backbone("me/private"), HubAccessError, "me/private", "HF_TOKEN")
    refused(lambda: create_backbone("me/gated"), HubAccessError, "gated", "HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert (create_backbone("me/private").num_features == create_backbone("me/gated").num_features
            == 64)


def test_a_wrong_token(faulty, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    faulty.fault("401", "me/vit")
    refused(lambda: create_backbone("me/vit"), HubAccessError, "token", "401")


@pytest.mark.parametrize(("name", "near"), [("timm/resnet50.a1_in1", "timm/resnet50.a1_in1k"),
                                            ("me/privat", "me/vit")])
def test_no_such_repository_names_near_ones(hub, name, near):
    message = refused(lambda: create_backbone(name), HubNotFoundError, name, "not found",
                      "list_backbones")
    assert near in message or name == "me/privat"
    with pytest.raises(ValueError, match="not found"): create_backbone("resnet51", pretrained=True)


@pytest.mark.parametrize(("files", "part"), [
    ({"config.json": "{oops", "model.safetensors": b"x"}, "not valid JSON"),
    ({"config.json": "[]", "model.safetensors": b"x"}, "JSON object"),
    ({"config.json": "{}", "model.safetensors": b"x"},
     "neither 'architecture' (timm) nor 'model_type'"),
    ({"config.json": '{"architecture": "resnet5000"}', "model.safetensors": b"x"}, "resnet50"),
    ({"config.json": '{"architecture": "test_vit"}', "model.safetensors": b"x"}, "cut or broken"),
    ({"config.json": '{"architecture": "test_vit"}'}, "no weights"),
    ({"config.json": '{"architecture": "test_vit"}', "pytorch_model.bin": b"x"},
     "weights_format='bin'"),
    ({"README.md": "# Model"}, "no config.json"),
])
def test_what_is_no_model(hub, files, part, request):
    name = f"bad/repo{abs(hash(request.node.name))}"
    hub.add_files(name, files)
    refused(lambda: create_backbone(name), HubCorruptError, name, part)


@needs_transformers
def test_no_code_of_a_repository_is_run(hub):
    hub.add_files("evil/model", {"config.json": json.dumps({"model_type": "evil",
                                                            "auto_map": {"AutoModel": "code.Evil",
                  "AutoConfig": "code.EvilConfig"}}), "code.py": "raise SystemExit('run')",
                                 "model.safetensors": b"x"})
    refused(lambda: create_backbone("evil/model"), HubCorruptError, "'evil'", "not run")
    assert not any("code.py" in path for _, path in hub.requests)


def test_weights_that_do_not_fit(hub, tmp_path):
    folder = snapshot_download("timm/resnet50.a1_in1k")
    weights = open(f"{folder}/model.safetensors", "rb").read()
    hub.add_files("bad/fit", {"config.json": '{"architecture": "test_convnext", "pretrained_cfg": '
                                             '{}}', "model.safetensors": weights})
    refused(lambda: create_backbone("bad/fit"), HubCorruptError, "bad/fit", "do not fit")


def test_a_pickle_on_request_only(hub, tmp_path):
    model = timm.create_model("test_vit", num_classes=0)
    torch.save(model.state_dict(), tmp_path / "weights.bin")
    config = json.dumps({"architecture": "test_vit", "num_classes": 0,
                         "pretrained_cfg": {"num_classes": 0, "input_size": [3, 160, 160]}})
    hub.add_files("old/pickle", {"config.json": config,
                                 "pytorch_model.bin": (tmp_path / "weights.bin").read_bytes()})
    refused(lambda: create_backbone("old/pickle"), HubCorruptError, "pickle")
    b = create_backbone(BackboneConfig("old/pickle", weights_format="bin"))
    assert torch.equal(b.model.cls_token, model.cls_token)
    torch.save({"code": Backbone}, tmp_path / "code.bin")
    hub.add_files("old/code", {"config.json": config,
                               "pytorch_model.bin": (tmp_path / "code.bin").read_bytes()})
    refused(lambda: create_backbone(BackboneConfig("old/code", weights_format="bin")),
            HubCorruptError, "more than tensors")


def test_a_body_cut_once_is_resumed(faulty):
    faulty.add_timm("cut/once", "test_vit")
    faulty.fault("cut", "cut/once", file="model.safetensors", times=1)
    assert create_backbone("cut/once").num_features == 64


def test_a_file_cut_on_the_server(faulty):
    faulty.add_timm("cut/short", "test_vit")
    faulty.fault("short", "cut/short", file="model.safetensors")
    refused(lambda: create_backbone("cut/short"), HubCorruptError, "cut or broken",
            "fetch it again")


def test_a_server_error_says_so(faulty):
    faulty.add_timm("me/busy", "test_vit")
    faulty.fault("500", "me/busy")
    refused(lambda: create_backbone("me/busy"), HubError, "500")


def test_a_server_error_on_the_weights_says_so(faulty, monkeypatch):
    "The client tries again for half a minute, and then reports a file that is not in the cache."
    monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda seconds: None)
    faulty.add_timm("me/half", "test_vit")
    faulty.fault("500", "me/half", file="model.safetensors")
    refused(lambda: create_backbone("me/half"), HubError, "answered 500")


def test_cached_and_offline(hub, monkeypatch):
    before = create_backbone("me/vit@v1"), create_backbone("test_resnet")
    asked = len(hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        after = create_backbone("me/vit@v1"), create_backbone("test_resnet")
    assert [b.commit for b in after] == [b.commit for b in before] and len(hub.requests) == asked
    for b, a in zip(before, after, strict=True):
        assert torch.equal(next(a.parameters()), next(b.parameters()))


def test_offline_and_not_cached(hub, offline):
    for name in ["me/unseen", "test_vit", "hf-hub:me/never"]:
        refused(lambda name=name: create_backbone(name), HubOfflineError, "HF_HUB_OFFLINE",
                "list_backbones")
    refused(lambda: list_hf_hub_backbones(), RuntimeError, "HF_HUB_OFFLINE")
    assert create_backbone("test_vit", pretrained=False).num_features == 64


def test_a_dead_network_with_a_full_cache(faulty):
    commit = create_backbone("me/vit").commit
    faulty.fault("down")
    with pytest.warns(UserWarning, match="from the cache"):
        assert create_backbone("me/vit").commit == commit
    start = time.perf_counter()
    refused(lambda: create_backbone("me/other"), HubOfflineError, "me/other", "HF_HUB_OFFLINE=1")
    assert time.perf_counter() - start < 5


def closed_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{s.getsockname()[1]}"


@pytest.mark.parametrize("endpoint", [None, "http://no-such-host.invalid"],
                         ids=["refused", "unresolved"])
def test_refused_and_unresolved_are_noticed_soon(hub, monkeypatch, endpoint):
    endpoint = endpoint or closed_port()
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    for call in (lambda: create_backbone("me/other"), lambda: create_backbone("test_vit"),
                 list_hf_hub_backbones):
        start = time.perf_counter()
        refused(call, HubOfflineError, endpoint)
        assert time.perf_counter() - start < 5


def test_vanishing_packets_are_noticed(hub, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        results: list[float] = []
        def measure(call) -> None:
            start = time.perf_counter()
            refused(call, HubOfflineError, "127.0.0.1")
            results.append(time.perf_counter() - start)
        threads = [threading.Thread(target=measure, args=(o,))
                   for o in (lambda: create_backbone("me/x"), list_hf_hub_backbones)]
        for t in threads: t.start()
        for t in threads: t.join()
    assert len(results) == 2 and max(results) < 15


def test_listing(hub):
    found = list_hf_hub_backbones()
    assert set(found) == {"hf-hub:timm/resnet50.a1_in1k", "hf-hub:timm/test_resnet.r160_in1k"}
    assert (list_hf_hub_backbones(model_name="resnet50", with_source=True)
            == [("hf-hub:timm/resnet50.a1_in1k", ModelSource.HF_HUB)])
    assert len(list_hf_hub_backbones(author="me", limit=1)) == 1
    assert create_backbone(found[0]).num_features > 0
    assert ("resnet50" in list_backbones("resnet*")
            and list_backbones("resnet50", with_source=True) == [("resnet50", ModelSource.TIMM)])
    assert all("." in o for o in list_backbones("resnet18*", pretrained_only=True))


def test_a_timm_id_never_imports_transformers(tmp_path):
    code = """
import sys
sys.modules["transformers"] = None          # any import of it fails
from autotimm.testing import LocalHub
from autotimm.backbones import create_backbone, create_feature_backbone, list_hf_hub_backbones
import torch
with LocalHub() as hub:
    hub.add_timm("org/net", "test_resnet", num_classes=3)
    b = create_backbone("hf-hub:org/net")
    assert b(torch.zeros(2, 3, 64, 64)).shape == (2, 96)
    assert len(create_feature_backbone("org/net")(torch.zeros(1, 3, 64, 64))) == 4
    assert list_hf_hub_backbones(author="org") == ["hf-hub:org/net"]
    del sys.modules["transformers"]
print("transformers" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          cwd=tmp_path, timeout=300)
    assert done.returncode == 0 and done.stdout.strip().endswith("False"), done.stdout + done.stderr
