"""Prediction from whatever a user has: sources, preprocessing, broken files, modes, views, COCO,
calibration."""
import contextlib
import csv
import functools
import http.server
import io
import json
import os
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch.utils.data import DataLoader, TensorDataset

import autotimm
from autotimm import (AutoTrainer, BackboneConfig, DetectionDataModule, FeatureBackboneConfig,
                      ImageClassifier, ImageDataModule,
                      InstanceSegmentationDataModule, InstanceSegmentor, ObjectDetector,
                      SegmentationDataModule, SemanticSegmentor, YOLOXDetector)
from autotimm.data.images import BadImageError, load_image
from autotimm.testing import make_shapes, write_coco, write_folders, write_masks

POOLED, MAPS = (BackboneConfig("test_resnet", pretrained=False),
                FeatureBackboneConfig("test_resnet", pretrained=False))
quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False,
             enable_model_summary=False, accelerator="cpu")


def build(task: str, size: int = 64):
    "A small model of a task, with random weights."
    small = dict(image_size=size, fpn_channels=32, head_num_convs=1, score_thresh=0.0,
                 max_detections_per_image=5, seed=0)
    return {"classifier": lambda: ImageClassifier(POOLED, 3, image_size=size, seed=0),
            "several": lambda: ImageClassifier(POOLED, 3, multi_label=True, image_size=size,
                                               seed=0),
            "segmentor": lambda: SemanticSegmentor(MAPS, 3, "fcn", image_size=size, seed=0),
            "detector": lambda: ObjectDetector(MAPS, 3, **small),
            "yolox head": lambda: ObjectDetector(MAPS, 3, "yolox", **small),
            "yolox": lambda: YOLOXDetector("yolox-nano", 3, image_size=size, score_thresh=0.0,
                                           max_detections_per_image=5, seed=0),
            "instances": lambda: InstanceSegmentor(MAPS, 3, **small)}[task]()


TASKS = ["classifier", "several", "segmentor", "detector", "yolox head", "yolox", "instances"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> list[Path]:
    "The same scene as JPEG, PNG, grey, with alpha, turned by EXIF, 16 bits, tiny and very wide."
    root, scene = (tmp_path_factory.mktemp("photos"),
                   Image.fromarray(make_shapes(1, 120, seed=3)[0].image[:90]))
    turned = Image.Exif()
    turned[0x0112] = 6
    scene.save(root / "a.jpg", quality=95)
    scene.save(root / "b.png")
    scene.convert("L").save(root / "c.png")
    scene.convert("RGBA").save(root / "d.png")
    scene.save(root / "e.jpg", exif=turned)
    Image.fromarray(np.asarray(scene.convert("L")).astype(np.uint16) * 257).save(root / "f.png")
    scene.resize((3, 2)).save(root / "g.png")
    scene.resize((400, 5)).save(root / "h.webp")
    scene.convert("P").save(root / "i.gif")
    return sorted(root.iterdir())


@pytest.mark.parametrize("task", TASKS)
def test_files_of_every_kind_are_seen_as_evaluation_sees_them(task, photos):
    model = build(task)
    prepare, _ = model.plan_prediction()
    for path in photos:
        assert torch.equal(prepare(load_image(path))[0],
                           model.get_transform()(load_image(path))), path.name
    found = model.predict(photos[0].parent, batch_size=4)
    assert [o.name for o in found] == [str(o) for o in photos]
    for path, o in zip(photos, found):
        with Image.open(path) as image:
            width, height = (image.height, image.width) if path.name == "e.jpg" else image.size
        assert o.size == (height, width)
        if "mask" in o: assert tuple(o.mask.shape) == o.size
        if "masks" in o: assert tuple(o.masks.shape[1:]) == o.size
        if "boxes" in o:
            assert (o.boxes <= torch.tensor([width, height] * 2)).all() and len(o.boxes) <= 5
    alone = model.predict(photos[3])[0]
    for k in alone: assert torch.allclose(alone[k].float(), found[3][k].float(), atol=1e-4), k


@pytest.mark.parametrize("task", TASKS)
def test_it_leaves_the_model_as_it_was_and_able_to_learn(task, photos):
    model = build(task).train()
    model.backbone.eval()
    modes = {n: o.training for n, o in model.named_modules()}
    kinds = {k: v.is_inference() for k, v in model.state_dict().items()}
    model.predict(photos[:2])
    model.predict(torch.randn(1, 3, 64, 64))
    with pytest.raises(BadImageError): model.predict([*photos[:2], b"junk"], batch_size=2)
    assert modes == {n: o.training for n, o in model.named_modules()}
    assert (kinds == {k: v.is_inference() for k, v in model.state_dict().items()}
            and not any(kinds.values()))
    assert torch.is_grad_enabled()
    model.train()
    out = model(torch.randn(2, 3, 64, 64))
    flat = [out] if isinstance(out, torch.Tensor) else [o for part in out for o in part]
    sum(o.square().mean() for o in flat).backward()


@pytest.mark.parametrize("name", ["levit_128s", "test_vit2", "swinv2_cr_tiny_ns_224",
                                  "vit_small_patch16_rope_224", "test_efficientnet_evos"])
def test_what_a_network_keeps_from_prediction_does_not_last(name):
    """LeViT keeps its attention bias in eval mode, others their positions: a step in between must
    change what is predicted after it."""
    size = 224 if "224" in name or "levit" in name else 64
    model = ImageClassifier(BackboneConfig(name, pretrained=False), 2, image_size=size, seed=0)
    image = make_shapes(1, 64)[0].image
    before = model.predict(image)[0].probabilities
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    torch.nn.functional.cross_entropy(model(torch.randn(2, 3, size, size)),
                                      torch.tensor([0, 1])).backward()
    optimizer.step()
    after = model.predict(image)[0].probabilities
    fresh = ImageClassifier(**model.hparams)
    fresh.load_state_dict(model.state_dict())
    assert not torch.equal(before, after)
    assert torch.allclose(fresh.predict(image)[0].probabilities, after, atol=1e-6)


def test_every_source_gives_the_same(photos):
    model, path = build("classifier"), photos[1]
    array = np.asarray(Image.open(path))
    sources = [path, str(path), path.read_bytes(), bytearray(path.read_bytes()),
               Image.open(path), array, torch.from_numpy(array).permute(2, 0, 1),
               [path], (str(path),), str(path.parent / "b.*"), pd.Series([str(path)]),
               np.array([str(path)]), {"bytes": path.read_bytes(), "path": None},
               array[None], iter([path]), (o for o in [path])]
    said = [model.predict(o)[0].probabilities for o in sources]
    assert all(torch.equal(o, said[0]) for o in said)
    ragged = model.predict([array, array[:50]])
    assert [o.name for o in ragged] == ["image 0", "image 1"] and ragged[1].size == (50, 120)
    with pytest.raises(BadImageError, match="does not exist"): model.predict("no_such_file.jpg")
    with pytest.raises(TypeError, match="frame\\['path'\\]"):
        model.predict(pd.DataFrame({"file": [str(path)]}))
    for wrong in (None, 3, object()):
        with pytest.raises(TypeError, match="An image is a path, URL"): model.predict(wrong)
    with pytest.raises(ValueError, match="no image"): model.predict([])


class Photos(http.server.SimpleHTTPRequestHandler):
    "Serves a folder, but for what is to go wrong."
    def log_message(self, *_): pass

    def do_GET(self):
        if self.path.startswith("/short"):
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"\xff\xd8" + b"0" * 100)
        else: super().do_GET()


def test_urls_are_fetched_and_their_secrets_kept(photos):
    handler = functools.partial(Photos, directory=str(photos[0].parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        base = f"http://127.0.0.1:{server.server_address[1]}"
        model = build("classifier")
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = model.predict([f"{base}/b.png?token=hush", f"{base}/none.png?token=hush",
                                   f"{base}/short.jpg"], on_bad_image="report")
        server.shutdown()
        thread.join()
    assert [o.name for o in found] == [f"{base}/b.png"]
    assert torch.equal(found[0].probabilities, model.predict(photos[1])[0].probabilities)
    assert found.bad == {f"{base}/none.png": "the server answered 404",
                         f"{base}/short.jpg": "the connection broke after 102 of 1000 bytes"}
    assert "hush" not in found.to_json() + found.to_csv() + "".join(str(o.message) for o in said)


def test_ten_thousand_files_and_one_is_broken(tmp_path):
    "It finishes, and names the one; files are links to a few, so that the test is quick."
    scenes = make_shapes(16, 32, max_objects=1)
    first = []
    for i, scene in enumerate(scenes):
        first.append(tmp_path / f"{i:05d}.png")
        Image.fromarray(scene.image).save(first[-1])
    for i in range(16, 10_000): os.link(first[i % 16], tmp_path / f"{i:05d}.png")
    broken = tmp_path / "05000.png"
    broken.unlink()
    broken.write_bytes(first[0].read_bytes()[:200])
    model = build("classifier", 32)
    with pytest.warns(UserWarning, match="1 image left out"):
        found = model.predict(tmp_path, batch_size=250, on_bad_image="report")
    assert len(found) == 9_999 and list(found.bad) == [str(broken)]
    assert torch.equal(found[16].probabilities, found[32].probabilities)
    found.to_csv(tmp_path / "out.csv")
    with open(tmp_path / "out.csv", newline="") as file: rows = list(csv.DictReader(file))
    assert len(rows) == 10_000 and [o["name"] for o in rows if o["error"]] == [str(broken)]
    with pytest.raises(BadImageError, match=r"05000\.png.*on_bad_image"):
        model.predict(tmp_path, batch_size=250)


@pytest.mark.parametrize("masks", [False, True])
def test_what_is_written_as_coco_scores_as_validation_says(tmp_path, masks):
    root = write_coco(tmp_path, splits=dict(train=8, val=8), image_size=96)
    module = InstanceSegmentationDataModule if masks else DetectionDataModule
    data = module(root, image_size=64, batch_size=4, num_workers=0)
    task = InstanceSegmentor if masks else ObjectDetector
    model = task(MAPS, 3, image_size=64, fpn_channels=32, head_num_convs=1, lr=2e-3, seed=0)
    trainer = AutoTrainer(max_epochs=8, default_root_dir=tmp_path, checkpoint_monitor=None,
                          **{k: v for k, v in quiet.items() if k != "enable_checkpointing"})
    trainer.fit(model, datamodule=data)
    logged = trainer.validate(model, datamodule=data, verbose=False)[0]
    annotations = root / "annotations" / "instances_val.json"
    found = model.predict(root / "val")
    coco = found.to_coco(tmp_path / "found.json", like=annotations)
    assert json.loads((tmp_path / "found.json").read_text()) == coco
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        for kind, name in (("bbox", "val/map"), ("segm", "val/mask_map"))[:1 + masks]:
            run = COCOeval(truth, truth.loadRes(coco["annotations"]), kind)
            run.evaluate()
            run.accumulate()
            run.summarize()
            assert abs(max(run.stats[0], 0) - max(logged[name], 0)) < 1e-4 and logged[name] > 0, (
                kind, run.stats[0], logged)
    both = model.predict(root / "val", tta="flip")
    assert len(both) == len(found) and all(len(o.labels) <= 100 for o in both)
    from_loader = model.predict(data.val_dataloader())
    for a, b in zip(from_loader, found):
        assert (Path(a.name).name == Path(b.name).name
                and torch.allclose(a.boxes, b.boxes, atol=1e-2))
    found.plot(max_images=2)


def test_views_are_means_and_masks_of_mirror_images_lie_right(tmp_path, photos):
    model = build("classifier")
    image = load_image(photos[1])
    x, _ = model.plan_prediction()[0](image)
    with torch.no_grad(): by_hand = model.eval()(torch.stack([x, x.flip(-1)])).softmax(-1).mean(0)
    assert torch.allclose(model.predict(photos[1], tta="flip")[0].probabilities, by_hand, atol=1e-6)
    crops, _ = model.plan_prediction("multicrop")[0](image)
    with torch.no_grad(): by_hand = model(crops).softmax(-1).mean(0)
    assert torch.allclose(model.predict(photos[1], tta="multicrop")[0].probabilities,
                          by_hand, atol=1e-6)
    root = write_masks(tmp_path, splits=dict(train=2, val=2), image_size=64)
    segmentor = build("segmentor")
    path = next((root / "images").rglob("*.png"), None) or next(root.rglob("*.png"))
    picture = Image.open(path).convert("RGB")
    there = segmentor.predict(picture, tta="flip")[0].mask
    mirrored = segmentor.predict(picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
                                 tta="flip")[0].mask
    # Two views of an image are those of its mirror image
    assert (there == mirrored.flip(-1)).float().mean() > 0.99


@pytest.mark.parametrize("task", ["detector", "segmentor", "instances", "yolox"])
def test_ten_crops_are_for_classifiers(task, photos):
    with pytest.raises(ValueError, match="'multicrop' not found"):
        build(task).predict(photos[0], tta="multicrop")


def test_probabilities_become_as_sure_as_they_are_right(tmp_path):
    data = ImageDataModule(write_folders(tmp_path, splits=dict(train=60, val=150), image_size=32,
                                         max_objects=2), image_size=32, num_workers=0)
    model = ImageClassifier(POOLED, 3, image_size=32, lr=3e-3, seed=0)
    AutoTrainer(max_epochs=25, default_root_dir=tmp_path / "runs", checkpoint_monitor=None,
                **{k: v for k, v in quiet.items()
                   if k != "enable_checkpointing"}).fit(model, datamodule=data)
    files = [o.image for o in data.splits.val]
    model.train()
    before = model.predict(files)
    told = model.calibrate(data)
    after = model.predict(files)
    assert model.training and data.trainer is not None
    assert [o.label for o in before] == [o.label for o in after]
    assert told.loss_after < told.loss_before and told.error_after < told.error_before + 0.01
    sharp = [(o.probabilities.log() / told.temperature).softmax(-1) for o in before]
    assert all(torch.allclose(a, o.probabilities, atol=1e-4) for a, o in zip(sharp, after))
    with pytest.raises(NotImplementedError, match="score_thresh"): build("detector").calibrate(data)


def test_what_is_refused(photos):
    model = build("classifier")
    for wrong, message in ((dict(batch_size=0), "batch_size"),
                           (dict(num_workers=-1), "num_workers"),
                           (dict(precision="int3"), "Precision 'int3'"),
                           (dict(on_bad_image="hide"), "on_bad_image 'hide'"),
                           (dict(top_k="all"), "top_k")):
        with pytest.raises(ValueError, match=message): model.predict(photos, **wrong)
    with pytest.raises(ValueError, match="normalised batch"):
        build("segmentor").predict(photos, return_logits=True)
    with pytest.raises(TypeError, match="no_such"): model.predict(photos, no_such=1)
    assert isinstance(autotimm.Results, type)


def test_threads_that_predict_at_once_leave_a_model_that_trains_as_it_was(photos):
    model = build("classifier").train()
    expected = torch.stack([o.probabilities for o in model.predict(photos)])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: torch.stack([o.probabilities
                                                     for o in model.predict(
                                                         photos, batch_size=3, num_workers=0)]),
                              range(12)))
    assert all(torch.allclose(o, expected, atol=1e-5) for o in found)
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_broken_file_of_a_loader_does_not_take_the_names_of_the_others(tmp_path):
    root = write_folders(tmp_path, splits=dict(train=6, val=6), image_size=40)
    files = sorted(map(str, (root / "val").rglob("*.png")))
    Path(files[2]).write_bytes(b"junk")
    data = ImageDataModule(root, image_size=64, num_workers=0, batch_size=4, on_bad_image="report",
                           backbone="test_resnet")
    data.setup("fit")
    with pytest.warns(UserWarning, match="left out"):
        found = build("classifier").predict(data.val_dataloader())
    assert [o.name for o in found] == files[:2] + files[3:] and list(found.bad) == [files[2]]
    masks = SegmentationDataModule(write_masks(tmp_path / "masks", splits=dict(train=2, val=2),
                                               image_size=48), image_size=64, num_workers=0)
    masks.setup("fit")
    assert [o.size for o in build("segmentor").predict(masks.val_dataloader())] == [(48, 48)] * 2


def test_calibration_scales_both_heads_and_leaves_no_trainer():
    model = ImageClassifier(BackboneConfig("repvit_m1", pretrained=False), 3, image_size=64, seed=0)
    for p in model.head.parameters(): torch.nn.init.normal_(p, std=0.1)
    x, y = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 0])
    with torch.no_grad(): before = model.eval()(x)
    model.train()
    told = model.calibrate(DataLoader(TensorDataset(x, y), batch_size=4))
    assert model._trainer is None and model.training
    with torch.no_grad():
        assert torch.allclose(model.eval()(x), before / told.temperature, atol=1e-5)


def test_a_column_that_decodes_is_read_one_by_one(photos):
    datasets = pytest.importorskip("datasets")
    rows = [{"bytes": photos[1].read_bytes(), "path": None}, {"bytes": b"junk", "path": None}]
    column = datasets.Dataset.from_dict({"image": rows}).cast_column("image",
                                                                     datasets.Image())["image"]
    if isinstance(column, list): pytest.skip("this version of datasets decodes a column at once")
    model = build("classifier")
    with pytest.warns(UserWarning, match="left out"):
        found = model.predict(column, on_bad_image="report")
    assert torch.equal(found[0].probabilities,
                       model.predict(photos[1])[0].probabilities) and list(found.bad) == ["image 1"]
