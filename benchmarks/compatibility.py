"""Does every backbone family build, train and reload as a classifier? One row a family.

    python benchmarks/compatibility.py                      # all families of timm, and the transformers classes
    python benchmarks/compatibility.py --sample 12          # twelve families, evenly spread
    python benchmarks/compatibility.py --family resnet --family ViT
    python benchmarks/compatibility.py --out benchmarks/results/compatibility.md

For each family of `timm.list_modules()` the model with the fewest parameters is taken, with random weights. It is built
as an `ImageClassifier`, run forward and backward in training mode on two images, saved as a checkpoint, loaded from it
and compared (equal logits); then built as a feature backbone, whose maps must have the channels and strides that it
reports, and run backward again. Each family runs in a process of its own choosing with a limit of time, so that one
that hangs or dies costs its own row only.
"""
import argparse
import logging
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

# Larger native sizes are run at this one where the network takes it: what is asked here does not depend on it.
LARGEST_SIDE, SMALLER_SIDE = 288, 224

_TOKENS = dict(hidden_size=48, num_hidden_layers=3, num_attention_heads=3, intermediate_size=64, image_size=64, patch_size=16)
_DINO = dict(hidden_size=48, num_hidden_layers=3, num_attention_heads=3, image_size=56, patch_size=14)
_STAGES = dict(hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 2, 1])
_WINDOWS = dict(embed_dim=12, depths=[1, 1, 2, 1], num_heads=[1, 2, 2, 4], window_size=4, image_size=128)
_HEADS = dict(num_attention_heads=[1, 2, 2, 4], hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1])
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "ViT": _TOKENS, "DeiT": _TOKENS, "Beit": _TOKENS, "Data2VecVision": _TOKENS,
    "Dinov2": _DINO, "Dinov2WithRegisters": _DINO, "DINOv3ViT": {**_TOKENS, "num_register_tokens": 4},
    "DINOv3ConvNext": {**_STAGES, "image_size": 64}, "Swin": _WINDOWS, "Swinv2": _WINDOWS,
    "ConvNext": {**_STAGES, "image_size": 64}, "ConvNextV2": {**_STAGES, "image_size": 64},
    "ResNet": {**_STAGES, "embedding_size": 16}, "RegNet": {**_STAGES, "embedding_size": 16, "groups_width": 8},
    "Segformer": _HEADS, "PoolFormer": _STAGES, "PvtV2": {**_HEADS, "image_size": 64},
    "Hiera": dict(embed_dim=16, depths=[1, 1, 2, 1], num_heads=[1, 2, 4, 8], image_size=[64, 64]),
    "ViTMSN": _TOKENS, "SiglipVision": _TOKENS, "CLIPVision": _TOKENS, "MobileViT": dict(image_size=64),
    "MobileNetV2": dict(depth_multiplier=0.35, image_size=64),
    "EfficientNet": dict(width_coefficient=0.35, depth_coefficient=0.35, hidden_dim=448, image_size=64),
}

@dataclass
class Row:
    "What was found of one family; `reason` is empty if all went well."
    library: str
    family: str
    model: str = ""
    parameters: int = 0
    input_size: str = ""
    width: int = 0
    trains: str = ""
    reloads: str = ""
    features: str = ""
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

def what_to_build(library: str, family: str) -> tuple[Any, str]:
    "What `backbone=` gets for a family, and its name."
    from autotimm.backbones import BackboneConfig
    if library == "transformers":
        import transformers
        return getattr(transformers, f"{family}Config")(**TRANSFORMERS[family]), f"{family}Model"
    import timm
    name = smallest_model(family)
    known = timm.get_pretrained_cfg(name)
    extra = dict(img_size=SMALLER_SIDE) if known and known.input_size[-1] > LARGEST_SIDE else {}
    return BackboneConfig(name, pretrained=False, extra_kwargs=extra), name

def trains(model: Any, outputs: Any) -> str:
    "Backward from a sum of outputs; 'yes' if every parameter that learns has a finite gradient."
    import torch
    model.zero_grad()
    sum(o.float().square().mean() for o in outputs).backward()
    learning = {n: p for n, p in model.named_parameters() if p.requires_grad}
    without = [n for n, p in learning.items() if p.grad is None]
    if without: return f"no gradient: {without[:3]}"
    bad = [n for n, p in learning.items() if not torch.isfinite(p.grad).all()]
    return f"not finite: {bad[:3]}" if bad else "yes"

def check_classifier(what: Any, row: Row) -> None:
    "Build, train one step and reload from a checkpoint."
    import torch
    from autotimm.tasks.classification import ImageClassifier
    from pytorch_lightning import Trainer
    model = ImageClassifier(backbone=what, num_classes=3)
    size = model.backbone.data_config["input_size"]
    row.parameters = sum(p.numel() for p in model.backbone.parameters())
    row.input_size, row.width = " x ".join(map(str, size)), model.backbone.num_features
    x = torch.randn(2, *size)
    model.train()
    row.trains = trains(model, [model(x)])
    model.zero_grad()
    model.eval()
    with torch.no_grad(): before = model(x)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
                          enable_model_summary=False)
        trainer.strategy.connect(model)
        trainer.save_checkpoint(path := Path(folder) / "model.ckpt")
        del model
        again = ImageClassifier.load_from_checkpoint(path, map_location="cpu", weights_only=True).eval()
    with torch.no_grad(): after = again(x)
    row.reloads = "yes" if torch.equal(before, after) else f"differs by {float((before - after).abs().max()):.1e}"

def check_features(what: Any, row: Row) -> None:
    "Build as a feature backbone; its maps must be what it says."
    import torch
    from autotimm.backbones import create_feature_backbone, get_feature_channels, get_feature_strides
    try: model = create_feature_backbone(what)
    except AttributeError as e:
        row.features = f"none: {e}"
        return
    size = model.data_config["input_size"]
    maps = model.train()(torch.randn(2, *size))
    channels, strides = get_feature_channels(model), get_feature_strides(model)
    good = all(o.shape[1] == c and -1 < size[1] / s - o.shape[2] < 4.5 for o, c, s in zip(maps, channels, strides, strict=True))
    learned = trains(model, maps)
    row.features = f"{channels} / {strides}"
    if not good: row.reason = f"maps of {[tuple(o.shape) for o in maps]}"
    elif learned != "yes": row.reason = f"features: {learned}"

def check(library: str, family: str) -> Row:
    "One family, tried in full."
    import torch
    torch.manual_seed(0)
    start, row = time.perf_counter(), Row(library, family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            what, row.model = what_to_build(library, family)
            check_classifier(what, row)
            check_features(what, row)
            if {row.trains, row.reloads} != {"yes"}: row.reason = row.reason or "see the columns"
        except (RuntimeError, ValueError, TypeError, AssertionError, AttributeError, KeyError, ImportError, MemoryError) as e:
            row.reason = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
    row.seconds = time.perf_counter() - start
    return row

def _serve(pipe: Any) -> None:
    "Answer with a row for each family that comes through the pipe."
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
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
            try: row = Row(**pipe.recv()) if pipe.poll(limit) else Row(*item, reason=f"stopped after {limit:.0f} s", seconds=limit)
            except EOFError: row = Row(*item, reason="the process died (out of memory?)")
            # A process that held a large network keeps its memory; the next family gets a new one.
            if row.reason.startswith(("stopped", "the process")) or row.parameters > 5e7:
                process.kill()
                process.join()
                process = None
            rows[item] = row
            print(f"{len(rows):3}/{len(items)} {row.library:12} {row.family:28} {row.seconds:6.1f} s  {row.reason or 'ok'}",
                  file=sys.stderr, flush=True)
        if process is not None:
            pipe.send(None)
            process.join()
    with ThreadPoolExecutor(jobs) as pool:
        for o in [pool.submit(work) for _ in range(jobs)]: o.result()
    return [rows[item] for item in items]

def table(rows: list[Row]) -> str:
    "The rows as Markdown, under a line that sums them up."
    good = {lib: [o for o in rows if o.library == lib and not o.reason] for lib in ("timm", "transformers")}
    total = {lib: sum(o.library == lib for o in rows) for lib in good}
    versions = ", ".join(f"{o} {version(o)}" for o in ("torch", "timm", "transformers", "pytorch-lightning") if _has(o))
    lines = ["# Backbone compatibility", "",
             "; ".join(f"{len(good[o])} of {total[o]} {o} families pass" for o in good if total[o]) + f" ({versions}).", "",
             "Smallest model of each family, random weights, two images: built as a classifier, forward and backward, "
             "reloaded from its checkpoint with equal logits, and as a feature backbone.", "",
             "| library | family | model | parameters (M) | input | width | trains | reloads | channels / strides of the maps | s | note |",
             "|---|---|---|---:|---|---:|---|---|---|---:|---|"]
    lines += [f"| {o.library} | {o.family} | {o.model} | {o.parameters / 1e6:.2f} | {o.input_size} | {o.width} | {o.trains} | "
              f"{o.reloads} | {o.features} | {o.seconds:.1f} | {o.reason} |" for o in rows]
    return "\n".join(lines) + "\n"

def _has(package: str) -> bool:
    from importlib.metadata import PackageNotFoundError
    try: return bool(version(package))
    except PackageNotFoundError: return False

def all_items() -> list[tuple[str, str]]:
    "Every family of timm, and the transformers classes if that library is installed."
    import timm
    return [("timm", o) for o in timm.list_modules()] + [("transformers", o) for o in TRANSFORMERS if _has("transformers")]

def main() -> int:
    "Run, print the table; 1 if a family failed."
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sample", type=int, help="this many families, evenly spread")
    parser.add_argument("--family", action="append", help="this family only; may be repeated")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--limit", type=float, default=600, help="seconds for one family")
    parser.add_argument("--out", type=Path, help="write the table to this file too")
    args = parser.parse_args()
    items = all_items()
    if args.family:
        unknown = set(args.family) - {o for _, o in items}
        if unknown: parser.error(f"unknown families: {', '.join(sorted(unknown))}")
        items = [o for o in items if o[1] in args.family]
    elif args.sample: items = [items[round(i * (len(items) - 1) / max(1, args.sample - 1))] for i in range(min(args.sample, len(items)))]
    rows = run(items, max(1, args.jobs), args.limit)
    text = table(rows)
    print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text)
    return int(any(o.reason for o in rows))

if __name__ == "__main__": sys.exit(main())
