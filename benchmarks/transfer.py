"""How good is a pretrained backbone on a few hundred real photos, and how long does it take?

Ants against bees (244 photos to train, 153 to validate) with MobileNetV2 pretrained on ImageNet: a
linear probe, fine-tuning
from the probe (arXiv:2202.10054) and from the start, and random weights beside them. `python
benchmarks/transfer.py [--data DIR]`, where DIR holds `ants_bees` and
`weights/mobilenetv2_100`; it is not part of this repository.
"""
import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import keep_quiet, machine, table

from autotimm import AutoTrainer, BackboneConfig, ImageClassifier, ImageDataModule, seed_everything

PROBE = dict(epochs=4, freeze_backbone=True, lr=3e-3)
PLANS: dict[str, list[dict[str, Any]]] = {      # phases, each from where the one before ended
    "linear probe": [PROBE],
    "linear probe, then fine-tuning": [
        PROBE, dict(epochs=4, lr=1e-5, scheduler_kwargs={"warmup_epochs": 1}, freeze_norm=True,
                    mixup_alpha=0.2)],
    "fine-tuning from the start": [dict(epochs=5, lr=5e-4, layer_decay=0.85)],
    "from random weights": [dict(epochs=5, lr=1e-3)],
}


def run(name: str, data: Path, seed: int) -> tuple[float, float]:
    "Validation accuracy after the last epoch, and seconds of training."
    seed_everything(seed)
    backbone = BackboneConfig(f"local-dir:{data / 'weights' / 'mobilenetv2_100'}",
                              pretrained=name != "from random weights")
    photos = ImageDataModule(data / "ants_bees", batch_size=32, num_workers=2)
    last, seconds = None, 0.0
    with tempfile.TemporaryDirectory() as folder:
        for phase in PLANS[name]:
            task = {"freeze_backbone": False} | {k: v for k, v in phase.items() if k != "epochs"}
            model = (ImageClassifier.load_from_checkpoint(last, **task) if last
                     else ImageClassifier(backbone, num_classes=2, **task))
            trainer = AutoTrainer(max_epochs=phase["epochs"], default_root_dir=folder,
                                  enable_progress_bar=False,
                                  enable_model_summary=False, accelerator="cpu")
            start = time.perf_counter()
            trainer.fit(model, datamodule=photos)
            seconds += time.perf_counter() - start
            last = trainer.last_model_path
    return float(trainer.callback_metrics["val/accuracy"]), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2]
                        / "shared" / "data")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--plan", choices=list(PLANS), action="append")
    args = parser.parse_args()
    if not (args.data / "ants_bees").is_dir():
        print(f"No photos at {args.data / 'ants_bees'}: give the folder that holds them with "
              "--data.")
        sys.exit(0)
    keep_quiet()
    print(machine() + "\n", flush=True)
    rows = []
    for name in args.plan or PLANS:
        found = []
        for seed in range(args.seeds):
            found.append(run(name, args.data, seed))
            print(f"{name}, seed {seed}: {found[-1][0]:.1%} in {found[-1][1]:.0f} s",
                  file=sys.stderr, flush=True)
        accuracies = ", ".join(f"{a:.1%}" for a, _ in found)
        rows.append([name, " + ".join(str(o["epochs"]) for o in PLANS[name]), accuracies,
                     f"{min(a for a, _ in found):.1%}",
                     f"{max(s for _, s in found):.0f}"])
    print(table(rows, ["plan", "epochs", "validation accuracy, last epoch, by seed",
                       "worst", "seconds, slowest"]))


if __name__ == "__main__": main()
