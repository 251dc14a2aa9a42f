"""What must hold on a GPU besides speed: `python benchmarks/gpu.py --part correctness [--device
cpu] [--check NAME]`.

Each check is a function that takes the device and returns whether it passed (None: it says nothing
on this device) and the
figure to show. Each runs in a process of its own, since a failed device assertion ends the use of a
GPU in the whole process, and
within a time of its own, so that all of them together take at most eight minutes.
"""
import contextlib
import copy
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import timm
import torch
from common import keep_quiet, machine, table
from pytorch_lightning.callbacks import WeightAveraging
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset

from autotimm import (AutoTrainer, BackboneConfig, DetectionDataModule, FeatureBackboneConfig,
                      ImageClassifier, ImageDataModule,
                      InstanceSegmentationDataModule, InstanceSegmentor, MultiLabelImageDataModule,
                      ObjectDetector,
                      SegmentationDataModule, SemanticSegmentor, YOLOXDetector)
from autotimm.seeding import random_states, set_random_states
from autotimm.testing import write_coco, write_folders, write_masks, write_multilabel_csv

HERE = Path(__file__).resolve().parent
TESTS = HERE.parent / "tests"
MINUTES, SIZE, CLASSES = 8, 64, 3
KINDS = ("classifier", "multilabel", "segmentor", "fcos", "yolox", "darknet", "masks")
BOXES = ("fcos", "yolox", "darknet", "masks")
Outcome = tuple[bool | None, str]


# Models and data of each task

def build(kind: str, **kwargs: Any) -> pl.LightningModule:
    "A small model of a task, at 64 pixels, for three classes."
    plain, maps = (BackboneConfig("test_resnet", pretrained=False),
                   FeatureBackboneConfig("test_resnet", pretrained=False))
    kwargs = dict(image_size=SIZE, lr=1e-2, seed=0, scheduler=None) | kwargs
    if kind in ("classifier", "multilabel"):
        return ImageClassifier(plain, CLASSES, kind == "multilabel", **kwargs)
    if kind == "segmentor":
        return SemanticSegmentor(maps, CLASSES + 1, **({"head_type": "fcn"} | kwargs))
    if kind == "darknet":
        return YOLOXDetector("yolox-nano", CLASSES, **{"ema_decay": None, **kwargs})
    boxes = dict(fpn_channels=16, head_num_convs=1) | kwargs
    if kind == "masks": return InstanceSegmentor(maps, CLASSES, masks_per_image=4, **boxes)
    return ObjectDetector(maps, CLASSES, kind, **boxes)


def data_of(kind: str, folder: Path, batch_size: int = 4, train: int = 12, val: int = 5,
            **kwargs: Any) -> pl.LightningDataModule:
    "Made-up images of a task, written to a folder where they are not there yet."
    common: dict[str, Any] = dict(image_size=SIZE, batch_size=batch_size, num_workers=0, **kwargs)
    look: dict[str, Any] = dict(image_size=90, num_classes=CLASSES)
    done, place = folder / f"{kind}-{train}-{val}.done", folder / f"{kind}-{train}-{val}"
    splits = dict(train=train, val=val) if kind not in BOXES else dict(train2017=train, val2017=val)
    write = {"classifier": write_folders, "multilabel": write_multilabel_csv,
             "segmentor": write_masks}.get(kind, write_coco)
    if not done.exists():
        write(place, splits=splits, **look)
        done.touch()
    if kind == "classifier": return ImageDataModule(place, **common)
    if kind == "multilabel":
        return MultiLabelImageDataModule(place / "train.csv", val_csv=place / "val.csv",
                                         image_dir=place / "images", **common)
    if kind == "segmentor": return SegmentationDataModule(place, **common)
    return (InstanceSegmentationDataModule if kind == "masks"
            else DetectionDataModule)(place, **common)


def batches_of(kind: str, folder: Path, count: int = 3) -> list[Any]:
    """Training batches as the data module of a task makes them, without augmentation that differs
    from call to call."""
    data = data_of(kind, folder, train=4 * count)
    data.setup("fit")
    torch.manual_seed(0)
    return list(data.train_dataloader())[:count]


def fixed(batches: list[Any]) -> DataLoader:
    "These batches, again in each epoch."
    return DataLoader(batches, batch_size=None)


def trainer_on(device: torch.device, folder: Path | str, **kwargs: Any) -> AutoTrainer:
    "A quiet trainer on one device that keeps no checkpoint."
    where = {"cpu": "cpu", "mps": "mps"}.get(device.type, "gpu")
    return AutoTrainer(**(dict(accelerator=where, devices=1, default_root_dir=str(folder),
                               enable_progress_bar=False, enable_checkpointing=False,
                               enable_model_summary=False) | kwargs))


def wait_for(device: torch.device) -> None:
    "Let a device finish what it was given."
    if device.type == "cuda": torch.cuda.synchronize(device)
    elif device.type == "mps": torch.mps.synchronize()


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    "A folder for a while."
    with tempfile.TemporaryDirectory() as folder: yield Path(folder)


def verdict(wrong: list[str], right: str) -> Outcome:
    "Passed if nothing is wrong; else what is."
    return not wrong, "; ".join(wrong[:3]) + (f"; and {len(wrong) - 3} more" if len(wrong) > 3
                                              else "") if wrong else right


# The batch size

class Pictures(Dataset):
    "Images that cost nothing to read."
    def __init__(self, n: int, size: int): self.n, self.image = n, torch.zeros(3, size, size)
    def __len__(self) -> int: return self.n
    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]: return self.image, i % CLASSES


class PictureData(pl.LightningDataModule):
    "Such images, in batches of a size that is to be found."
    def __init__(self, n: int, size: int):
        super().__init__()
        self.n, self.size, self.batch_size = n, size, "auto"

    def loader(self) -> DataLoader:
        return DataLoader(Pictures(self.n, self.size), int(self.batch_size))
    def train_dataloader(self) -> DataLoader: return self.loader()
    def val_dataloader(self) -> DataLoader: return self.loader()


class Peak(pl.Callback):
    "The memory that the device had set aside at most, from the start of the training on."
    reserved = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if pl_module.device.type == "cuda": torch.cuda.reset_peak_memory_stats()

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        if pl_module.device.type == "cuda": self.reserved = torch.cuda.max_memory_reserved()


def batch_size(device: torch.device) -> Outcome:
    """batch_size='auto' finds a size; training with it, averaging the weights and validating, does
    not run out of memory."""
    cuda, peak = device.type == "cuda", Peak()
    free, total = torch.cuda.mem_get_info(device) if cuda else (0, 0)
    name, size, n = ("resnet50", 224, 16384) if cuda else ("test_resnet", 32, 64)
    model = ImageClassifier(timm.create_model(name, num_classes=0), CLASSES, image_size=size,
                            scheduler=None, ema_decay=0.999)
    with scratch() as folder:
        trainer = trainer_on(device, folder, max_steps=6, limit_val_batches=2, callbacks=[peak])
        trainer.fit(model, datamodule=PictureData(n, size))
    found = trainer.tuning.batch_size
    if not cuda: return trainer.global_step > 0, f"{found.suggestion}: {found.reason}"
    left = 1 - peak.reserved / free
    figure = f"{found.suggestion} in {len(found.sizes)} trials; {peak.reserved / 2**30:.1f} of {total / 2**30:.1f} GiB at most, {left:.0%} of the free left"
    return trainer.global_step == 6 and left >= 0.05 and found.suggestion < n, figure


# Deterministic algorithms

def variants() -> Iterator[tuple[str, str, dict[str, Any]]]:
    "Every task with each of its losses and heads: name, kind, arguments."
    for loss in ("cross_entropy", "bce_with_logits", "focal", "asymmetric"):
        if loss != "asymmetric": yield f"classifier/{loss}", "classifier", dict(loss_fn=loss)
        if loss != "cross_entropy": yield f"multilabel/{loss}", "multilabel", dict(loss_fn=loss)
    yield "classifier/mixup", "classifier", dict(mixup_alpha=0.4, cutmix_alpha=0.4, drop_rate=0.2)
    for loss in ("ce", "dice", "focal", "tversky", "combined"):
        yield f"fcn/{loss}", "segmentor", dict(head_type="fcn", loss_type=loss)
    for head in ("deeplabv3plus", "fpn", "upernet"):
        yield f"{head}/combined", "segmentor", dict(head_type=head)
    for kind, loss, boxes in (*itertools.product(["fcos"], ["focal", "bce_with_logits"],
                                                 ["giou", "iou", "diou", "ciou"]),
                              ("masks", "focal", "giou")):
        yield f"{kind}/{loss}/{boxes}", kind, dict(cls_loss_fn=loss, reg_loss_fn=boxes)
    for kind in ("yolox", "darknet"): yield kind, kind, {}


def trained(kind: str, batches: list[Any], device: torch.device, folder: Path,
            **kwargs: Any) -> dict[str, torch.Tensor]:
    "The weights after a few steps and a validation with deterministic=True."
    model = build(kind, deterministic=True, **kwargs)
    pl.seed_everything(1, verbose=False)
    trainer_on(device, folder, max_steps=3, limit_val_batches=1).fit(model, fixed(batches),
                                                                     fixed(batches[:1]))
    return {k: v.detach().cpu() for k, v in model.state_dict().items()}


def switches() -> tuple[Any, ...]:
    "What deterministic=True switches over."
    cudnn = torch.backends.cudnn
    return (torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark,
            os.environ.get("CUBLAS_WORKSPACE_CONFIG"))


def determinism(device: torch.device) -> Outcome:
    """With deterministic=True two runs end in the same weights, or an error names what cannot be
    repeated; the switches are put back."""
    wrong, refused, same, before = [], [], 0, switches()
    with scratch() as folder:
        made = {kind: batches_of(kind, folder, 2) for kind in KINDS}
        for name, kind, kwargs in variants():
            try:
                first, second = (trained(kind, made[kind], device, folder, **kwargs)
                                 for _ in range(2))
            except (RuntimeError, ValueError) as e:
                if "deterministic" in str(e): refused.append(f"{name} ({str(e).split()[0]})")
                else: wrong.append(f"{name}: {type(e).__name__}: {str(e)[:120]}")
                continue
            other = [k for k, v in first.items() if not torch.equal(v, second[k])]
            if other: wrong.append(f"{name}: {len(other)} tensors differ, e.g. {other[0]}")
            else: same += 1
            if switches() != before: wrong.append(f"{name}: switches left as {switches()}")
    text = f"{same} of {same + len(refused)} equal bit for bit" + (f"; refused by name: "
                                                                   f"{', '.join(refused)}"
                                                                   if refused else "")
    return verdict(wrong, text)


# What a step waits for

class Reads(TorchDispatchMode):
    "Counts the operations that would wait for a GPU: the stand-in on a CPU."
    names = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_consecutive",
             "equal", "is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.where: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        stack = traceback.extract_stack() if func.overloadpacket.__name__ in self.names else []
        # torchmetrics looks whether numbers are probabilities where they lie on the CPU alone.
        if stack and not any(o.name == "normalize_logits_if_needed" and "torchmetrics" in o.filename
                             for o in stack):
            line = next((o for o in reversed(stack) if "autotimm" in o.filename
                         and "benchmarks" not in o.filename), None)
            self.where.append(f"{Path(line.filename).name}:{line.lineno}" if line else "elsewhere")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def waits(device: torch.device, found: list[str]) -> Iterator[None]:
    "Note each place that waits for the device while a block runs."
    if device.type != "cuda":
        with Reads() as reads: yield
        found += reads.where
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try: yield
        finally: torch.cuda.set_sync_debug_mode("default")
    found += [f"{Path(o.filename).name}:{o.lineno}" for o in caught
              if "synchroniz" in str(o.message)]


def count_waits(kind: str, device: torch.device, folder: Path) -> list[str]:
    "Where training_step waits for the device, in the last of three steps."
    model, found = build(kind), []
    step = model.training_step

    def watched(batch: Any, batch_idx: int) -> Any:
        with waits(device, found) if batch_idx == 2 else contextlib.nullcontext():
            return step(batch, batch_idx)
    model.training_step = watched  # type: ignore[method-assign]
    trainer_on(device, folder, max_steps=3).fit(model, fixed(batches_of(kind, folder)))
    return found


def host_synchronisations(device: torch.device) -> Outcome:
    """A step of a task without boxes waits for nothing; one with boxes once, for the number of
    places that have an object."""
    wrong, counts = [], {}
    with scratch() as folder:
        for kind in KINDS:
            found, most = count_waits(kind, device, folder), int(kind in BOXES)
            counts[kind] = len(found)
            if len(found) > most:
                wrong.append(f"{kind}: {len(found)} in place of {most} "
                             f"({', '.join(f'{k} x{n}' for k, n in Counter(found).most_common(3))})")
    return verdict(wrong, ", ".join(f"{k} {n}" for k, n in counts.items()))


# Prediction

def places(model: torch.nn.Module) -> list[tuple[str, int]]:
    "Where each tensor of a model lies."
    return [(str(o.device), o.data_ptr()) for o in (*model.parameters(), *model.buffers())]


def milliseconds(call: Callable[[], Any], device: torch.device, times: int = 15) -> float:
    "The median of several calls, after two that do not count."
    taken = []
    for _ in range(times + 2):
        wait_for(device)
        start = time.perf_counter()
        call()
        wait_for(device)
        taken.append(1000 * (time.perf_counter() - start))
    return sorted(taken[2:])[times // 2]


def prediction(device: torch.device) -> Outcome:
    """Calls of predict() one after the other: the model stays where it is, and a call costs little
    more than the same by hand."""
    model, wrong = ImageClassifier(timm.create_model("resnet18", num_classes=0), CLASSES).eval(), []
    image = np.random.default_rng(0).integers(0, 255, (224, 224, 3), dtype=np.uint8)
    transform = model.get_transform()

    def by_hand() -> None:
        with torch.inference_mode():
            model(transform(image)[None].to(next(model.parameters()).device)).softmax(-1).cpu()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        here = places(model)
        for _ in range(3): model.predict(image)
        if places(model) != here: wrong.append("a model on the CPU was moved")
        named = [o for o in caught if device.type in str(o.message) and "predict" in str(o.message)]
        if device.type != "cpu" and not named:
            wrong.append("nothing says that an accelerator stands idle")
    model.to(device)
    there = places(model)
    ours, theirs = milliseconds(lambda: model.predict(image), device), milliseconds(by_hand, device)
    if places(model) != there: wrong.append("a model on the device was moved")
    if ours > 2 * theirs + 5: wrong.append(f"a call takes {ours:.1f} ms, by hand {theirs:.1f} ms")
    return verdict(wrong, f"{ours:.1f} ms a call, by hand {theirs:.1f} ms; not moved")


# Labels, coordinates

def spoilt(kind: str, batch: Any) -> Any:
    "A batch with a label that is no class."
    if kind == "classifier":
        return batch[0], batch[1].clone().index_fill(0, torch.tensor([0]), CLASSES)
    if kind == "multilabel": return batch[0], batch[1] + 2
    batch = dict(batch)
    if kind == "segmentor":
        batch["mask"] = batch["mask"].clone().index_fill(0, torch.tensor([0]), 77)
    else: batch["labels"] = [o + CLASSES for o in batch["labels"]]
    return batch


def labels(device: torch.device) -> Outcome:
    "A label out of range, in the second batch, is a ValueError, and the device can still be used."
    wrong = []
    with scratch() as folder:
        for kind in KINDS:
            first, second = batches_of(kind, folder, 2)
            try:
                trainer_on(device, folder, max_epochs=1).fit(build(kind),
                                                             fixed([first, spoilt(kind, second)]))
            except ValueError as e:
                if not any(o in str(e).lower() for o in ("label", "class", "0 to 1")):
                    wrong.append(f"{kind}: {str(e)[:100]}")
            else: wrong.append(f"{kind}: no error")
            torch.ones(3, device=device).sum().item()
    return verdict(wrong, f"ValueError in {len(KINDS)} of {len(KINDS)} tasks, device unharmed")


class Caught(pl.Callback):
    "The coordinates of the first batch as the model gets them."
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any,
                             batch_idx: int) -> None:
        self.batch = {k: batch[k] for k in ("boxes", "area", "letterbox") if k in batch}
        trainer.should_stop = True
        raise StopIteration


def flat(value: Any) -> list[torch.Tensor]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def coordinates(device: torch.device) -> Outcome:
    """Boxes, areas and letterbox rows reach the model in float32 and unchanged, also where all else
    is in half precision."""
    wrong, most = [], 0.0
    with scratch() as folder:
        for kind, precision in itertools.product(BOXES, ("bf16-true", "16-true")):
            batches, caught = batches_of(kind, folder, 1), Caught()
            with contextlib.suppress(StopIteration):
                trainer_on(device, folder, max_steps=1, precision=precision,
                           callbacks=[caught]).fit(build(kind), fixed(batches))
            for name, value in caught.batch.items():
                for got, true in zip(flat(value), flat(batches[0][name])):
                    off = (float((got.cpu().double() - true.double()).abs().max())
                           if true.numel() else 0.0)
                    most = max(most, off)
                    if off or got.dtype != torch.float32:
                        wrong.append(f"{kind}, {precision}: {name} in {got.dtype}, off by up to "
                                     f"{off:.3g}")
    return verdict([*dict.fromkeys(wrong)], f"{len(BOXES)} tasks in bf16-true and 16-true: "
                                            f"float32, off by {most:g}")


# Runs that go on

def settings(folder: Path, device: torch.device, kind: str, **more: Any) -> dict[str, Path]:
    """Files for tests/exact_run.py: an unbroken run, one that is broken off, and one that goes on
    from there."""
    paths = {}
    for name, part in (("whole", {}), ("broken", more), ("resumed", {"resume": True})):
        root = folder / ("whole" if name == "whole" else "broken")
        root.mkdir(parents=True, exist_ok=True)
        about = {"data": str(folder / f"data-{name}"), "root": str(root),
                 "out": str(folder / f"{name}.pt"), "kind": kind,
                 "accelerator": "cpu" if device.type == "cpu" else "gpu", "deterministic": True,
                 # bfloat16, which a CPU would take instead, is not the same there in two unbroken
                 # runs.
                 "precision": "32-true" if device.type == "cpu" else "16-mixed", **part}
        paths[name] = folder / f"{name}.json"
        paths[name].write_text(json.dumps(about))
    return paths


def run_together(paths: list[Path], seconds: float, at_once: int) -> list[int]:
    "The exit status of each run, in a process of its own."
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(
        filter(None, [str(TESTS), str(HERE.parent), os.environ.get("PYTHONPATH")]))}

    def one(path: Path) -> int:
        command = [sys.executable, str(TESTS / "exact_run.py"), str(path)]
        with open(path.with_suffix(".log"), "w") as log:
            return subprocess.run(command, env=env, stdout=log, stderr=log,
                                  timeout=seconds).returncode
    with ThreadPoolExecutor(at_once) as pool: return list(pool.map(one, paths))


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    "Where two results are not the same, bit for bit."
    if isinstance(a, torch.Tensor):
        return [] if isinstance(b, torch.Tensor) and torch.equal(a.cpu(), b.cpu()) else [path]
    if isinstance(a, Mapping):
        if set(a) != set(b): return [path]
        return [o for k in a for o in differences(a[k], b[k], f"{path}.{k}")]
    if isinstance(a, (list, tuple)):
        if len(a) != len(b): return [path]
        return [o for i, (x, y) in enumerate(zip(a, b)) for o in differences(x, y, f"{path}[{i}]")]
    return [] if a == b else [path]


def compare(folder: Path) -> list[str]:
    "What differs between the unbroken run and the one that went on."
    whole, resumed = (torch.load(folder / f"{o}.pt", weights_only=False)
                      for o in ("whole", "resumed"))
    whole["seen"] = whole["seen"][-len(resumed["seen"]):]
    return differences(whole, resumed)


def resuming(device: torch.device) -> Outcome:
    """Runs in 16-mixed that are killed inside an epoch, or that fail inside a batch, end as
    unbroken ones: weights, scale, random numbers."""
    cases: dict[str, dict[str, Any]] = {"classifier": dict(kill=[1, 3]), "own": dict(kill=[1, 3]),
                                        "boxes": dict(kill=[1, 2]), "own, fails": dict(fail=[1, 3])}
    wrong, at_once = [], 1 if device.type == "cpu" else 8
    with scratch() as folder:
        paths = {case: settings(folder / case, device, case.split(",")[0], **how)
                 for case, how in cases.items()}
        first = [(case, name) for case in cases for name in ("whole", "broken")]
        status = dict(zip(first, run_together([paths[c][n] for c, n in first], 120, at_once)))
        status |= dict(zip([(c, "resumed") for c in cases],
                           run_together([paths[c]["resumed"] for c in cases], 120, at_once)))
        for case in cases:
            expected = {"whole": 0, "broken": -signal.SIGKILL if "kill" in cases[case] else 1,
                        "resumed": 0}
            ends = {name: status[case, name] for name in expected}
            if ends == expected:
                found = [f"differ: {', '.join(o[:3])}"] if (o := compare(folder / case)) else []
            else:
                found = [f"ended with {ends}: "
                         + (folder / case
                            / f"{next(n for n in ends if ends[n] != expected[n])}.log").read_text()[-200:]]
            wrong += [f"{case} {o}" for o in found]
    return verdict(wrong, f"{len(cases)} of {len(cases)} equal bit for bit: {'; '.join(cases)}")


def random_numbers(device: torch.device) -> Outcome:
    "The state of the device's random numbers is kept and put back."
    torch.rand(5, device=device)
    kept = random_states()
    first = torch.rand(1000, device=device)
    set_random_states(kept)
    same = torch.equal(first, torch.rand(1000, device=device))
    name = {"cuda": "cuda", "mps": "mps"}.get(device.type, "torch")
    return (same and name in kept, f"kept: {', '.join(kept)}; the same numbers again: "
                                   f"{'yes' if same else 'no'}")


# The average of the weights

def average_of(model: pl.LightningModule, device: torch.device, folder: Path) -> Any:
    "The average that `ema_decay` makes, as it stands when training starts."
    found = []

    class Begin(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            found.extend(copy.copy(o._average_model) for o in trainer.callbacks
                         if isinstance(o, WeightAveraging))
            trainer.should_stop = True
    trainer_on(device, folder, max_steps=1, callbacks=[Begin()]).fit(model,
                                                                     fixed(batches_of("darknet", folder, 1)))
    return found[0].to(device)


def weight_average(device: torch.device) -> Outcome:
    """A step of the average of a YOLOX waits for nothing, moves every tensor by the same share, and
    takes little time."""
    wrong: list[str] = []
    with scratch() as folder:
        model = build("darknet", ema_decay=0.99)
        average = average_of(model, device, folder)
    model.to(device)
    average.update_parameters(model)
    pairs = [(a, b) for a, b in zip(average.module.parameters(), model.parameters())]
    before = [a.detach().clone() for a, _ in pairs]
    with torch.no_grad():
        for _, b in pairs: b.add_(1)
    found: list[str] = []
    with waits(device, found): average.update_parameters(model)
    shares = torch.stack([((a - old) / (b - old)).mean() for (a, b),
                          old in zip(pairs, before)]).detach().cpu()
    if found: wrong.append(f"waits {len(found)} times")
    if float(shares.max() - shares.min()) > 1e-3 or not 0 < float(shares.mean()) < 1:
        wrong.append(f"moved by {float(shares.min()):.3f} to {float(shares.max()):.3f}")
    tensors = len(pairs) + len([*model.buffers()])
    ours = milliseconds(lambda: average.update_parameters(model), device)
    return verdict(wrong, f"{tensors} tensors in {ours:.2f} ms, {len(found)} waits, share "
                          f"{float(shares.mean()):.3f}")


# Several processes

METRICS = {"classifier": "val/accuracy", "multilabel": "val/f1", "segmentor": "val/miou",
           "fcos": "val/map", "yolox": "val/map", "darknet": "val/map", "masks": "val/mask_map"}


def worker(folder: Path, device: torch.device, processes: int) -> None:
    """Train two steps and validate in each task, as one of several processes; the first one writes
    its numbers down."""
    kind = {"strategy": "ddp", "devices": processes} if processes else {"devices": 1}
    numbers: dict[str, dict[str, float]] = {}
    for name in KINDS:
        model = build(name)
        trainer = trainer_on(device, folder, max_steps=2, enable_checkpointing=True, **kind)
        trainer.fit(model, datamodule=data_of(name, folder))
        # Weights of a file, since gradients of several processes are not those of one to the last
        # bit.
        found = trainer_on(device, folder, **kind).validate(build(name),
                                                            datamodule=data_of(name, folder),
                                                            verbose=False)[0]
        numbers[name] = {k: float(v) for k, v in found.items()}
        if torch.distributed.is_initialized():
            numbers[name]["group"] = torch.distributed.get_world_size()
    if int(os.environ.get("RANK", 0)) == 0:
        (folder / f"numbers-{processes}.json").write_text(json.dumps(numbers))


def launch(folder: Path, device: torch.device, processes: int) -> subprocess.CompletedProcess:
    "The workers under torchrun."
    torchrun = ["-m", "torch.distributed.run", "--standalone",
                f"--nproc-per-node={processes}"] if processes else []
    command = [sys.executable, *torchrun, str(HERE / "gpu.py"), "--part", "correctness",
               "--device", str(device), "--worker", str(folder), "--processes", str(processes)]
    return subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True, timeout=200)


def processes(device: torch.device) -> Outcome:
    """Training and validation of every task in a process group of the device's own: NCCL with two
    GPUs, or with one process."""
    count = min(2, torch.cuda.device_count()) if device.type == "cuda" else 2
    with scratch() as folder:
        for name in KINDS: data_of(name, folder)
        for n in (0, count):
            done = launch(folder, device, n)
            if done.returncode: return False, f"{n or 1} processes: {done.stderr.strip()[-300:]}"
        alone, together = (json.loads((folder / f"numbers-{n}.json").read_text())
                           for n in (0, count))
    wrong = [f"{name}: {key} {alone[name][key]:.4f} on one, "
             f"{together[name].get(key, float('nan')):.4f} on {count}" for name in KINDS
             for key in alone[name]
             if not abs(alone[name][key] - together[name].get(key, float("nan"))) <= 1e-4]
    wrong += [f"{name}: no group" for name in KINDS if together[name].get("group") != count]
    shown = ", ".join(f"{name} {together[name][METRICS[name]]:.3f}" for name in KINDS
                      if METRICS[name] in together[name])
    return verdict(wrong, f"{count} processes, {'NCCL' if device.type == 'cuda' else 'gloo'}, "
                          f"metrics of 5 images as on one: {shown}")


# All of them

# name -> (function, seconds it may take, whether it must have the device to itself)
CHECKS: dict[str, tuple[Callable[[torch.device], Outcome], int, bool]] = {
    "batch_size": (batch_size, 150, True), "prediction": (prediction, 60, True),
    "determinism": (determinism, 200, False),
    "host_synchronisations": (host_synchronisations, 90, False), "labels": (labels, 60, False),
    "coordinates": (coordinates, 60, False),
    "resuming": (resuming, 200, False), "random_numbers": (random_numbers, 60, False),
    "weight_average": (weight_average, 60, False),
    "processes": (processes, 200, False),
}


def run_check(name: str, device: torch.device) -> None:
    "One check in this process; the last line is its outcome."
    keep_quiet()
    if device.type == "cuda": torch.cuda.set_device(device)
    passed, figure = CHECKS[name][0](device)
    print("\n" + json.dumps({"passed": passed, "figure": figure}))


def in_its_own_process(name: str, device: str, end: float) -> list[object]:
    "A row of the table: the outcome of a check, or how it ended."
    start, command = time.monotonic(), [sys.executable, str(HERE / "gpu.py"), "--part",
                                        "correctness", "--device", device, "--check", name]
    limit = min(CHECKS[name][1] if device != "cpu" else 900, end - start)
    try: done = subprocess.run(command, capture_output=True, text=True, timeout=max(1, limit))
    except subprocess.TimeoutExpired: passed, figure = False, f"not over after {limit:.0f} s"
    else:
        if done.returncode:
            passed, figure = False, f"ended with {done.returncode}: {done.stderr.strip()[-300:]}"
        else: passed, figure = json.loads(done.stdout.splitlines()[-1]).values()
    about = (CHECKS[name][0].__doc__ or "").strip()
    answer = {True: "yes", False: "NO", None: "not here"}[passed]
    return [name, about, answer, " ".join(figure.replace("|", "/").split()),
            f"{time.monotonic() - start:.0f}"]


def main(device: str, names: list[str], at_once: int) -> bool:
    "Run the checks, print the table, and say whether all passed."
    start = time.monotonic()
    end = start + (60 * MINUTES - 10 if device != "cpu" else 3600)
    rows = {name: in_its_own_process(name, device, end) for name in names if CHECKS[name][2]}
    with ThreadPoolExecutor(at_once) as pool:
        rest = [name for name in names if not CHECKS[name][2]]
        rows |= dict(zip(rest, pool.map(lambda name: in_its_own_process(name, device, end), rest)))
    print(machine() + f", on {device}\n")
    print(table([rows[name] for name in names],
                ["check", "what must hold", "holds", "figure", "seconds"]))
    taken = time.monotonic() - start
    print(f"\n{taken:.0f} s in all" + (f"; at most {60 * MINUTES} s" if device != "cpu"
                                       else "; on a GPU at most eight minutes"))
    return all(row[2] != "NO" for row in rows.values())
