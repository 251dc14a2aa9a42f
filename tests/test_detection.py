"""Detection and instance segmentation through AutoTrainer: the numbers are pycocotools';
checkpoint, resume, precision, two processes."""
import contextlib
import importlib.util
import io
import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from autotimm import (AutoTrainer, DetectionDataModule, FeatureBackboneConfig,
                      InstanceSegmentationDataModule, InstanceSegmentor, LoggerConfig,
                      LoggingConfig, MetricConfig, ObjectDetector, TunerConfig, YOLOXDetector)
from autotimm.testing import LocalHub, make_shapes, mask_to_polygons, mask_to_rle

QUIET = dict(accelerator="cpu", enable_progress_bar=False, enable_model_summary=False)
SMALL = FeatureBackboneConfig("test_resnet", pretrained=False)
IDS = (3, 7, 90)                                            # of the categories
SIZES = ((96, 70), (64, 96), (96, 96), (50, 90), (81, 47))  # height, width
KINDS = ("fcos", "yolox", "darknet", "masks")


def write(root: Path, **splits: int) -> Path:
    """A COCO data set: images of several shapes, ids with gaps, crowds, boxes between pixels, and a
    last image without objects."""
    for k, (split, n) in enumerate(splits.items()):
        (root / split).mkdir(parents=True)
        table: dict[str, list] = dict(images=[], annotations=[],
                                      categories=[dict(id=i, name=o)
                                                  for i, o in zip(IDS, ("circle", "square",
                                                                        "triangle"))])
        for i, scene in enumerate(make_shapes(n, 96, seed=(5, k))):
            (h, w), number = SIZES[i % 5], 1000 * k + 7 * i + 3
            Image.fromarray(scene.image[:h, :w]).save(root / split / f"{number}.png")
            table["images"].append(dict(id=number, file_name=f"{number}.png", height=h, width=w))
            for j, (label, mask) in enumerate(zip(scene.labels, scene.masks[:, :h, :w])):
                if mask.sum() < 20 or i == n - 1: continue
                y, x = (np.flatnonzero(mask.any(o)) for o in (1, 0))
                crowd = i % 6 == 1 and j == 0
                table["annotations"].append(dict(
                    id=len(table["annotations"]) + 1, image_id=number, category_id=IDS[label],
                    iscrowd=int(crowd), area=float(mask.sum()),
                    bbox=[x[0] + 0.25, y[0] + 0.125, x[-1] - x[0] + 0.7, y[-1] - y[0] + 0.8],
                    segmentation=mask_to_rle(mask) if crowd else mask_to_polygons(mask)))
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{split}.json").write_text(
            json.dumps(table, default=float))
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("coco"), train2017=8, val2017=8)


def build(kind: str, num_classes: int = 3, backbone=SMALL, **kwargs):
    """A small model; kind is one of KINDS: FCOS, the head of YOLOX on any backbone, YOLOX as
    published, masks."""
    if kind == "darknet":
        return YOLOXDetector("yolox-nano", num_classes, **{"image_size": 64, "lr": 3e-3,
                                                           "ema_decay": None, "seed": 0, **kwargs})
    small = {"image_size": 64, "fpn_channels": 32, "head_num_convs": 1, "lr": 3e-3,
             "seed": 0, **kwargs}
    if kind == "masks":
        return InstanceSegmentor(backbone, num_classes, **{"masks_per_image": 8, **small})
    return ObjectDetector(backbone, num_classes, kind, **small)


def data(kind: str, folder: Path, **kwargs):
    return (InstanceSegmentationDataModule if kind == "masks" else DetectionDataModule)(
        folder, **{"image_size": 64, "batch_size": 4, "num_workers": 0, **kwargs})


def train(kind: str, folder: Path, root: Path, epochs: int = 1, model=None, loaders=None,
          path=None, mixing=None, **kwargs):
    "A trainer after a fit, and its model."
    trainer = AutoTrainer(max_epochs=epochs, default_root_dir=root,
                          **{"seed": 3, **QUIET, **kwargs})
    model = model or build(kind)
    trainer.fit(model, datamodule=loaders or data(kind, folder, **(mixing or {})), ckpt_path=path)
    return trainer, model


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten().double() for p in model.state_dict().values()])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "An instance segmentor that has learned a little, its trainer and its data."
    root = write(tmp_path_factory.mktemp("learned"), train2017=60, val2017=16)
    trainer, model = train("masks", root, root / "run", 6, build("masks", lr=6e-3),
                           mixing={"augmentation_preset": "light"},
                           check_val_every_n_epoch=2, checkpoint_monitor="val/map",
                           checkpoint_mode="max", gradient_clip_val=10.0)
    return trainer, model, root


# The numbers

def coco_numbers(model, root: Path, kind: str) -> np.ndarray:
    "What pycocotools says of a model's answers to the image files, written as COCO wants them."
    coco, evaluation, codes = (pytest.importorskip(f"pycocotools.{o}")
                               for o in ("coco", "cocoeval", "mask"))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco.COCO(root / "annotations/instances_val2017.json")
        ids, rows = truth.getImgIds(), []
        images = [Image.open(root / "val2017" / truth.imgs[i]["file_name"]) for i in ids]
        for k, found in zip(ids, model.predict(images)):
            for box, score, label, mask in zip(found["boxes"].tolist(), found["scores"].tolist(),
                                               found["labels"].tolist(), found["masks"].numpy()):
                row = dict(image_id=k, category_id=IDS[label], score=score)
                if kind == "bbox":
                    rows.append({**row, "bbox": [*box[:2], box[2] - box[0], box[3] - box[1]]})
                else:
                    rows.append({**row, "segmentation": codes.encode(
                        np.asfortranarray(mask.astype(np.uint8)))})
        judged = evaluation.COCOeval(truth, truth.loadRes(rows), kind)
        judged.evaluate(), judged.accumulate(), judged.summarize()
    return judged.stats


@pytest.mark.parametrize("kind, name", [("bbox", ""), ("segm", "mask_")])
def test_the_numbers_are_those_of_pycocotools(trained, kind, name):
    """From image file to logged number and back: resizing, class ids, crowds, areas, images without
    objects."""
    trainer, model, root = trained
    ours = trainer.validate(model, datamodule=data("masks", root), verbose=False)[0]
    theirs = coco_numbers(model, root, kind)
    keys = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large", "mar_1",
            "mar_10", "mar_100", "mar_small", "mar_medium", "mar_large")
    assert theirs[0] > 0.05
    # -1 stands for no such object, and is not logged.
    assert ([ours.get(f"val/{name}{k}", -1) for k in keys]
            == pytest.approx(theirs.tolist(), abs=1e-6))


def test_the_best_checkpoint_is_that_of_the_best_precision(trained, monkeypatch):
    trainer, model, root = trained
    scores = {int(o["epoch"]): o["val/map"] for o in trainer.history if "val/map" in o}
    assert (len(scores) == 3
            and f"epoch={max(scores, key=scores.__getitem__):02d}" in trainer.best_model_path)

    def refuse(*args): raise AssertionError("the network was asked")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    again = InstanceSegmentor.load_from_checkpoint(trainer.best_model_path)
    assert again.class_names == ["circle", "square", "triangle"] == model.class_names
    found = trainer.validate(again, datamodule=data("masks", root), verbose=False)[0]
    assert found["val/map"] == pytest.approx(max(scores.values()), abs=1e-6)


def test_predictions_are_in_the_pixels_of_each_image(trained):
    trainer, model, root = trained
    batches = trainer.predict(model, datamodule=data("masks", root))
    table = json.loads((root / "annotations/instances_val2017.json").read_text())
    found = [o for batch in batches for o in batch]
    assert len(found) == len(table["images"])
    for image, o in zip(table["images"], found):
        h, w = image["height"], image["width"]
        assert o["masks"].shape == (len(o["labels"]), h, w) and o["masks"].dtype == torch.bool
        assert ((o["boxes"] >= 0).all() and (o["boxes"] <= torch.tensor([w, h, w, h])).all()
                and (o["boxes"][:, 2:] > o["boxes"][:, :2]).all())
        assert (o["scores"].diff() <= 0).all()
        alone = model.predict(Image.open(root / "val2017" / image["file_name"]))[0]
        torch.testing.assert_close(alone["scores"], o["scores"], rtol=1e-3, atol=1e-5)


# Through AutoTrainer

@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_ends_with_the_weights_of_an_unbroken_one(folder, tmp_path, kind):
    def run(name: str, epochs: int, **kwargs):
        return train(kind, folder, tmp_path / name, epochs, build(kind, scheduler=None),
                     mixing=dict(mosaic=0.5, mixup=0.3), **kwargs)
    trainer, whole = run("whole", 2)
    # The usual metric of the best checkpoint is the loss.
    losses = [o["val/loss"] for o in trainer.history]
    assert f"epoch={losses.index(min(losses)):02d}-val_loss=" in trainer.best_model_path
    run("parts", 1)
    assert torch.equal(weights(run("parts", 2, path="last")[1]), weights(whole))


@pytest.mark.parametrize("kind", KINDS)
def test_bf16(folder, tmp_path, kind):
    trainer, model = train(kind, folder, tmp_path, 2, build(kind, score_thresh=0.0),
                           precision="bf16-mixed")
    first, last = trainer.history[0], trainer.history[-1]
    assert np.isfinite(last["train/loss"]) and "val/map" in last
    # The last epochs of YOLOX as published have one loss more.
    assert last["train/loss"] < first["train/loss"] or "train/l1_loss" in last
    # Places are not rounded to half precision: at 1000 pixels that would be by four.
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model.predict(torch.randn(1, 3, 64, 64))[0]
    assert found["boxes"].dtype == found["scores"].dtype == torch.float32
    assert not torch.equal(found["boxes"], found["boxes"].bfloat16().float())


def test_two_processes_measure_what_one_does(folder, tmp_path):
    """The numbers of the validation set are the same, however it is divided; both processes end
    with the same weights."""
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent(f"""
        import sys, torch
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path
        from autotimm import AutoTrainer
        from test_detection import QUIET, build, data, weights
        count, folder = int(sys.argv[1]), Path({str(folder)!r})
        how = dict(devices=2, strategy="ddp") if count == 2 else dict(devices=1)
        for kind in ("fcos", "darknet", "masks"):
            trainer = AutoTrainer(max_epochs=1, default_root_dir=sys.argv[2], seed=0, **how, **QUIET)
            model = build(kind, score_thresh=0.0)
            before = trainer.validate(model, datamodule=data(kind, folder, batch_size=4 // count), verbose=False)[0]
            trainer.fit(model, datamodule=data(kind, folder, batch_size=4 // count))
            mine = weights(model)
            equal = torch.equal(*trainer.strategy.all_gather(mine)) if count == 2 else True
            names = ("val/map", "val/mar_100", "val/mask_map")
            if trainer.is_global_zero: print("found", *(before[k] for k in names if k in before), equal)
    """))
    found = []
    for count in (1, 2):
        done = subprocess.run([sys.executable, str(script), str(count), str(tmp_path / str(count))],
                              capture_output=True, text=True,
                              timeout=300, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-3000:]
        lines = [o.split() for o in done.stdout.splitlines() if o.startswith("found")]
        assert len(lines) == 3 and all(o.pop() == "True" for o in lines)
        found.append([float(o) for line in lines for o in line[1:]])
    assert found[0] == pytest.approx(found[1], rel=1e-5) and max(found[0]) > 0


def test_searches_and_pictures(folder, tmp_path):
    "lr='auto', batch_size='auto', two loggers, a drawing of predictions a validation."
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    model = build("masks", lr="auto", logging_config=LoggingConfig(True, True, log_predictions=True,
                                                                   predictions_per_epoch=3))
    assert model.hparams["compile_model"] is False
    loaders = data("masks", folder, batch_size="auto")
    logs = [LoggerConfig(o, {"save_dir": str(tmp_path / o)}) for o in ("csv", "tensorboard")]
    trainer, _ = train("masks", folder, tmp_path, 2, model, loaders, logger=logs,
                       log_every_n_steps=1,
                       tuner_config=TunerConfig(lr_find_kwargs={"num_training": 12}))
    assert (isinstance(loaders.batch_size, int)
            and trainer.tuning.batch_size.suggestion == loaders.batch_size)
    assert model.lr == pytest.approx(trainer.tuning.lr.suggestion) and 0 < model.lr < 1
    head = next((tmp_path / "csv").rglob("metrics.csv")).read_text().splitlines()[0].split(",")
    assert {"train/loss", "train/mask_loss", "train/num_pos", "train/lr", "train/grad_norm",
            "val/map", "val/mask_map_50"} <= set(head)
    board = EventAccumulator(str(next((tmp_path
                                       / "tensorboard").rglob("events.*")).parent)).Reload()
    assert len(board.Images("val/predictions")) == 2
    assert not model.examples.kept


@pytest.mark.parametrize("kind", ["fcos", "darknet", "masks"])
def test_averaged_and_frozen(folder, tmp_path, kind):
    trainer, _ = train(kind, folder, tmp_path, model=build(kind, ema_decay=0.9))
    assert "val/map" in trainer.history[-1]
    model = build(kind, unfreeze_after=1)
    before = weights(model.backbone)
    train(kind, folder, tmp_path, model=model)
    assert torch.equal(weights(model.backbone), before)
    train(kind, folder, tmp_path, 2, model=(later := build(kind, unfreeze_after=1)))
    assert not torch.equal(weights(later.backbone), before)


def test_a_metric_of_the_users(folder, tmp_path):
    config = MetricConfig("precision", "torchmetrics", "MeanAveragePrecision",
                          {"class_metrics": True, "iou_thresholds": [0.5]}, ["train", "val"])
    trainer, model = train("fcos", folder, tmp_path, model=build("fcos", metrics=[config]),
                           checkpoint_monitor="val/precision", checkpoint_mode="max")
    assert {"val/precision", "val/precision_map_triangle",
            "train/precision"} <= set(trainer.history[-1]) and "val/map" not in trainer.history[-1]
    assert "val_precision" in trainer.best_model_path
    assert (ObjectDetector.load_from_checkpoint(trainer.best_model_path).metrics.configs
            == model.metrics.configs)


@pytest.mark.parametrize("kind", ["fcos", "masks"])
def test_workers_mix_images_of_several_sizes(folder, tmp_path, kind):
    mixing = dict(mosaic=1.0, mixup=0.5, no_aug_epochs=1, multi_scale=(0.5, 1.5),
                  num_workers=2, persistent_workers=True)
    trainer, model = train(kind, folder, tmp_path, 2, mixing=mixing)
    assert np.isfinite(trainer.history[-1]["train/loss"]) and torch.isfinite(weights(model)).all()


def test_images_that_cannot_be_read(tmp_path):
    root = write(tmp_path / "data", train2017=6, val2017=5)
    for split in ("train2017", "val2017"):
        broken = sorted((root / split).iterdir())[1]
        broken.write_bytes(broken.read_bytes()[:200])
    loaders = data("masks", root, batch_size=1, on_bad_image="skip", mosaic=0.5)
    with pytest.warns(UserWarning, match="left out of the val data"):
        trainer, _ = train("masks", root, tmp_path, loaders=loaders)
    assert ({k: len(v) for k, v in loaders.bad_images.items()} == {"train": 1, "val": 1}
            and "val/map" in trainer.history[-1])


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_without_an_object(tmp_path, kind):
    batch = {"image" if kind == "masks" else "images": torch.randn(2, 3, 64, 64),
             "boxes": [torch.zeros(0, 4)] * 2,
             "labels": [torch.zeros(0, dtype=torch.int64)] * 2,
             "masks": [torch.zeros(0, 64, 64, dtype=torch.bool)] * 2}
    loader = torch.utils.data.DataLoader([batch] * 2, batch_size=None)
    trainer, model = (AutoTrainer(max_epochs=2, default_root_dir=tmp_path,
                                  checkpoint_monitor="val/map", checkpoint_mode="max", **QUIET),
                      build(kind))
    before = weights(model)
    trainer.fit(model, loader, loader)
    assert torch.isfinite(weights(model)).all() and not torch.equal(weights(model), before)
    # That nothing is there is learned too.
    assert (trainer.history[-1]["train/loss"] < trainer.history[0]["train/loss"]
            and trainer.history[-1]["val/map"] == -1)


def test_without_the_extra(folder, tmp_path, monkeypatch):
    "No backend of mean average precision: a warning names the extra, and the loss is logged."
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *o: None
                        if name in ("faster_coco_eval", "pycocotools") else find(name, *o))
    for kind in ("fcos", "masks"):
        with pytest.warns(UserWarning, match=r'pip install "autotimm\[detection\]"'):
            model = build(kind)
        trainer, _ = train(kind, folder, tmp_path, model=model)
        assert ("val/loss" in trainer.history[-1] and "val/map" not in trainer.history[-1]
                and "val_loss" in trainer.best_model_path)


# Backbones

def check_backbone(backbone, folder: Path, root: Path, cls=ObjectDetector) -> None:
    "A backbone trains in both tasks, and comes back from a checkpoint."
    for kind in ("fcos", "masks"):
        trainer, model = train(kind, folder, root, model=build(kind, backbone=backbone),
                               limit_train_batches=1, limit_val_batches=1)
        again = type(model).load_from_checkpoint(trainer.last_model_path)
        x = torch.randn(1, 3, 64, 64)
        for k, v in model.predict(x)[0].items(): assert torch.equal(again.predict(x)[0][k], v), k


def test_backbones_of_the_hub(folder, tmp_path, monkeypatch):
    from huggingface_hub import snapshot_download
    transformers = pytest.importorskip("transformers")
    swin = transformers.SwinConfig(embed_dim=12, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2],
                                   window_size=2, image_size=64)
    with LocalHub() as hub:
        hub.add_timm("me/tiny", "test_convnext")
        hub.add_transformers("me/swin", swin)
        kept = {o: build("fcos", backbone=o) for o in ("hf-hub:me/tiny", "me/swin",
                                                       f"local-dir:{snapshot_download('me/tiny')}")}
        for name, model in kept.items():
            trainer, _ = train("fcos", folder, tmp_path / name[-4:], model=model,
                               limit_train_batches=1, limit_val_batches=1)
            kept[name] = (model, trainer.last_model_path)

    def refuse(*args): raise AssertionError("the network was asked")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    x = torch.randn(1, 3, 64, 64)
    for model, path in kept.values():
        again = ObjectDetector.load_from_checkpoint(path)
        for k, v in model.predict(x)[0].items(): assert torch.equal(again.predict(x)[0][k], v), k


@pytest.mark.parametrize("name", ["test_vit", "swin", "dinov2"])
def test_backbones_of_other_kinds(folder, tmp_path, name):
    if name == "test_vit":
        return check_backbone(FeatureBackboneConfig(name, pretrained=False), folder, tmp_path)
    transformers = pytest.importorskip("transformers")
    swin = dict(embed_dim=12, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=2,
                image_size=64)
    plain = dict(hidden_size=24, num_hidden_layers=4, num_attention_heads=2, image_size=64,
                 patch_size=16)
    check_backbone(transformers.SwinConfig(**swin) if name == "swin"
                   else transformers.Dinov2Config(**plain), folder, tmp_path)


@pytest.mark.parametrize("channels", [1, 4])
def test_channels(folder, tmp_path, channels):
    pictures = LoggingConfig(False, False, log_predictions=True)
    trainer, model = train("masks", folder, tmp_path,
                           model=build("masks", in_chans=channels, logging_config=pictures),
                           mixing=dict(mosaic=1.0, mixup=0.5))
    assert "val/map" in trainer.history[-1]
    assert len(model.predict(Image.new("RGB", (30, 40)))[0]["masks"][0]) == 40
    with pytest.raises(ValueError, match=rf"Images must be float \(B, {channels}, H, W\)"):
        model.compute({"image": torch.randn(1, 3, 64, 64), "boxes": [], "labels": [], "masks": []},
                      "test")


# Images and objects at the edge

@pytest.mark.parametrize("kind", ["fcos", "yolox", "masks"])
def test_images_of_any_size(kind):
    model = build(kind)
    for size in ((64, 64), (33, 70), (1, 1), (500, 3), (200, 64)):
        found = model.predict(torch.randn(1, 3, *size))[0]
        assert (found["boxes"] >= 0).all() and (found["boxes"]
                                                <= torch.tensor([*size[::-1]] * 2)).all()
        if kind == "masks": assert found["masks"].shape[1:] == size
        batch = {"images": torch.randn(1, 3, 64, 96), "boxes": [torch.tensor([[0.0, 0, 96, 64]])],
                 "labels": [torch.tensor([1])], "masks": [torch.ones(1, 64, 96, dtype=torch.bool)]}
    losses = model.train().compute(batch, "train").losses
    losses["loss"].backward()
    assert losses["num_pos"] > 0 and all(torch.isfinite(p.grad).all() for p in model.parameters()
                                         if p.grad is not None)


def test_yolox_wants_multiples_of_32():
    with pytest.raises(ValueError, match=r"must be multiples of 32, got \(33, 70\)"):
        build("darknet").predict(torch.randn(1, 3, 33, 70))
    tall = Image.new("RGB", (33, 70))       # an image is resized, and the boxes with it
    assert (build("darknet", score_thresh=0.0).predict(tall)[0]["boxes"]
            <= torch.tensor([33, 70] * 2)).all()


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "I;16", "CMYK"])
def test_files_of_any_mode(trained, mode):
    found = trained[1].predict([Image.new(mode, (50, 7)), Image.new("RGB", (5, 70))])
    assert [o["masks"].shape[1:] for o in found] == [(7, 50), (70, 5)]


def odd_images(root: Path) -> Path:
    """One class; thin, grey and transparent images, one with 300 objects, boxes that touch borders
    or are smaller than a pixel."""
    rng = np.random.default_rng(0)
    many = np.concatenate([rng.uniform(0, 200, (300, 2)), rng.uniform(3, 50, (300, 2))],
                          1).round(1).tolist()
    scenes = [(("RGB", (500, 1)), [[10, 0, 100, 1]]), (("RGB", (1, 500)), [[0, 10, 1, 100]]),
              (("L", (50, 70)), [[0, 0, 50, 70]]),
              (("RGBA", (50, 70)), [[0, 0, 10, 70], [40, 60, 10, 10]]), (("RGB", (256, 256)), many),
              (("RGB", (640, 480)), [[3, 3, 1, 1], [300.5, 200.25, 0.5, 0.25], [639, 479, 1, 1]])]
    for split in ("train2017", "val2017"):
        (root / split).mkdir(parents=True)
        images, objects = [], []
        for i, ((mode, size), boxes) in enumerate(scenes):
            Image.new(mode, size).save(root / split / f"{i}.png")
            images.append(dict(id=i, file_name=f"{i}.png", width=size[0], height=size[1]))
            for x, y, w, h in boxes:
                objects.append(dict(id=len(objects) + 1, image_id=i, category_id=1,
                                    bbox=[x, y, w, h], area=w * h, iscrowd=0,
                                    segmentation=[[x, y, x + w, y, x + w, y + h, x, y + h]]))
        (root / "annotations").mkdir(exist_ok=True)
        (root / f"annotations/instances_{split}.json").write_text(json.dumps(
            dict(images=images, annotations=objects, categories=[dict(id=1, name="it")])))
    return root


@pytest.mark.parametrize("kind", KINDS)
def test_odd_images(tmp_path, kind):
    root = odd_images(tmp_path / "odd")
    for mosaic in (0.0, 1.0):
        trainer, model = train(kind, root, tmp_path, model=build(kind, num_classes=1),
                               mixing=dict(batch_size=2, mosaic=mosaic, mixup=mosaic / 2))
        assert torch.isfinite(weights(model)).all() and 0 <= trainer.history[-1]["val/map"] <= 1


def test_a_single_image(tmp_path):
    root = write(tmp_path / "one", train2017=2, val2017=2)
    file = root / "annotations/instances_train2017.json"
    table = json.loads(file.read_text())
    file.write_text(json.dumps({**table, "images": table["images"][:1]}))
    for kind in ("fcos", "masks"):
        trainer, _ = train(kind, root, tmp_path, mixing=dict(mosaic=0.5))
        assert trainer.global_step == 1 and "val/map" in trainer.history[-1]


# What a step may not do

BOX, ID, MASK = torch.tensor([[0.0, 0, 9, 9]]), torch.tensor([0]), torch.ones(1, 64, 64)


@pytest.mark.parametrize("kind, batch, text", [
    ("fcos", None, "must be a dict with 'images', 'boxes', 'labels', got NoneType"),
    ("fcos", {"boxes": None}, "'boxes' must be a list with a tensor for each image, got NoneType"),
    ("fcos", {"boxes": [[[0.0, 0, 9, 9]]]}, "'boxes' must be a list with a tensor for each image, "
                                            "got list"),
    ("fcos", {"labels": [torch.tensor([-1])]}, "must lie in 0..2, got -1..-1"),
    ("fcos", {"labels": [torch.tensor([3])]}, "must lie in 0..2, got 3..3"),
    ("fcos", {"labels": [torch.tensor([0.0])]}, "got .1, 4. and torch.float32"),
    ("fcos", {"boxes": [BOX[0]]}, "needs boxes .N, 4."),
    ("fcos", {"boxes": [BOX.flip(1)]}, "not xyxy"),
    ("fcos", {"boxes": [BOX * float("nan")]}, "not xyxy"),
    ("fcos", {"iscrowd": [0]}, "'iscrowd' must be a list with a tensor for each image"),
    ("fcos", {"images": torch.zeros(1, 3, 64, 64, dtype=torch.uint8)},
     "Images must be float .B, 3, H, W., got torch.uint8"),
    ("masks", {}, "'masks'"),
    ("masks", {"masks": [MASK * 255]}, "bool or 0 and 1, got 255"),
    ("masks", {"masks": [MASK[:, :9]]}, "needs masks .1, 64, 64., got .1, 9, 64."),
])
def test_bad_batches(kind, batch, text):
    full = None if batch is None else {"images": torch.randn(1, 3, 64, 64), "boxes": [BOX],
                                       "labels": [ID], **batch}
    with pytest.raises(ValueError, match=text): build(kind).compute(full, "train")


@pytest.mark.parametrize("kind", ["fcos", "masks"])
def test_a_label_out_of_range_in_a_later_batch(kind):
    model, good = build(kind), {"images": torch.randn(1, 3, 64, 64), "boxes": [BOX * 5],
                                "labels": [ID], "masks": [MASK]}
    model.compute(good, "train")
    with pytest.raises(ValueError, match="must lie in 0..2, got 7..7"):
        model.compute({**good, "labels": [ID + 7]}, "train")


class Waits(TorchDispatchMode):
    "Counts what would make the host wait for a GPU."
    count = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        by_mask = (name.startswith("aten::index")
                   and any(isinstance(o, torch.Tensor) and o.dtype == torch.bool
                           for o in (args[1] if isinstance(args[1], (list, tuple)) else ())))
        self.count += by_mask or name in ("aten::nonzero", "aten::_local_scalar_dense",
                                          "aten::masked_select", "aten::equal")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_the_host_waits_once_a_step_whatever_the_batch(kind):
    model = build(kind)
    for images in (2, 5):
        batch = {"images": torch.randn(images, 3, 64, 64), "boxes": [BOX * 5] * images,
                 "labels": [ID] * images, "masks": [MASK.bool()] * images,
                 "iscrowd": [torch.tensor([False])] * images}
        model.compute(batch, "train")       # the first batch of a stage is looked at
        with Waits() as waits: model.compute(batch, "train").losses["loss"].backward()
        assert waits.count == 1
