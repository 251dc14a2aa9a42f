"""How fast is it from a folder of JPEG files to labels, beside what a user would pick instead?

`python benchmarks/inference.py [--data FOLDER] [--models resnet18 ...] [--runs 5]`

Every side reads the same 500 files of 500 by 375 pixels, prepares them as the model wants, and says
the five best classes of each with
their probabilities. With --data the photos of that folder are resized to this, without it they are
made up. Weights are random: they
cost the same time as others.
"""
import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from common import interleave, keep_quiet, machine, ratio, table
from PIL import Image

from autotimm import BackboneConfig, ImageClassifier, load_onnx
from autotimm.data.images import list_images
from autotimm.testing import make_shapes

COUNT, SIZE, BATCH = 500, (500, 375), 32


def write_photos(folder: Path, data: Path | None) -> list[Path]:
    "500 JPEG files of 500 by 375 pixels, of the size in bytes that photos have."
    folder.mkdir()
    sources = list_images(data)[0] if data is not None else []
    scenes = [] if sources else [Image.fromarray(o.image)
                                 for o in make_shapes(25, 128, max_objects=3)]
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        image = (Image.open(sources[i % len(sources)]).convert("RGB") if sources
                 else scenes[i % len(scenes)]).resize(SIZE, Image.Resampling.BICUBIC)
        if not sources:     # grain, without which a drawing is a tenth of a photo's size
            pixels = (np.asarray(image).astype(np.int16)
                      + rng.normal(0, 6, (SIZE[1], SIZE[0], 1)).astype(np.int16))
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        image.save(folder / f"{i:03d}.jpg", quality=90)
    return sorted(folder.iterdir())


class Files(torch.utils.data.Dataset):
    "What one writes for timm: Pillow and timm's own transform."
    def __init__(self, files: list[Path], transform: Any) -> None:
        self.files, self.transform = files, transform
    def __len__(self) -> int: return len(self.files)
    def __getitem__(self, i: int) -> torch.Tensor:
        return self.transform(Image.open(self.files[i]).convert("RGB"))


def plain_timm(folder: Path, workers: int) -> Callable[[list[Path]], Any]:
    "timm with a DataLoader."
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model),
                                           is_training=False)
    def run(files: list[Path]) -> Any:
        said = []
        loader = torch.utils.data.DataLoader(Files(files, transform), batch_size=BATCH,
                                             num_workers=workers if len(files) > 1 else 0)
        with torch.inference_mode():
            for x in loader: said += list(zip(*(o.tolist() for o in model(x).softmax(-1).topk(5))))
        return [ids[0] for _, ids in said]
    return run


def pipeline(folder: Path, batch: int, workers: int) -> Callable[[list[Path]], Any]:
    "transformers' pipeline."
    from transformers import pipeline as make
    run = make("image-classification", model=str(folder), device="cpu", trust_remote_code=False)
    return lambda files: [int(o[0]["label"]) for o in run([str(o) for o in files],
                                                          batch_size=min(batch, len(files)),
                                                          top_k=5,
                                                          num_workers=workers if len(files) > 1
                                                          else 0)]


def sides(name: str, place: Path, compiled: bool) -> dict[str, Callable[[list[Path]], Any]]:
    "Each way from files to labels."
    model = ImageClassifier(BackboneConfig(name, pretrained=False), 1000,
                            class_names=[str(i) for i in range(1000)], seed=0).eval()
    folder = model.save_pretrained(place / name)
    file = load_onnx(model.to_onnx(place / f"{name}.onnx"))
    ours = lambda predict: lambda files: [int(o.label) for o in predict(files, batch_size=BATCH)]
    found = {"ours, torch": ours(model.predict), "ours, ONNX": ours(file.predict)}
    if compiled:
        fast = ImageClassifier.from_pretrained(folder)
        fast.backbone.compile()
        found["ours, compiled"] = ours(fast.predict)
    return {**found, "timm, DataLoader(0)": plain_timm(folder, 0),
            "timm, DataLoader(2)": plain_timm(folder, 2),
            "pipeline, batch 1": pipeline(folder, 1, 0),
            "pipeline, batch 32": pipeline(folder, BATCH, 0)}


def measure(name: str, files: list[Path], place: Path, runs: int,
            compiled: bool) -> tuple[list[list[Any]], str]:
    "Rows of the table, and the ratio that counts."
    ways = sides(name, place, compiled)
    said = {k: way(files[:64]) for k, way in ways.items()}
    same = {k: sum(a == b for a, b in zip(v, said["timm, DataLoader(0)"])) for k, v in said.items()}
    def timed(way: Callable[[list[Path]], Any], part: list[Path]) -> Callable[[], float]:
        def once() -> float:
            start = time.perf_counter()
            way(part)
            return time.perf_counter() - start
        return once
    whole = interleave({k: timed(v, files) for k, v in ways.items()}, runs)
    one = interleave({k: timed(v, files[:1]) for k, v in ways.items()}, max(9, runs))
    best = min((k for k in ways if not k.startswith("ours")),
               key=lambda k: statistics.median(whole[k]))
    mine = min((k for k in ways if k.startswith("ours")), key=lambda k: statistics.median(whole[k]))
    rows = [[name, k, f"{COUNT / statistics.median(v):.0f}", f"{ratio(whole, best, k):.2f}",
             f"{1000 * statistics.median(one[k]):.1f}", f"{same[k]} of 64"]
            for k, v in whole.items()]
    pairs = [x / y for x, y in zip(whole[best], whole[mine])]
    return (rows, f"{name}: {mine} is {ratio(whole, best, mine):.2f} times as fast as {best} "
                  f"({min(pairs):.2f} to {max(pairs):.2f} over {runs} pairs)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of photos; without it they are made up")
    parser.add_argument("--models", nargs="+", default=["mobilenetv3_small_100", "resnet18"])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--no-compile", action="store_true",
                        help="leave torch.compile out: it takes a minute to begin with")
    args = parser.parse_args()
    keep_quiet()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as place:
        files = write_photos(Path(place, "photos"), args.data)
        size = statistics.mean(o.stat().st_size for o in files) / 1000
        print(f"{machine()}; {COUNT} JPEG files of {SIZE[0]} by {SIZE[1]} pixels, {size:.0f} kB "
              f"each, {'photos' if args.data else 'made up'}")
        rows, verdicts = [], []
        for name in args.models:
            more, verdict = measure(name, files, Path(place), args.runs, not args.no_compile)
            rows, verdicts = [*rows, *more], [*verdicts, verdict]
    print(table(rows, ["model", "side", "images a second", "of the best other",
                       "ms for one file", "first label as timm's"]))
    print("\n".join(verdicts))


if __name__ == "__main__": main()
