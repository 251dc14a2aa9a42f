"""Do the dense tasks learn as well and as fast as torchvision's own models on the same backbone?

Masks of streets, boxes of blood cells and outlines of objects, each learnt by both sides with the
same MobileNetV2, batches,
optimiser, schedule, number of steps and evaluator. The sides take turns, one step each on the same
batch.
`python benchmarks/dense.py [--task segmentation] [--data DIR]`, where DIR holds `camvid`, `bccd`,
`coco128` and
`weights/mobilenetv2_100`; it is not part of this repository.
"""
import argparse
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from common import keep_quiet, machine, ratio, table
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassJaccardIndex
from torchmetrics.detection import MeanAveragePrecision
from torchvision.models import detection, segmentation
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.models.segmentation.deeplabv3 import DeepLabHead
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

import autotimm
from autotimm import AutoTrainer, FeatureBackboneConfig, seed_everything
from autotimm.boxes import LetterBox, scale_boxes
from autotimm.optim import create_optimizer, create_scheduler, parameter_groups
from autotimm.tasks.optimization import hold_norm

WARM = 10       # steps before the clock counts


@dataclass(frozen=True)
class Plan:
    "What both sides share."
    folder: str                     # in the data
    size: tuple[int, int]           # height and width of the images
    batch: int                      # images a step
    steps: int                      # even
    lr: float
    warmup: int                     # steps
    freeze_norm: bool  # hold the backbone's BatchNorm statistics, as torchvision's detectors do


PLANS = {
    "segmentation": Plan("camvid", (192, 256), 8, 200, 1e-3, 20, False),
    "detection": Plan("bccd", (192, 256), 4, 300, 1e-3, 30, True),
    # 128 photos of 80 classes: it shows that all of it works on photos, and how fast, not how well
    # it learns.
    "instance": Plan("coco128", (256, 256), 2, 40, 1e-3, 10, True),
}


# Torchvision's side

class Maps(nn.Module):
    "The backbone's feature maps under names, through a pyramid where there is one."
    def __init__(self, backbone: Any, above: nn.Module | None = None):
        super().__init__()
        self.backbone, self.out_channels, self.channels = (backbone, 256,
                                                           backbone.feature_info.channels())
        self.pyramid = None if above is None else FeaturePyramidNetwork(self.channels, 256, above)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        # The memory format that our side takes on a CPU: without it torchvision's step takes
        # longer.
        maps = self.backbone(images.contiguous(memory_format=torch.channels_last))
        if self.pyramid is None: return {"out": maps[-1]}
        return self.pyramid({str(i): x for i, x in enumerate(maps)})


def timm_maps(weights: str, levels: tuple[int, ...], **options: Any) -> nn.Module:
    "The pretrained network as timm itself makes it."
    return timm.create_model(weights, pretrained=True, features_only=True, out_indices=levels,
                             **options)


class AsItIs(GeneralizedRCNNTransform):
    "Leaves images alone, which come normalised and of one size."
    def normalize(self, image: Tensor) -> Tensor: return image
    def resize(self, image: Tensor, target: Any = None) -> Any: return image, target


class DeepLab(nn.Module):
    "Torchvision's DeepLabV3 on batches of `SegmentationDataModule`."
    def __init__(self, weights: str, num_classes: int):
        super().__init__()
        # Stride 16: at 8 a step takes three times as long.
        self.backbone = Maps(timm_maps(weights, (4,), output_stride=16))
        self.model = segmentation.DeepLabV3(self.backbone,
                                            DeepLabHead(self.backbone.channels[-1], num_classes))

    def loss(self, batch: dict[str, Any]) -> Tensor:
        return F.cross_entropy(self.model(batch["image"])["out"], batch["mask"], ignore_index=255)

    def predict(self, batch: dict[str, Any]) -> Tensor:
        return self.model(batch["image"])["out"].argmax(1)


class Detector(nn.Module):
    """Torchvision's FCOS or Mask R-CNN on batches of `DetectionDataModule` or
    `InstanceSegmentationDataModule`."""
    def __init__(self, weights: str, num_classes: int, masks: bool):
        super().__init__()
        # FCOS takes the maps of strides 8 to 32 and two more above, Mask R-CNN those of 4 to 32 and
        # one more.
        levels, above = (((1, 2, 3, 4), LastLevelMaxPool()) if masks
                         else ((2, 3, 4), LastLevelP6P7(256, 256)))
        self.backbone = Maps(timm_maps(weights, levels), above)
        if masks: self.model: Any = detection.MaskRCNN(self.backbone, num_classes + 1)
        else: self.model = detection.FCOS(self.backbone, num_classes, score_thresh=0.05)
        self.model.transform = AsItIs(0, 0, [0.0], [1.0])
        # Mask R-CNN's class 0 is the background
        self.images, self.first = "image" if masks else "images", int(masks)

    def loss(self, batch: dict[str, Any]) -> Tensor:
        targets = [{"boxes": b, "labels": ids + self.first}
                   for b, ids in zip(batch["boxes"], batch["labels"])]
        if self.first:
            for target, masks in zip(targets, batch["masks"]):
                target["masks"] = masks.to(torch.uint8)
        return sum(self.model(list(batch[self.images]), targets).values())

    def predict(self, batch: dict[str, Any]) -> list[dict[str, Tensor]]:
        found = self.model(list(batch[self.images]))
        return [self._in_original(o, row) for o, row in zip(found, batch["letterbox"])]

    def _in_original(self, found: dict[str, Tensor], row: Tensor) -> dict[str, Tensor]:
        "Detections in the pixels of the original image."
        made = {**found, "boxes": scale_boxes(found["boxes"], row),
                "labels": found["labels"] - self.first}
        if self.first: made["masks"] = unpad(found["masks"], LetterBox.from_tensor(row))
        return made


def unpad(masks: Tensor, box: LetterBox) -> Tensor:
    """Masks (K, h, w) at the size of the original image, of probabilities (K, 1, H, W) with a
    border."""
    size = int(box.orig_h), int(box.orig_w)
    height, width = round(size[0] * box.scale_y), round(size[1] * box.scale_x)
    top, left = int(box.pad_top), int(box.pad_left)
    inner = masks[..., top:top + height, left:left + width]
    return F.interpolate(inner, size, mode="bilinear")[:, 0] > 0.5


# Our side, and what both need

def data_module(task: str, plan: Plan, data: Path, weights: str) -> Any:
    "The batches of both sides."
    options: dict[str, Any] = dict(image_size=plan.size, batch_size=plan.batch, num_workers=0,
                                   backbone=weights)
    if task == "segmentation":
        return autotimm.SegmentationDataModule(data / plan.folder,
                                               class_names=[str(i) for i in range(11)], **options)
    kind = (autotimm.DetectionDataModule if task == "detection"
            else autotimm.InstanceSegmentationDataModule)
    if task == "instance":
        files: dict[str, Any] = dict.fromkeys(("train", "val"),
                                              ("images/train2017",
                                               "annotations/instances_train2017.json"))
    else: files = {o: (f"images/{o}", f"annotations/{o}.json") for o in ("train", "val")}
    for split, (images, annotations) in files.items():
        options |= {f"{split}_images_dir": data / plan.folder / images,
                    f"{split}_ann_file": data / plan.folder / annotations}
    return kind(data / plan.folder, **options)


def our_model(task: str, plan: Plan, weights: str, num_classes: int) -> Any:
    "The task as a user makes it."
    kind = {"segmentation": "SemanticSegmentor", "detection": "ObjectDetector",
            "instance": "InstanceSegmentor"}[task]
    return getattr(autotimm, kind)(FeatureBackboneConfig(weights), num_classes, lr=plan.lr,
                                   freeze_norm=plan.freeze_norm,
                                   scheduler_kwargs={"warmup_steps": plan.warmup})


def targets_of(batch: dict[str, Any]) -> list[dict[str, Tensor]]:
    "Objects in the pixels of the original images, as torchmetrics takes them."
    rows = zip(batch["boxes"], batch["labels"], batch["iscrowd"], batch["area"], batch["letterbox"])
    made = [{"boxes": scale_boxes(b, row), "labels": ids, "iscrowd": c.int(), "area": a} for b, ids,
            c, a, row in rows]
    for target, masks in zip(made, batch.get("orig_masks", [])): target["masks"] = masks
    return made


@torch.no_grad()
def evaluate(task: str, predict: Callable[[Any], Any], loader: Any,
             num_classes: int) -> dict[str, float]:
    "The metrics of one side."
    if task == "segmentation":
        miou = MulticlassJaccardIndex(num_classes, ignore_index=255)
        for batch in loader: miou.update(predict(batch), batch["mask"])
        return {"mIoU": float(miou.compute())}
    kinds = ("bbox", "segm") if task == "instance" else "bbox"
    average = MeanAveragePrecision(iou_type=kinds, backend=backend())
    for batch in loader: average.update(predict(batch), targets_of(batch))
    found = average.compute()
    names = ({"mAP": "map", "mAP50": "map_50"} if task == "detection"
             else {"mask mAP": "segm_map", "mask mAP50": "segm_map_50"})
    return {name: float(found[key]) for name, key in names.items()}


def backend() -> str:
    "What torchmetrics finds the average precision with."
    try: import faster_coco_eval  # noqa: F401
    except ImportError: return "pycocotools"
    return "faster_coco_eval"


class Turns:
    "Batches for one side, while the other takes its own step on each; the order alternates."
    def __init__(self, loader: Any, steps: int, other: Callable[[Any], None]):
        self.loader, self.steps, self.other = loader, steps, other
        self.times: dict[str, list[float]] = {"ours": [], "theirs": []}

    def __len__(self) -> int: return self.steps

    def __iter__(self) -> Iterator[Any]:
        batches = self._endless()
        for i in range(self.steps):
            batch = next(batches)
            # With an even number of steps the last turn is ours: nobody asks for another batch
            # after it.
            if i % 2: self._theirs(batch)
            start = time.perf_counter()
            yield batch
            self.times["ours"].append(time.perf_counter() - start)
            if not i % 2: self._theirs(batch)

    def _theirs(self, batch: Any) -> None:
        start = time.perf_counter()
        self.other(batch)
        self.times["theirs"].append(time.perf_counter() - start)

    def _endless(self) -> Iterator[Any]:
        while True: yield from self.loader


def by_hand(model: Any, plan: Plan) -> Callable[[Any], None]:
    "A step of a plain training loop."
    optimizer = create_optimizer("adamw", parameter_groups(model, plan.lr, 1e-4), lr=plan.lr)
    schedule = create_scheduler("cosine", optimizer, total_steps=plan.steps,
                                steps_per_epoch=plan.steps, warmup_steps=plan.warmup)
    assert schedule is not None
    model.train()
    if plan.freeze_norm: hold_norm(model.backbone.backbone)

    def step(batch: Any) -> None:
        optimizer.zero_grad()
        model.loss(batch).backward()
        optimizer.step()
        schedule["scheduler"].step()
    return step


def run(task: str, plan: Plan, data: Path, seed: int) -> tuple[dict[str, dict[str, float]],
                                                               dict[str, list[float]]]:
    "Each side's metrics, and the seconds of its steps."
    seed_everything(seed)
    weights = f"local-dir:{data / 'weights' / 'mobilenetv2_100'}"
    photos = data_module(task, plan, data, weights)
    photos.setup()
    ours = our_model(task, plan, weights, photos.num_classes)
    theirs: Any = DeepLab(weights, photos.num_classes) if task == "segmentation" else Detector(
        weights, photos.num_classes, task == "instance")
    turns = Turns(photos.train_dataloader(), plan.steps, by_hand(theirs, plan))
    with tempfile.TemporaryDirectory() as folder:
        trainer = AutoTrainer(max_epochs=1, default_root_dir=folder, logger=False,
                              enable_checkpointing=False, accelerator="cpu",
                              enable_progress_bar=False, enable_model_summary=False)
        trainer.fit(ours, train_dataloaders=turns)
    sides = {"ours": (ours.eval(), ours.predict_step), "theirs": (theirs.eval(), theirs.predict)}
    found = {side: evaluate(task, predict, photos.val_dataloader(), photos.num_classes)
             for side, (_, predict) in sides.items()}
    return found, {side: o[WARM:plan.steps - 1] for side, o in turns.times.items()}


def tensors(tree: Any) -> Iterator[Tensor]:
    "All tensors in nested lists, tuples and dicts."
    if isinstance(tree, Tensor): yield tree
    elif isinstance(tree, (list, tuple)): yield from (x for o in tree for x in tensors(o))
    elif isinstance(tree, dict): yield from tensors(list(tree.values()))


def loss_share(task: str, plan: Plan, data: Path, steps: int = 20) -> float:
    """Share of our step between the outputs of the heads and the gradients with respect to them:
    assignment, loss, and its backward pass."""
    weights = f"local-dir:{data / 'weights' / 'mobilenetv2_100'}"
    photos = data_module(task, plan, data, weights)
    photos.setup()
    model = our_model(task, plan, weights, photos.num_classes)
    marks: list[float] = []         # beginning and end, in turn

    def mark(*_: Any) -> None: marks.append(time.perf_counter())

    def watch(_: Any, __: Any, outputs: Any) -> None:
        mark()
        # All of the loss is behind when the first gradient comes to the head.
        left = [mark]
        for x in tensors(outputs): x.register_hook(lambda _: left.pop()() if left else None)

    (model.head if task == "segmentation" else model.predictor.head).register_forward_hook(watch)
    if task == "instance":
        # Between assignment and the loss of the masks, and once more between the gradients of both,
        # the masks' head has its turn.
        cut = model.mask_logits
        model.mask_logits = lambda *args: (mark(), cut(*args))[1]
        model.mask_head.register_forward_hook(lambda _, pieces,
                                              logits: (pieces[0].register_hook(mark),
                                                       watch(_, pieces, logits))[0] and None)
    turns = Turns(photos.train_dataloader(), steps, lambda batch: None)
    AutoTrainer(max_epochs=1, logger=False, enable_checkpointing=False, accelerator="cpu",
                enable_progress_bar=False,
                enable_model_summary=False).fit(model, train_dataloaders=turns)
    spans = [end - start for start, end in zip(marks[::2], marks[1::2], strict=True)]
    times, parts = turns.times["ours"], 3 if task == "instance" else 1
    assert len(spans) == parts * steps, "a mark was missed"
    return statistics.median(sum(spans[parts * i:parts * (i + 1)]) / total
                             for i, total in enumerate(times[5:], 5))


def report(task: str, plan: Plan, runs: list[tuple[dict[str, dict[str, float]],
                                                   dict[str, list[float]]]]) -> str:
    "The table of a task."
    rows = []
    for side in ("ours", "theirs"):
        cells = []
        for name in runs[0][0][side]:
            values = [100 * found[side][name] for found, _ in runs]
            cells.append(f"{statistics.mean(values):.1f} ({', '.join(f'{v:.1f}' for v in values)})")
        seconds = [o for _, times in runs for o in times[side]]
        rows.append([side, *cells, f"{statistics.median(seconds):.3f}",
                     f"{sum(seconds) / len(runs):.0f}"])
    ratios = ", ".join(f"{ratio(times, 'ours', 'theirs'):.3f}" for _, times in runs)
    head = f"{task}: {plan.folder}, {plan.size[0]} x {plan.size[1]}, {plan.steps} steps of {plan.batch} images, learning rate {plan.lr:g}"
    return (
        f"{head}\n\n{table(rows, ['side', *runs[0][0]['ours'], 'seconds a step', 'seconds in steps'])}\n\n"
            f"Seconds a step, ours / theirs, median over pairs, by seed: {ratios}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2]
                        / "shared" / "data")
    parser.add_argument("--task", choices=list(PLANS), action="append")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="of each seed; the plan's own if left out")
    parser.add_argument("--lr", type=float, help="the plan's own if left out")
    parser.add_argument("--profile", action="store_true",
                        help="only the share of a step that target assignment and loss take")
    args = parser.parse_args()
    tasks = args.task or list(PLANS)
    for o in [*(PLANS[task].folder for task in tasks), "weights/mobilenetv2_100"]:
        if not (args.data / o).is_dir():
            print(f"Nothing at {args.data / o}: give the folder that holds it with --data.")
            sys.exit(0)
    keep_quiet()
    # On the classifier's weights, which maps leave out
    logging.getLogger("timm").setLevel(logging.ERROR)
    print(machine() + "\n", flush=True)
    for task in tasks:
        plan = replace(PLANS[task], **{k: v for k, v in {"steps": args.steps, "lr": args.lr}.items()
                                       if v})
        if plan.steps % 2 or plan.steps <= WARM + 2:
            parser.error(f"--steps must be even and above {WARM + 2}, got {plan.steps}.")
        if args.profile:
            print(f"{task}: assignment and loss take {loss_share(task, plan, args.data):.1%} of a "
                  "training step")
            continue
        runs = []
        for seed in range(args.seeds):
            start = time.perf_counter()
            runs.append(run(task, plan, args.data, seed))
            found, times = runs[-1]
            print(f"{task}, seed {seed}: {found}, seconds a step "
                  f"{ratio(times, 'ours', 'theirs'):.3f} of theirs, "
                  f"{time.perf_counter() - start:.0f} s",
                  file=sys.stderr, flush=True)
        print(report(task, plan, runs), flush=True)


if __name__ == "__main__": main()
