"""How long does a COCO-sized annotation file take to load, and what does each worker hold of its
own?

Makes a file like COCO's training set (118,000 images, 860,000 boxes with outlines of 25 corners, 1
in 85 a crowd as run
lengths) beside links to three small photos, reads it with `read_coco`, and goes through all of it
with four workers: once for the boxes
of every image, once for the masks of one in fifty too, and once for these images' photos as well.
`python benchmarks/coco_memory.py [--images 118000] [--context fork]`

USS is what a process would give back if it ended: private pages, from /proc/self/smaps_rollup
(Linux). The import of torch and
the loop itself cost a worker something whatever it reads, so the same loop over nothing stands
beside it. What the last row
adds is the C library's: it keeps what arrays of changing sizes leave free, as much with a file of
2,000 images as with this one,
and little of it with MALLOC_MMAP_THRESHOLD_=262144 in the environment.
"""
import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from common import keep_quiet, machine, table
from PIL import Image
from torch.utils.data import DataLoader, Dataset, get_worker_info

from autotimm.data.annotations import Annotations
from autotimm.data.formats import read_coco
from autotimm.data.objects import BoxDataset

WORKERS, HEIGHT, WIDTH, SHAPES = 4, 480, 640, 4000


def megabytes(key: str) -> float:
    "A number of this process, in MB: 'Rss', or 'Private' for its USS."
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(o.split()[1]) for o in lines if o.startswith(key)) / 1024


def write_photos(folder: Path, count: int) -> list[str]:
    "Links to three photos: as many names as images, at no space."
    rng = np.random.default_rng(0)
    folder.mkdir()
    names = [f"{k:012}.jpg" for k in range(count)]
    for k, name in enumerate(names):
        # A file can have only so many links.
        if k % 40_000 == 0:
            Image.fromarray(rng.integers(0, 255, (HEIGHT // 8, WIDTH // 8, 3), np.uint8)).resize(
                (WIDTH, HEIGHT)).save(source := folder / name)
        else: os.link(source, folder / name)
    return names


def made_up_objects(seed: int = 0) -> list[str]:
    "Texts of box, area and outline, as different objects have them."
    rng = np.random.default_rng(seed)
    texts = []
    for k in range(SHAPES):
        size = rng.lognormal(4, 0.9, 2).clip(4, [WIDTH - 4, HEIGHT - 4])
        corner, angles = rng.uniform(0, [WIDTH, HEIGHT]
                                     - size), np.sort(rng.uniform(0, 2 * np.pi, 25))
        points = (corner + size / 2 * (1 + rng.uniform(0.6, 1, (25, 1))
                                       * np.stack([np.cos(angles), np.sin(angles)], 1))).round(2)
        (x0, y0), (x1, y1) = points.min(0), points.max(0)
        box = [round(float(o), 2) for o in (x0, y0, x1 - x0, y1 - y0)]
        outline = json.dumps([points.ravel().tolist()])
        if k % 85 == 0:
            runs = rng.integers(1, 900, 300)
            outline = json.dumps(dict(size=[HEIGHT, WIDTH],
                                      counts=[*runs.tolist(), HEIGHT * WIDTH - int(runs.sum())]))
        texts.append(f'"bbox": {json.dumps(box)}, "area": {box[2] * box[3] * 0.6:.4f}, "iscrowd": '
                     f'{int(k % 85 == 0)}, "segmentation": {outline}')
    return texts


def write_annotations(path: Path, names: Sequence[str], objects: int) -> None:
    "The file, written piece by piece."
    rng = np.random.default_rng(1)
    texts, ids = made_up_objects(), np.delete(np.arange(1, 91), np.arange(9, 90, 9))[:80]
    owners, shapes, labels = (rng.integers(len(names), size=objects),
                              rng.integers(SHAPES, size=objects),
                              ids[rng.integers(80, size=objects)])
    with path.open("w") as f:
        f.write('{"categories": ' + json.dumps([dict(id=int(k), name=f"class {k}") for k in ids])
                + ', "images": [')
        f.write(", ".join(f'{{"id": {k + 1}, "file_name": "{o}", "height": {HEIGHT}, "width": '
                          f'{WIDTH}}}' for k, o in enumerate(names)))
        f.write('], "annotations": [')
        f.writelines(f'{", " * (j > 0)}{{"id": {j + 1}, "image_id": {i + 1}, "category_id": {c}, '
                     f'{texts[k]}}}'
                     for j, (i, k, c) in enumerate(zip(owners.tolist(), shapes.tolist(),
                                                       labels.tolist())))
        f.write("]}")


def make(root: Path, images: int, objects: int) -> None:
    "Photos and annotations."
    write_annotations(root / "instances.json", write_photos(root / "images", images), objects)


class Items(Dataset):
    """What a worker does with an image: its number, its USS in MB now and then, and the objects it
    saw."""
    def __init__(self, annotations: Annotations, every: int, reads: str) -> None:
        self.annotations, self.every, self.reads = annotations, every, reads
        self.photos = BoxDataset(annotations, None, masks=True, split="val")

    def __len__(self) -> int: return len(self.annotations)

    def __getitem__(self, i: int) -> tuple[int, float, int]:
        objects = 0
        if self.reads != "nothing":
            sample, now = self.annotations[i], i % self.every == 0
            objects = len(sample.target["labels"])
            if now and self.reads == "boxes and masks": self.annotations.masks(i)
            if now and self.reads == "boxes, masks and photos": self.photos.decoded(i)
        return get_worker_info().id, megabytes("Private") if i % 100 == 0 else 0.0, objects


def most_private(data: Items, context: str) -> tuple[list[float], int]:
    "The largest USS of each worker over a pass, and the objects that were seen."
    most, objects = [0.0] * WORKERS, 0
    shuffled = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()
    for worker, private, seen in DataLoader(data, batch_size=64, sampler=shuffled,
                                            num_workers=WORKERS, multiprocessing_context=context,
                                            collate_fn=_columns):
        most[worker] = max(most[worker], private)
        objects += seen
    return most, objects


def _columns(items: Sequence[tuple[int, float, int]]) -> tuple[int, float, int]:
    "The worker of a batch, its largest USS, and the objects."
    return items[0][0], max(o[1] for o in items), sum(o[2] for o in items)


def main() -> None:
    "Make, load, iterate, print."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=118_000)
    parser.add_argument("--objects", type=int, default=860_000)
    parser.add_argument("--every", type=int, default=50,
                        help="photo and masks of one image in so many")
    parser.add_argument("--context", default="fork", choices=("fork", "spawn", "forkserver"),
                        help="how workers start")
    options = parser.parse_args()
    keep_quiet()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        # Made by another process, since what making it leaves in the heap is none of the reader's
        # business.
        maker = multiprocessing.get_context("spawn").Process(target=make,
                                                             args=(root, options.images,
                                                                   options.objects))
        maker.start()
        maker.join()
        size = (root / "instances.json").stat().st_size / 2**20
        before, start, used = megabytes("Rss"), time.perf_counter(), time.process_time()
        annotations = read_coco(root / "instances.json", root / "images")
        wall, cpu, after = time.perf_counter() - start, time.process_time() - used, megabytes("Rss")
        private = {}
        for reads in ("nothing", "boxes", "boxes and masks", "boxes, masks and photos"):
            private[reads], seen = most_private(Items(annotations, options.every, reads),
                                                options.context)
            assert seen == (len(annotations.labels) if reads != "nothing"
                            else 0), f"{seen} objects seen of {len(annotations.labels)}"
    rows = [["file", f"{size:.0f} MB, {options.images:,} images, {options.objects:,} objects"],
            ["load, seconds", f"{wall:.1f} (processor {cpu:.1f})"],
            ["held in arrays", repr(annotations)],
            ["parent's RSS before and after, MB", f"{before:.0f}, {after:.0f}"],
            *([f"USS of each of {WORKERS} workers ({options.context}) that read {k}, MB",
               ", ".join(f"{o:.0f}" for o in v)] for k, v in private.items())]
    print(f"{machine()}\n\n{table(rows, ('', ''))}")


if __name__ == "__main__": main()
