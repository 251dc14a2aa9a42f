"""Trains a classifier on a folder of images: one script for a laptop, torchrun, SLURM, Kubernetes
and SkyPilot.

What differs from place to place, how many processes there are and where, is taken from the
launcher's own variables.
"""
import argparse
import os
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch

from autotimm import AutoTrainer, BackboneConfig, ImageClassifier, ImageDataModule


def layout(environ: Mapping[str, str] = os.environ) -> dict[str, int]:
    "Machines and processes a machine as the launcher has started them; empty where there is none."
    if "TORCHELASTIC_RUN_ID" in environ:
        each = int(environ["LOCAL_WORLD_SIZE"])
        return {"num_nodes": int(environ["WORLD_SIZE"]) // each, "devices": each}
    if "SLURM_NTASKS_PER_NODE" in environ:
        return {"num_nodes": int(environ["SLURM_NNODES"]),
                "devices": int(environ["SLURM_NTASKS_PER_NODE"])}
    return {}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    "The arguments of the command line."
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True,
                        help="folder with train/class/image and val/class/image")
    parser.add_argument("--output", required=True,
                        help="folder of the checkpoints; every machine must see the same")
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--pretrained", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--image-size", type=int, help="pixels; the backbone's own if left out")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=256,
                        help="images a step, all processes together")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--workers", type=int, help="worker processes that read images, each "
                                                    "process; as many as fit if left out")
    parser.add_argument("--minutes", type=float, default=10, help="time between two checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--devices", default="auto",
                        help="processes on this machine where no launcher says how many")
    return parser.parse_args(arguments)


def build(args: argparse.Namespace, **trainer: Any) -> tuple[ImageClassifier, ImageDataModule,
                                                             AutoTrainer]:
    "The model, its data and the trainer, for any number of processes."
    how: dict[str, Any] = dict(
        max_epochs=args.epochs, accelerator=args.accelerator, devices=args.devices,
        default_root_dir=args.output, seed=args.seed,
        checkpoint_interval=timedelta(minutes=args.minutes),
        sync_batchnorm=torch.cuda.is_available() and args.accelerator != "cpu")
    made = AutoTrainer(**{**how, **layout(), **trainer})
    if args.batch_size % made.world_size:
        raise ValueError(f"--batch-size {args.batch_size} cannot be shared out among "
                         f"{made.world_size} processes: give a multiple.")
    data = ImageDataModule(args.data, batch_size=args.batch_size // made.world_size,
                           image_size=args.image_size,
                           num_workers=args.workers, seed=args.seed)
    model = ImageClassifier(BackboneConfig(args.backbone, pretrained=args.pretrained),
                            data.num_classes, lr=args.lr,
                            image_size=args.image_size, seed=args.seed)
    return model, data, made


def main() -> None:
    "Train, or go on where a run that was stopped had come to."
    model, data, trainer = build(parse())
    trainer.fit(model, datamodule=data, ckpt_path="auto")
    if trainer.is_global_zero:
        print(f"{trainer.world_size} processes, {trainer.global_step} steps:",
              ", ".join(f"{k} {float(v):.4f}" for k, v in sorted(trainer.callback_metrics.items())))


if __name__ == "__main__":
    main()
