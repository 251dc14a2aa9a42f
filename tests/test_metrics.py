"Mean average precision and the metric manager, held against pycocotools on a COCO file."
import io
import json
import sys
import warnings
from contextlib import redirect_stdout
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torchmetrics
from fastcore.test import test_close as close
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchmetrics import Metric

from autotimm.metrics import MeanAveragePrecision, MetricConfig, MetricManager
from autotimm.testing import make_shapes, mask_to_rle


def coco_file(path):
    "Write a COCO file; what a detector might have found, in COCO's format."
    rng = np.random.default_rng(0)
    images, annotations, results = [], [], []
    for i, size in enumerate([48, 64, 64, 96, 160, 160, 320, 320, 320, 320]):
        scene = make_shapes(1, image_size=size, num_classes=4, seed=i)[0]
        images.append(dict(id=10 + i, file_name=f"{i}.png", height=size, width=size))
        for k, (label, mask, (x0, y0, x1, y1)) in enumerate(
            zip(scene.labels, scene.masks, scene.boxes.astype(float).tolist())):
            category = 3 * int(label) + 2
            if i not in (2, 7):
                annotations.append(dict(id=len(annotations) + 1, image_id=10 + i,
                                        category_id=category, iscrowd=int(i % 3 == 1 and k == 0),
                                        area=float(mask.sum()), bbox=[x0, y0, x1 - x0, y1 - y0],
                                        segmentation=mask_to_rle(mask)))
            for _ in range(0 if label == 3 else 120 if i == 9 else 3):
                dx, dy = rng.integers(-size // 24, size // 24 + 1, 2).tolist()
                wrong = rng.random() < 0.2
                results.append(dict(image_id=10 + i, category_id=(category + 3) % 12 if wrong
                                    else category, score=float(rng.random(dtype=np.float32)),
                                    bbox=[x0 + dx + 0.25, y0 + dy, x1 - x0 - 0.37, y1 - y0 + 0.125],
                                    segmentation=mask_to_rle(np.roll(mask, (dy, dx), (0, 1)))))
    categories = [dict(id=3 * i + 2, name=name)
                  for i, name in enumerate(("ant", "bee", "cat", "dog"))]
    path.write_text(json.dumps(dict(info={}, images=images, annotations=annotations,
                                    categories=categories)))
    return results


NAMES = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large", "mar_1",
         "mar_10", "mar_100", "mar_small", "mar_medium", "mar_large")

def by_pycocotools(file, results, kind, category=None):
    "COCO's twelve numbers."
    with redirect_stdout(io.StringIO()):
        truth = COCO(str(file))
        ours = [{k: truth.annToRLE(o) if k == "segmentation" else v for k, v in o.items()
                 if k != ("segmentation" if kind == "bbox" else "bbox")}
                for o in results]
        coco = COCOeval(truth, truth.loadRes(ours), kind)
        if category is not None: coco.params.catIds = [category]
        coco.evaluate(), coco.accumulate(), coco.summarize()
    return dict(zip(NAMES, coco.stats.tolist()))


def as_tensors(file, results):
    "The same as predictions and targets of images; category ids become 0 to 3."
    truth = COCO(str(file))
    def item(records, size, **more):
        boxes = torch.tensor([o["bbox"] for o in records], dtype=torch.float64).view(-1, 4)
        masks = np.array([truth.annToMask(o) for o in records], dtype=bool).reshape(-1, *size)
        return dict(boxes=torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1).float(),
                    masks=torch.from_numpy(masks),
                    labels=torch.tensor([(o["category_id"] - 2) // 3 for o in records]).long(),
                    **{k: torch.tensor([o[key] for o in records], dtype=dtype) for k,
                       (key, dtype) in more.items()})
    preds, targets = [], []
    for i, image in truth.imgs.items():
        size = (image["height"], image["width"])
        preds.append(item([o for o in results if o["image_id"] == i], size,
                          scores=("score", torch.float32)))
        targets.append(item(truth.imgToAnns[i], size, iscrowd=("iscrowd", torch.bool),
                            area=("area", torch.float32)))
    return preds, targets


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Images of several sizes, two of them without objects, four classes of which one is never
    found, crowds, the areas of the
    masks, and one image with more than a hundred detections of a class; what is found is shifted,
    repeated, of another class."""
    file = tmp_path_factory.mktemp("coco") / "instances.json"
    results = coco_file(file)
    with redirect_stdout(io.StringIO()): preds, targets = as_tensors(file, results)
    return file, results, preds, targets


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize("backend", ["faster_coco_eval", "pycocotools"])
def test_mean_average_precision_is_that_of_pycocotools(found, kind, backend):
    file, results, preds, targets = found
    expected = by_pycocotools(file, results, kind)
    single = [by_pycocotools(file, results, kind, 3 * i + 2) for i in range(4)]
    metric = MeanAveragePrecision(iou_type=kind, backend=backend, class_metrics=True)
    for i in (0, 4, 7):
        metric.update(preds[i:i + 4 if i == 0 else i + 3], targets[i:i + 4 if i == 0 else i + 3])
    values = metric.compute()
    for name in NAMES: close(values[name].item(), expected[name], eps=1e-6)
    assert values["classes"].tolist() == [0, 1, 2, 3]
    close(values["map_per_class"].tolist(), [o["map"] for o in single], eps=1e-6)
    close(values["mar_100_per_class"].tolist(), [o["mar_100"] for o in single], eps=1e-6)


def test_that_of_torchmetrics_alone_is_not(found):
    "Why ours stands beside it: rounded thresholds, and images without masks that are left out."
    file, results, preds, targets = found
    plain = torchmetrics.detection.MeanAveragePrecision(iou_type="segm")
    plain.update(preds, targets)
    assert abs(plain.compute()["map"].item() - by_pycocotools(file, results, "segm")["map"]) > 1e-4


def test_nothing_found_is_zero(found):
    *_, preds, targets = found
    none = MeanAveragePrecision()
    none.update([{k: v[:0] for k, v in o.items()} for o in preds], targets)
    assert none.compute()["map"].item() == 0


def epoch(manager, batches):
    "Values of an epoch."
    for preds, targets in batches: manager.update("val", preds, targets)
    return {k: v.item() for k, v in manager.compute("val").items()}


def named(metric_class, backend="torchmetrics", name="m", stages=("val",), wants=None, **params):
    return MetricConfig(name, backend, metric_class, params, list(stages), wants=wants)


@pytest.fixture
def manager():
    return MetricManager([MetricConfig("map", "torchmetrics", "MeanAveragePrecision",
                                       {"class_metrics": True}, ["val"], prog_bar=True),
                          MetricConfig("mask_map", "torchmetrics", "MeanAveragePrecision",
                                       {"iou_type": "segm"}, ["val"])],
                         num_classes=4, task="instance_segmentation",
                         class_names=["ant", "bee", "cat", "dog"])


def test_a_manager_logs_pycocotools_numbers(found, manager):
    "Epoch after epoch, in inference mode and then with gradients."
    file, results, preds, targets = found
    halves = [(preds[:5], targets[:5]), (preds[5:], targets[5:])]
    with torch.inference_mode(): values = epoch(manager, halves)
    for kind, prefix in (("bbox", ""), ("segm", "mask_")):
        expected = by_pycocotools(file, results, kind)
        close([values[f"val/{prefix}{k}"] for k in NAMES], list(expected.values()), eps=1e-6)
    close([values[f"val/map_{k}"] for k in ("ant", "bee", "cat", "dog")],
          [by_pycocotools(file, results, "bbox", 3 * i + 2)["map"] for i in range(4)], eps=1e-6)
    assert epoch(manager, [(preds, targets)]) == values
    manager.update("val", *halves[0])
    manager.reset("val")
    assert manager.compute("val") == {}
    assert ((manager.prog_bar("val/map"), list(manager.stage_metrics("val")))
            == (True, ["map", "mask_map"]))


def test_without_the_extra_a_detector_has_no_metrics(found):
    *_, preds, targets = found
    absent = patch.dict(sys.modules, {"faster_coco_eval": None, "pycocotools": None})
    with absent, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nothing = MetricManager(None, 3, task="detection")
        assert (nothing.configs, nothing.update("val", preds, targets),
                nothing.compute("val")) == ([], {}, {})
        with pytest.raises(ImportError, match="autotimm.detection"):
            MetricManager([named("MeanAveragePrecision")], 3, task="detection")
    assert [c.name for c in MetricManager(None, 3, task="detection").configs] == ["map"]


def test_mistakes_with_detections(found, manager):
    *_, preds, targets = found
    step = MetricConfig("map", "torchmetrics", "MeanAveragePrecision", {}, ["val"],
                        log_on_step=True)
    for wrong in (lambda: MetricManager([], 3, task="detection"),
                  lambda: MetricManager([step], 3, task="detection"),
                  lambda: MetricManager([named("Accuracy")], 3, task="detection"),
                  lambda: manager.update("val", preds[:1], targets),
                  lambda: manager.update("val", [{}], targets[:1])):
        with pytest.raises(ValueError): wrong()


class Found(Metric):
    "How many boxes there are."
    def __init__(self):
        super().__init__()
        self.add_state("boxes", torch.tensor(0.0), dist_reduce_fx="sum")
    def update(self, preds, target): self.boxes += sum(len(o["boxes"]) for o in preds)
    def compute(self): return self.boxes


def test_other_metrics_of_detections(found):
    _, results, preds, targets = found
    other = MetricManager([named(f"{__name__}.Found", "custom", name="found"),
                           named("IntersectionOverUnion", name="iou")], 4, task="detection")
    boxes = [{k: v for k, v in o.items() if k != "masks"} for o in preds]
    assert epoch(other, [(boxes, targets)])["val/found"] == len(results)


def test_crowded_images_give_the_same_by_both_backends():
    torch.manual_seed(0)
    def crowd(n, spread):
        "An image with n boxes near ten places."
        corner = torch.arange(n)[:, None] % 10 * 50.0 + spread * torch.randn(n, 2)
        return dict(boxes=torch.cat([corner, corner + 40 + spread * torch.rand(n, 2)], 1),
                    labels=torch.arange(n) % 10, scores=torch.rand(n))
    preds, targets = ([crowd(n, spread) for _ in range(50)]
                      for n, spread in ((100, 4.0), (10, 0.0)))
    values = []
    for backend in ("faster_coco_eval", "pycocotools"):
        config = MetricConfig("map", "torchmetrics", "MeanAveragePrecision", {"backend": backend},
                              ["val"])
        values.append(epoch(MetricManager([config], 10, task="detection"),
                            [(preds, targets)])["val/map"])
    close(*values, eps=1e-6)
