"""What does a training step cost beyond a hand-written loop?

The same model, data and optimiser, once through `AutoTrainer` (and `ImageClassifier` with its
accuracy metric), once in a
loop written by hand, interleaved in one run: medians of seven pairs. `python benchmarks/overhead.py
[--runs 7] [--cpu]`

`--cpu` counts processor time on one thread instead of time on the wall, for a computer that has
other things to do. The
network is slower on one thread and the Python around it is not, which flatters the ratio a little.
"""
import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import pytorch_lightning as pl
import timm
import torch
import transformers
from common import interleave, keep_quiet, machine, ratio, table
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from autotimm import AutoTrainer, ImageClassifier

CLASSES, WARMUP, MODELS = 10, 5, ("resnet18", "test_resnet", "vit", "convolution")
Timer = Callable[[], float]


class Run(NamedTuple):
    "What a side is given."
    data: DataLoader
    timer: Timer


Side = Callable[[Run], float]


def batches(steps: int, batch_size: int, size: int) -> DataLoader:
    """Ready batches, so that little but the step is timed; both sides take them from the same
    loader."""
    g = torch.Generator().manual_seed(0)
    made = [(torch.randn(batch_size, 3, size, size, generator=g),
             torch.randint(0, CLASSES, (batch_size,), generator=g))
            for _ in range(4)]
    return DataLoader([made[i % 4] for i in range(steps)], batch_size=None)


class Clock(pl.Callback):
    "Seconds a step, from the end of the warm-up to the end of the last step."
    def __init__(self, timer: Timer): self.timer = timer

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx == WARMUP - 1: self.start = self.timer()
        self.end, self.steps = self.timer(), batch_idx + 1 - WARMUP


def by_hand(model: nn.Module, run: Run, optimizer: torch.optim.Optimizer) -> float:
    "Seconds a step of the loop anyone would write."
    model.train()
    for i, (x, y) in enumerate(run.data):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        if i == WARMUP - 1: start = run.timer()
    return (run.timer() - start) / (len(run.data) - WARMUP)


def by_trainer(module: pl.LightningModule, run: Run) -> float:
    "Seconds a step through AutoTrainer."
    clock = Clock(run.timer)
    with tempfile.TemporaryDirectory() as folder:
        trainer = AutoTrainer(max_epochs=1, callbacks=[clock], default_root_dir=folder,
                              enable_progress_bar=False,
                              enable_model_summary=False, accelerator="cpu")
        trainer.fit(module, run.data)
    return (clock.end - clock.start) / clock.steps


class Own(pl.LightningModule):
    "A user's own module around a transformers model."
    def __init__(self, vit: nn.Module, width: int):
        super().__init__()
        self.vit, self.classifier = vit, nn.Linear(width, CLASSES)

    def forward(self, x): return self.classifier(self.vit(pixel_values=x).last_hidden_state[:, 0])

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train/loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self): return torch.optim.AdamW(self.parameters(), lr=1e-4)


def vit_tiny_config() -> Any:
    return transformers.ViTConfig(hidden_size=192, num_hidden_layers=12, num_attention_heads=3,
                                  intermediate_size=768)


def timm_sides(name: str) -> dict[str, Side]:
    def hand(run: Run) -> float:
        model = timm.create_model(name, num_classes=CLASSES)
        return by_hand(model, run, torch.optim.AdamW(model.parameters(), lr=1e-4,
                                                     weight_decay=1e-4))
    def ours(run: Run) -> float:
        return by_trainer(ImageClassifier(timm.create_model(name, num_classes=0), CLASSES,
                                          lr=1e-4, scheduler=None), run)
    return {"by hand": hand, "ImageClassifier": ours}


def vit_sides() -> dict[str, Side]:
    def vit() -> Any: return transformers.ViTModel(vit_tiny_config(), add_pooling_layer=False)
    def hand(run: Run) -> float:
        model = Own(vit(), 192)
        return by_hand(model, run, torch.optim.AdamW(model.parameters(), lr=1e-4))
    def own(run: Run) -> float: return by_trainer(Own(vit(), 192), run)
    def ours(run: Run) -> float:
        return by_trainer(ImageClassifier(vit(), CLASSES, lr=1e-4, scheduler=None), run)
    return {"by hand": hand, "own module": own, "backbone=": ours}


class Convolution(nn.Module):
    "A backbone of next to nothing: what a step costs with it is what stands around the network."
    num_features = 4

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x): return self.conv(x).mean((2, 3))


class Plain(pl.LightningModule):
    "The least that a user of Lightning writes: a step that logs its loss."
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(Convolution(), nn.Linear(4, CLASSES))

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train/loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self): return torch.optim.AdamW(self.parameters(), lr=1e-4)


def convolution_sides() -> dict[str, Side]:
    def hand(run: Run) -> float:
        model = nn.Sequential(Convolution(), nn.Linear(4, CLASSES))
        return by_hand(model, run, torch.optim.AdamW(model.parameters(), lr=1e-4))
    def plain(run: Run) -> float:
        clock = Clock(run.timer)
        pl.Trainer(max_epochs=1, callbacks=[clock], logger=False, enable_checkpointing=False,
                   enable_progress_bar=False,
                   enable_model_summary=False, accelerator="cpu").fit(Plain(), run.data)
        return (clock.end - clock.start) / clock.steps
    def ours(run: Run) -> float:
        return by_trainer(ImageClassifier(Convolution(), CLASSES, lr=1e-4, scheduler=None), run)
    return {"by hand": hand, "pl.Trainer": plain, "ImageClassifier": ours}


def measure(sides: dict[str, Side], run: Run, runs: int) -> dict[str, list[float]]:
    "Seconds a step of each side, by run."
    def seeded(side: Side) -> Callable[[], float]:
        def once() -> float:
            gc.collect()
            torch.manual_seed(0)
            return side(run)
        return once
    return interleave({name: seeded(side) for name, side in sides.items()}, runs)


def compared(times: dict[str, list[float]], side: str, base: str) -> list[str]:
    "The cells that compare two sides: names, medians, and the ratio of the pairs."
    ratios = sorted(a / b for a, b in zip(times[side], times[base]))
    ms = [f"{statistics.median(times[o]) * 1e3:.2f}" for o in (side, base)]
    return [f"{side} / {base}", " / ".join(ms), f"{ratio(times, side, base):.3f}",
            f"{ratios[0]:.3f} to {ratios[-1]:.3f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=MODELS)
    args = parser.parse_args()
    keep_quiet()
    if args.cpu: torch.set_num_threads(1)
    timer = time.process_time if args.cpu else time.perf_counter
    print(machine() + "\n", flush=True)
    rows = []
    for name, size, steps, limit in (("resnet18", 96, 25, 1.03), ("test_resnet", 64, 605, 1.05)):
        if name not in args.model: continue
        times = measure(timm_sides(name), Run(batches(steps, 16, size), timer), args.runs)
        rows.append([name, f"{size} px, batch 16", *compared(times, "ImageClassifier", "by hand"),
                     f"{limit:.2f}"])
    if "vit" in args.model:
        times = measure(vit_sides(), Run(batches(15, 8, 224), timer), args.runs)
        for side, base in (("own module", "by hand"), ("backbone=", "by hand"),
                           ("backbone=", "own module")):
            rows.append(["ViT-tiny (transformers)", "224 px, batch 8", *compared(times, side, base),
                         "1.03"])
    if "convolution" in args.model:
        times = measure(convolution_sides(), Run(batches(1005, 16, 8), time.process_time),
                        args.runs)
        for side, base in (("pl.Trainer", "by hand"), ("ImageClassifier", "by hand"),
                           ("ImageClassifier", "pl.Trainer")):
            rows.append(["one convolution, processor time", "8 px, batch 16",
                         *compared(times, side, base), ""])
    print(table(rows, ["model", "data", "sides", "ms a step", "median ratio",
                       "lowest and highest", "at most"]))


if __name__ == "__main__": main()
