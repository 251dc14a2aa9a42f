"""Does every backbone family train, predict and reload in every task? One row a family, one column
a task.

    python benchmarks/compatibility.py                      # all families of timm, and the
    transformers classes
    python benchmarks/compatibility.py --sample 12          # twelve families, evenly spread
    python benchmarks/compatibility.py --family resnet --family ViT
    python benchmarks/compatibility.py --out benchmarks/results/compatibility.md

For each family of `timm.list_modules()` the model with the fewest parameters is taken, with random
weights, on images of
128 pixels where it takes these. Its feature maps must have the channels and strides that it
reports. Then in each task:
one training step on two images with objects, with a finite gradient for every parameter that
learns; a prediction of
the right form; and a checkpoint whose reloaded model predicts the very same. Each family runs in a
process of its own
choosing with a limit of time, so that one that hangs or dies costs its own row only.
"""
import argparse
import copy
import logging
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

FAILURES = (RuntimeError, ValueError, TypeError, AssertionError, AttributeError, LookupError,
            ImportError, MemoryError)
# Pixels a side, the first that the network takes, else its own: what is asked here does not depend
# on it. Patches of 14 want the second.
SIDES, CLASSES = (128, 112), 3
TASKS = ("classification", "segmentation", "detection", "detection, yolox", "instance segmentation")

_TOKENS = dict(hidden_size=48, num_hidden_layers=3, num_attention_heads=3, intermediate_size=64,
               image_size=64, patch_size=16)
_DINO = dict(hidden_size=48, num_hidden_layers=3, num_attention_heads=3, image_size=56,
             patch_size=14)
_STAGES = dict(hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 2, 1])
_WINDOWS = dict(embed_dim=12, depths=[1, 1, 2, 1], num_heads=[1, 2, 2, 4], window_size=4,
                image_size=128)
_HEADS = dict(num_attention_heads=[1, 2, 2, 4], hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1])
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "ViT": _TOKENS, "DeiT": _TOKENS, "Beit": _TOKENS, "Data2VecVision": _TOKENS,
    "Dinov2": _DINO, "Dinov2WithRegisters": _DINO,
    "DINOv3ViT": {**_TOKENS, "num_register_tokens": 4},
    "DINOv3ConvNext": {**_STAGES, "image_size": 64}, "Swin": _WINDOWS, "Swinv2": _WINDOWS,
    "ConvNext": {**_STAGES, "image_size": 64}, "ConvNextV2": {**_STAGES, "image_size": 64},
    "ResNet": {**_STAGES, "embedding_size": 16},
    "RegNet": {**_STAGES, "embedding_size": 16, "groups_width": 8},
    "Segformer": _HEADS, "PoolFormer": _STAGES, "PvtV2": {**_HEADS, "image_size": 64},
    "Hiera": dict(embed_dim=16, depths=[1, 1, 2, 1], num_heads=[1, 2, 4, 8], image_size=[64, 64]),
    "ViTMSN": _TOKENS, "SiglipVision": _TOKENS, "CLIPVision": _TOKENS,
    "MobileViT": dict(image_size=64),
    "MobileNetV2": dict(depth_multiplier=0.35, image_size=64),
    "EfficientNet": dict(width_coefficient=0.35, depth_coefficient=0.35, hidden_dim=448,
                         image_size=64),
}

@dataclass
class Row:
    """What was found of one family: 'yes' or the reason for each task; `reason` is empty if all
    went well."""
    library: str
    family: str
    model: str = ""
    parameters: int = 0
    input_size: str = ""
    width: int = 0
    features: str = ""
    tasks: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    reason: str = ""

def smallest_model(family: str) -> str:
    "The model of a timm family with the fewest parameters, found without memory for any."
    import timm
    import torch
    counts = {}
    for name in timm.list_models(module=family):
        with torch.device("meta"): model = timm.create_model(name, pretrained=False, num_classes=0)
        counts[name] = sum(p.numel() for p in model.parameters())
    return min(counts, key=lambda o: counts[o])

def what_to_build(library: str, family: str) -> tuple[Any, str, tuple[int, ...]]:
    "What a backbone is made of for a family, its name, and the sizes of image to try."
    from autotimm.backbones import BackboneConfig
    if library == "timm":
        return BackboneConfig(name := smallest_model(family), pretrained=False), name, SIDES
    import transformers
    values = TRANSFORMERS[family]
    return (getattr(transformers, f"{family}Config")(**values), f"{family}Model",
            () if "image_size" in values else SIDES)

def build(what: Any, sides: tuple[int, ...] = SIDES) -> tuple[Any, Any]:
    """The backbones with pooled output and with feature maps, for images of the first side they
    take; why there are no maps, if so."""
    from autotimm.backbones import create_backbone, create_feature_backbone
    size = dict(image_size=sides[0]) if sides else {}
    try:
        pooled = create_backbone(what, **size)
        try: return pooled, create_feature_backbone(what, **size)
        except AttributeError as e: return pooled, str(e)
    except FAILURES:
        if sides: return build(what, sides[1:])
        raise

def features(maps: Any) -> str:
    "Channels and strides of the maps. Raises `ValueError` if they are not what the backbone says."
    import torch
    from autotimm.backbones import get_feature_channels, get_feature_strides
    size, channels, strides = (maps.data_config["input_size"], get_feature_channels(maps),
                               get_feature_strides(maps))
    with torch.no_grad(): shapes = [tuple(o.shape) for o in maps(torch.randn(2, *size))]
    if not all(o[1] == c and -1 < size[1] / s - o[2] < 4.5 for o, c,
               s in zip(shapes, channels, strides, strict=True)):
        raise ValueError(f"maps of {shapes} from {channels} / {strides}")
    return f"{channels} / {strides}"

def task(name: str, backbone: Any) -> Any:
    "The model of a task, with small heads."
    from autotimm.tasks.classification import ImageClassifier
    from autotimm.tasks.detection import ObjectDetector
    from autotimm.tasks.instance import InstanceSegmentor
    from autotimm.tasks.segmentation import SemanticSegmentor
    if name == "classification": return ImageClassifier(backbone, CLASSES)
    if name == "segmentation": return SemanticSegmentor(backbone, CLASSES)
    small: dict[str, Any] = dict(fpn_channels=32, head_num_convs=1, score_thresh=0.0,
                                 max_detections_per_image=10)
    if name == "instance segmentation":
        return InstanceSegmentor(backbone, CLASSES, masks_per_image=4, **small)
    return ObjectDetector(backbone, CLASSES, "yolox" if name.endswith("yolox") else "fcos", **small)

def batch(name: str, images: Any) -> Any:
    """What a data module would give: two images with a large object each, and a small one in the
    first."""
    import torch
    if name == "classification": return images, torch.tensor([0, 2])
    height, width = images.shape[2:]
    parts = torch.tensor([[0.1, 0.2, 0.7, 0.9], [0.5, 0.1, 0.9, 0.4], [0.2, 0.1, 0.9, 0.8]])
    rows = (parts * torch.tensor([width, height, width, height])).round()
    masks = torch.zeros(3, height, width, dtype=torch.bool)
    for mask, (left, top, right, bottom) in zip(masks, rows.int().tolist()):
        mask[top:bottom, left:right] = True
    if name == "segmentation":
        return {"image": images, "mask": torch.stack([masks[0].long() + masks[1], masks[2].long()])}
    return {"images": images, "boxes": [rows[:2], rows[2:]],
            "labels": [torch.tensor([0, 2]), torch.tensor([1])],
            "masks": [masks[:2], masks[2:]]}

def train(model: Any, data: Any) -> None:
    "One step. Raises `ValueError` unless every parameter that learns has a finite gradient."
    import torch
    for o in model.modules():
        # The statistics of this step alone: mixed with those at the start, a random network's
        # activations explode in eval mode.
        if isinstance(o, torch.nn.modules.batchnorm._BatchNorm): o.momentum = 1.0
    model.train().compute(data, "train").losses["loss"].backward()
    learning = {n: p for n, p in model.named_parameters() if p.requires_grad}
    without = [n for n, p in learning.items() if p.grad is None]
    bad = [n for n, p in learning.items() if p.grad is not None
           and not torch.isfinite(p.grad).all()]
    if without or bad:
        raise ValueError(f"no gradient: {without[:3]}" if without else f"not finite: {bad[:3]}")
    torch.nn.utils.clip_grad_norm_(learning.values(), 1.0)
    torch.optim.SGD(learning.values(), lr=1e-3).step()
    model.zero_grad()

def well_formed(boxes: Any, scores: Any, labels: Any, height: int, width: int,
                masks: Any = None) -> bool:
    "Whether these are detections of an image of that size: at least one, its box inside."
    inside = bool((boxes >= 0).all() and (boxes[:, [0, 2]] <= width).all()
                  and (boxes[:, [1, 3]] <= height).all())
    count, real = len(boxes), bool((boxes[:, 2:] > boxes[:, :2]).all())
    return (count > 0 and inside and real and scores.shape == labels.shape == (count,)
            and 0 <= int(labels.min()) <= int(labels.max()) < CLASSES
            and (masks is None or masks.shape == (count, height, width)))

def predict(name: str, model: Any, images: Any) -> list[Any]:
    """What a model predicts, as tensors. Raises `ValueError` if it has not the form that the task
    promises."""
    import torch
    height, width = images.shape[2:]
    if name == "classification":
        with torch.no_grad(): found = [model.eval().predict_step(images)]
        good = found[0].shape == (2, CLASSES) and torch.allclose(found[0].sum(1), torch.ones(2))
    elif name == "segmentation":
        found = [model.predict(images, full_size=True), model.predict(images, return_logits=True)]
        good = (found[0].shape == (2, height, width)
                and 0 <= int(found[0].min()) <= int(found[0].max()) < CLASSES)
    else:
        parts = model.predict(images)
        found, masks = [v for o in parts for v in o.values()], name.startswith("instance")
        good = (len(parts) == 2 and all(("masks" in o) == masks
                                        and well_formed(**o, height=height, width=width)
                                        for o in parts))
    if not good or not all(torch.isfinite(o).all() for o in found):
        raise ValueError(f"predictions {[tuple(o.shape) for o in found]} {found}")
    return found

def check_task(name: str, backbone: Any) -> str:
    "'yes' if a task trains, predicts and reloads on a backbone, else why not."
    import torch
    from pytorch_lightning import Trainer
    try:
        images = torch.randn(2, *backbone.data_config["input_size"])
        model = task(name, backbone)
        train(model, batch(name, images))
        before = predict(name, model, images)
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(accelerator="cpu", devices=1, logger=False,
                              enable_checkpointing=False, enable_progress_bar=False,
                              enable_model_summary=False)
            trainer.strategy.connect(model)
            trainer.save_checkpoint(path := Path(folder) / "model.ckpt")
            kind = type(model)
            del model, backbone, trainer
            again = kind.load_from_checkpoint(path, map_location="cpu", weights_only=True)
        after = predict(name, again, images)
        same = len(before) == len(after) and all(map(torch.equal, before, after))
        return "yes" if same else "reloaded, it predicts something else"
    except FAILURES as e: return f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"

def check(library: str, family: str, tasks: tuple[str, ...] = TASKS) -> Row:
    "One family, tried in these tasks, classification first."
    import torch
    torch.manual_seed(0)
    start, row = time.perf_counter(), Row(library, family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            what, row.model, sides = what_to_build(library, family)
            pooled, maps = build(what, sides)
            row.parameters, row.width = sum(p.numel()
                                            for p in pooled.parameters()), pooled.num_features
            row.input_size = " x ".join(map(str, pooled.data_config["input_size"]))
            row.features = maps if isinstance(maps, str) else features(maps)
            row.tasks["classification"] = check_task("classification", pooled)
            del pooled      # some are of gigabytes
            for name in tasks[1:]:
                # A copy, since a task drops what it does not use; to build anew takes longer.
                row.tasks[name] = ("no feature maps" if isinstance(maps, str)
                                   else check_task(name, copy.deepcopy(maps)))
            if set(row.tasks.values()) - {"yes", "no feature maps"}: row.reason = "see the tasks"
        except FAILURES as e: row.reason = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
    row.seconds = time.perf_counter() - start
    return row

def _serve(pipe: Any) -> None:
    "Answer with a row for each family that comes through the pipe."
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import pytorch_lightning  # noqa: F401  sets the level of its log, which would tell of each Trainer
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    while (item := pipe.recv()) is not None: pipe.send(asdict(check(*item)))

def run(items: list[tuple[str, str]], jobs: int, limit: float) -> list[Row]:
    "All rows, in the order of `items`; `jobs` processes at a time, a new one where one was lost."
    context, todo = multiprocessing.get_context("spawn"), SimpleQueue()
    rows: dict[tuple[str, str], Row] = {}
    for item in items: todo.put(item)
    def work() -> None:
        process = None
        while True:
            try: item = todo.get_nowait()
            except Empty: break
            if process is None:
                pipe, other = context.Pipe()
                process = context.Process(target=_serve, args=(other,), daemon=True)
                process.start()
                other.close()
            pipe.send(item)
            try:
                row = (Row(**pipe.recv()) if pipe.poll(limit)
                       else Row(*item, reason=f"stopped after {limit:.0f} s", seconds=limit))
            except EOFError: row = Row(*item, reason="the process died (out of memory?)")
            # A process that held a large network keeps its memory; the next family gets a new one.
            if row.reason.startswith(("stopped", "the process")) or row.parameters > 5e7:
                process.kill()
                process.join()
                process = None
            rows[item] = row
            print(f"{len(rows):3}/{len(items)} {row.library:12} {row.family:28} {row.seconds:6.1f} "
                  f"s  {row.reason or 'ok'}",
                  file=sys.stderr, flush=True)
        if process is not None:
            pipe.send(None)
            process.join()
    with ThreadPoolExecutor(jobs) as pool:
        for o in [pool.submit(work) for _ in range(jobs)]: o.result()
    return [rows[item] for item in items]

def table(rows: list[Row]) -> str:
    "The rows as Markdown, under a line that sums them up."
    good = {lib: [o for o in rows if o.library == lib and not o.reason]
            for lib in ("timm", "transformers")}
    total = {lib: sum(o.library == lib for o in rows) for lib in good}
    versions = ", ".join(f"{o} {version(o)}" for o in ("torch", "timm", "transformers",
                                                       "pytorch-lightning") if _has(o))
    lines = ["# Backbone compatibility", "",
             "; ".join(f"{len(good[o])} of {total[o]} {o} families pass" for o in good if total[o])
             + f" ({versions}).", "",
             "Smallest model of each family, random weights, two images. In each task: one "
             "training step on objects, a prediction "
             "of the right form, and the same prediction from the reloaded checkpoint.", "",
             "| library | family | model | parameters (M) | input | width | channels / strides of the maps | " + " | ".join(TASKS)
             + " | s | note |", "|---|---|---|---:|---|---:|---|" + "---|" * len(TASKS)
             + "---:|---|"]
    lines += [f"| {o.library} | {o.family} | {o.model} | {o.parameters / 1e6:.2f} | {o.input_size} "
              f"| {o.width} | {o.features} | "
              + " | ".join(o.tasks.get(t, "") for t in TASKS) + f" | {o.seconds:.1f} | {o.reason} |"
              for o in rows]
    return "\n".join(lines) + "\n"

def _has(package: str) -> bool:
    from importlib.metadata import PackageNotFoundError
    try: return bool(version(package))
    except PackageNotFoundError: return False

def all_items() -> list[tuple[str, str]]:
    "Every family of timm, and the transformers classes if that library is installed."
    import timm
    return [("timm", o) for o in timm.list_modules()] + [("transformers", o) for o in TRANSFORMERS
                                                         if _has("transformers")]

def main() -> int:
    "Run, print the table; 1 if a family failed."
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sample", type=int, help="this many families, evenly spread")
    parser.add_argument("--family", action="append", help="this family only; may be repeated")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--limit", type=float, default=1800, help="seconds for one family")
    parser.add_argument("--out", type=Path, help="write the table to this file too")
    args = parser.parse_args()
    items = all_items()
    if args.family:
        unknown = set(args.family) - {o for _, o in items}
        if unknown: parser.error(f"unknown families: {', '.join(sorted(unknown))}")
        items = [o for o in items if o[1] in args.family]
    elif args.sample:
        items = [items[round(i * (len(items) - 1) / max(1, args.sample - 1))]
                 for i in range(min(args.sample, len(items)))]
    rows = run(items, max(1, args.jobs), args.limit)
    text = table(rows)
    print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text)
    return int(any(o.reason for o in rows))

if __name__ == "__main__": sys.exit(main())
