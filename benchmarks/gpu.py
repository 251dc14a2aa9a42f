"""Mixed precision, speed, memory and FSDP on a GPU, and what must hold there.

`--part speed`: the fp16 and bf16 cells of the matrix on each route; ResNet-50 and ViT-B/16 at 224
in bf16 against a hand-written loop, images
a second and peak memory; FSDP with one process trains, saves and resumes. `--part correctness`:
what must
hold on a GPU besides, in at most eight minutes (gpu_correctness.py). `python benchmarks/gpu.py
[--part all] [--runs 5]`. Without a
GPU it says so and exits 0; `--part correctness --device cpu` runs on the CPU what makes sense
there.
"""
import argparse
import gc
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import gpu_correctness
import pytorch_lightning as pl
import timm
import torch
from common import interleave, keep_quiet, machine, ratio, table
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from autotimm import AutoTrainer, ImageClassifier
from autotimm.testing import LocalHub

WARMUP, CLASSES = 10, 10


class Own(pl.LightningModule):
    "A user's own module around a transformers model."
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.classifier = model, nn.Linear(model.config.hidden_size, CLASSES)

    def forward(self, x): return self.classifier(self.model(pixel_values=x).last_hidden_state[:, 0])

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self): return torch.optim.AdamW(self.parameters(), lr=1e-3)


def small_data(size: int) -> DataLoader:
    "Images whose class is their brightness: easy to learn."
    g = torch.Generator().manual_seed(0)
    y = torch.arange(64) % CLASSES
    x = torch.randn(64, 3, size, size, generator=g) * 0.3 + (y.float()[:, None, None, None]
                                                             - 4.5) / 2
    return DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True)


def routes(hub: LocalHub) -> dict[str, Any]:
    "Route -> function that makes its module."
    from transformers import AutoModel, ViTConfig, ViTModel
    config = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
                  intermediate_size=128, image_size=64, patch_size=16)
    hub.add_timm("gpu/resnet", "test_resnet", num_classes=0)
    hub.add_transformers("gpu/vit", ViTConfig(**config))
    return {
        "Hub timm": lambda: ImageClassifier("hf-hub:gpu/resnet", CLASSES, image_size=64),
        "transformers direct": lambda: Own(ViTModel(ViTConfig(**config))),
        "transformers Auto": lambda: Own(AutoModel.from_pretrained("gpu/vit",
                                                                   trust_remote_code=False)),
        "transformers by backbone=": lambda: ImageClassifier(ViTConfig(**config), CLASSES,
                                                             image_size=64),
    }


def precision_cells() -> list[list[object]]:
    "Each route in fp16 and bf16: first and last loss."
    rows: list[list[object]] = []
    with LocalHub() as hub:
        for route, make in routes(hub).items():
            for precision in ("16-mixed", "bf16-mixed"):
                torch.manual_seed(0)
                losses: list[float] = []

                class Losses(pl.Callback):
                    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx,
                                           losses=losses):
                        losses.append(float(outputs["loss"]))

                with tempfile.TemporaryDirectory() as folder:
                    trainer = AutoTrainer(max_epochs=8, precision=precision, accelerator="gpu",
                                          devices=1, callbacks=[Losses()],
                                          default_root_dir=folder, enable_progress_bar=False,
                                          enable_model_summary=False)
                    trainer.fit(make(), small_data(64))
                good = losses[-1] < losses[0] and all(v == v for v in losses)
                rows.append([route, precision, f"{losses[0]:.3f}", f"{losses[-1]:.3f}",
                             "yes" if good else "NO"])
    return rows


def batches(batch_size: int, steps: int) -> DataLoader:
    "One batch that lies on the GPU, again and again: only the step is timed."
    batch = torch.randn(batch_size, 3, 224, 224,
                        device="cuda"), torch.randint(0, 1000, (batch_size,), device="cuda")
    return DataLoader([batch] * steps, batch_size=None)


def by_hand(name: str, batch_size: int, steps: int) -> float:
    "Seconds a step of the loop anyone would write in bf16."
    model = timm.create_model(name, num_classes=1000).cuda().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for i, (x, y) in enumerate(batches(batch_size, steps)):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.bfloat16): loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        if i == WARMUP - 1:
            torch.cuda.synchronize()
            start = time.perf_counter()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / (steps - WARMUP)


class Clock(pl.Callback):
    "Seconds a step, from the end of the warm-up to the end of the epoch."
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx == WARMUP - 1:
            torch.cuda.synchronize()
            self.start = time.perf_counter()
        self.steps = batch_idx + 1 - WARMUP

    def on_train_epoch_end(self, trainer, module):
        torch.cuda.synchronize()
        self.seconds = (time.perf_counter() - self.start) / self.steps


def by_trainer(name: str, batch_size: int, steps: int) -> float:
    "Seconds a step through AutoTrainer and ImageClassifier in bf16."
    clock = Clock()
    model = ImageClassifier(timm.create_model(name, num_classes=0), 1000, lr=1e-4, scheduler=None)
    with tempfile.TemporaryDirectory() as folder:
        trainer = AutoTrainer(max_epochs=1, precision="bf16-mixed", accelerator="gpu",
                              devices=1, callbacks=[clock],
                              default_root_dir=folder, enable_progress_bar=False,
                              enable_model_summary=False,
                              enable_checkpointing=False)
        trainer.fit(model, batches(batch_size, steps))
    return clock.seconds


def speed(name: str, batch_size: int, steps: int, runs: int) -> list[object]:
    "One row: images a second and peak memory of both sides."
    peaks: dict[str, float] = {}

    def side(label: str, run: Any) -> Any:
        def once() -> float:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            seconds = run(name, batch_size, steps)
            peaks[label] = torch.cuda.max_memory_allocated() / 2**30
            return seconds
        return once

    times = interleave({"hand": side("hand", by_hand), "ours": side("ours", by_trainer)}, runs)
    best = {k: batch_size / sorted(v)[len(v) // 2] for k, v in times.items()}
    return [name, batch_size, f"{best['hand']:.0f}", f"{best['ours']:.0f}",
            f"{1 / ratio(times, 'ours', 'hand'):.3f}", "0.97",
            f"{peaks['hand']:.2f}", f"{peaks['ours']:.2f}"]


def fsdp() -> list[object]:
    "FSDP with one process: train two epochs, save, resume for two more."
    from pytorch_lightning.strategies import FSDPStrategy
    with tempfile.TemporaryDirectory() as folder:
        common: dict[str, Any] = dict(accelerator="gpu", devices=1, default_root_dir=folder,
                                      enable_progress_bar=False,
                                      enable_model_summary=False)
        def model() -> ImageClassifier:
            torch.manual_seed(0)
            return ImageClassifier(timm.create_model("test_vit", num_classes=0, img_size=64),
                                   CLASSES, image_size=64)
        first = AutoTrainer(max_epochs=2, strategy=FSDPStrategy(state_dict_type="full"), **common)
        first.fit(model(), small_data(64))
        second = AutoTrainer(max_epochs=4, strategy=FSDPStrategy(state_dict_type="full"), **common)
        second.fit(model(), small_data(64), ckpt_path="last")
        files = len(list(Path(folder).rglob("*.ckpt")))
        done = (first.current_epoch == 2 and second.current_epoch == 4
                and second.global_step == 2 * first.global_step)
        return ["FSDP, 1 process", files, second.global_step, "yes" if done else "NO"]


def speed_part(runs: int) -> None:
    "Precisions, speed and memory, FSDP."
    print(machine() + "\n")
    print(table(precision_cells(), ["route", "precision", "first loss", "last loss", "learns"])
          + "\n")
    rows = [speed("resnet50", 128, 60, runs), speed("vit_base_patch16_224", 64, 60, runs)]
    print(table(rows, ["model", "batch", "by hand, images/s", "ours, images/s", "ratio",
                       "at least", "by hand, GiB",
                       "ours, GiB"]) + "\n")
    print(table([fsdp()], ["strategy", "checkpoints", "steps", "resumed"]))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=["all", "speed", "correctness"], default="all")
    parser.add_argument("--runs", type=int, default=5, help="of each side, for the speed")
    parser.add_argument("--device", default="cuda",
                        help="for the correctness: cuda, cuda:1, mps or cpu")
    parser.add_argument("--only", nargs="+", choices=[*gpu_correctness.CHECKS],
                        default=[*gpu_correctness.CHECKS], help="some of the checks")
    parser.add_argument("--at-once", type=int, default=None,
                        help="checks at the same time; by default 3 on a GPU, 1 on a CPU")
    # What the checks start of themselves.
    parser.add_argument("--check", choices=[*gpu_correctness.CHECKS], help=argparse.SUPPRESS)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--processes", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    keep_quiet()
    if args.check: return gpu_correctness.run_check(args.check, torch.device(args.device))
    if args.worker:
        return gpu_correctness.worker(args.worker, torch.device(args.device), args.processes)
    here = args.device if args.part == "correctness" else "cuda"
    if here.startswith("cuda") and not torch.cuda.is_available():
        print("No GPU at hand: nothing was measured.")
        sys.exit(0)
    if args.part != "correctness": speed_part(args.runs)
    if args.part != "speed":
        passed = gpu_correctness.main(args.device, args.only,
                                      args.at_once or (1 if args.device == "cpu" else 3))
        sys.exit(0 if passed else 1)


if __name__ == "__main__": main()
