"""Does a classifier saved here give the same numbers in timm and in transformers? One row a
backbone family.

    python benchmarks/interop.py                                    # all families of timm, and the
    transformers classes
    python benchmarks/interop.py --family resnet --family ViT
    python benchmarks/interop.py --out benchmarks/results/interop.md

For each family of `timm.list_modules()` the model with the fewest parameters is taken, with random
weights, on images of 128 pixels
where it takes these, with five classes, one of them of an odd name. It is saved with
`save_pretrained` and loaded with
`timm.create_model("local-dir:...")`, `AutoModelForImageClassification`,
`pipeline("image-classification")` and `load_pretrained`. The
logits are compared on a random batch; of a picture of 90 by 131 pixels, the pixels that the network
sees in grey levels, the
probabilities of the pipeline with the model's own for the same pixels, and with `model.predict`,
which makes its own pixels. A classifier on a transformers model is compared with the native class;
where there is none, or it pools in another way, the note says so.
"""
import argparse
import gc
import os
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from compatibility import FAILURES, SIDES, TRANSFORMERS, smallest_model

NAMES = ["cat", "dog", "naïve: \"bird\" | #1", "fish", "雪"]

@dataclass
class Row:
    """What was found of one family; differences of logits are in units of the largest one, those of
    probabilities as they are."""
    library: str
    family: str
    model: str = ""
    parameters: int = 0
    pixels: int = 0
    format: str = ""
    timm: float | None = None
    transformers: float | None = None
    labels: bool | None = None
    grey: float | None = None
    pipeline: float | None = None
    predict: float | None = None
    here: float | None = None
    note: str = ""

    @property
    def good(self) -> bool:
        "Whether everything that is promised of its format holds."
        limits = [(self.timm, 1e-5 if self.library == "timm" else None), (self.transformers, 1e-5),
                  (self.grey, 1.01), (self.pipeline, 1e-5), (self.here, 1e-5)]
        return (self.format == self.library and bool(self.labels)
                and all(most is None or o is not None and o <= most for o, most in limits))

def backbone(library: str, family: str) -> tuple[Any, str]:
    """A backbone of a family with random weights, for the first size that it takes, and its model's
    name."""
    from autotimm.backbones import BackboneConfig, create_backbone
    if library == "transformers":
        import transformers
        values = TRANSFORMERS[family]
        return (create_backbone(getattr(transformers, f"{family}Config")(**values),
                                **({} if "image_size" in values else dict(image_size=64))),
                f"{family}Model")
    name = smallest_model(family)
    for size in (*SIDES, None):
        try:
            return create_backbone(BackboneConfig(name, pretrained=False),
                                   **({} if size is None else dict(image_size=size))), name
        except FAILURES:
            if size is None: raise
    raise AssertionError(name)

def classifier(net: Any) -> Any:
    """A classifier whose logits differ from class to class, and are at most 3: those of a random
    network may be thousands, and hide what softmax makes of them."""
    import torch

    from autotimm.tasks.classification import ImageClassifier
    model = ImageClassifier(net, len(NAMES), class_names=NAMES).eval()
    with torch.no_grad():
        for p in model.head.parameters(): p.normal_(0, 0.1)
        largest = float(model(torch.randn(2, *model.data_config["input_size"])).abs().max())
        for layer in model.head.modules():
            if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)):
                for p in layer.parameters(): p.mul_(3 / largest)
    return model

def apart(ours: Any, other: Any) -> float:
    """The largest difference, in units of the largest logit: those of random networks may be of any
    size."""
    return float((ours.double() - other.double()).abs().max() / ours.double().abs().max())

def compare(row: Row, model: Any, folder: str) -> None:
    "Save a model and fill in what each library makes of it."
    import timm
    import torch
    import transformers
    from PIL import Image

    from autotimm.hub import load_pretrained, save_pretrained
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        save_pretrained(model, folder)
    row.note = " ".join(str(o.message).partition("since ")[2] for o in caught
                        if "only autotimm loads" in str(o.message))
    torch.manual_seed(1)
    x = torch.randn(2, *model.data_config["input_size"])
    with torch.no_grad(): ours, here = model(x), load_pretrained(folder).eval()(x)
    row.here, row.format = apart(ours, here), "autotimm" if row.note else row.library
    if row.note: return
    if row.library == "timm":
        with torch.no_grad():
            row.timm = apart(ours, timm.create_model(f"local-dir:{folder}",
                                                     pretrained=True).eval()(x))
    other = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    with torch.no_grad(): row.transformers = apart(ours, other(x).logits)
    row.labels = [other.config.id2label[i] for i in range(len(NAMES))] == NAMES
    image = Image.effect_mandelbrot((131, 90), (-3, -2.5, 2, 2.5), 100).convert("RGB")
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    found = {o["label"]: o["score"] for o in transformers.pipeline("image-classification",
                                                                   model=other,
                                                                   image_processor=processor)(
                                                                       image)}
    theirs, std = (processor(image, return_tensors="pt").pixel_values,
                   torch.tensor(model.data_config["std"])[:, None, None])
    row.grey = float(((theirs[0] - model.preprocess(image)[0]) * std * 255).abs().max())
    with torch.no_grad():
        same, own = model(theirs).softmax(-1)[0], model.predict([image])[0].probabilities
    row.pipeline, row.predict = (max(abs(found[n] - float(p)) for n, p in zip(NAMES, o))
                                 for o in (same, own))

def check(library: str, family: str) -> Row:
    "One family."
    import torch
    row = Row(library, family)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            net, row.model = backbone(library, family)
            row.parameters, row.pixels = (sum(p.numel() for p in net.parameters()),
                                          net.data_config["input_size"][1])
            compare(row, classifier(net), f"{folder}/model")
        except FAILURES as e: row.note = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
    gc.collect()
    return row

def number(value: float | None) -> str:
    return "" if value is None else "equal" if value == 0 else f"{value:.1e}"

def table(rows: list[Row]) -> str:
    "The rows as Markdown, under the counts."
    lines = ["# Classifiers in timm and transformers", ""]
    for library in ("timm", "transformers"):
        own = [o for o in rows if o.library == library]
        if not own: continue
        native = [o for o in own if o.format == library]
        lines += [f"{library}: {len(native)} of {len(own)} families are saved in its own form; "
                  + (f"logits in timm equal to the last bit in {sum(o.timm == 0 for o in native)}, "
                     f"else within {max((o.timm or 0) for o in native):.1e}; "
                     if library == "timm" else "")
                  + f"in transformers equal in {sum(o.transformers == 0 for o in native)}, else within {max((o.transformers or 0) for o in native):.1e}; labels right in "
                  f"{sum(bool(o.labels) for o in native)}; `pipeline` within "
                  f"{max((o.pipeline or 0) for o in native):.1e} of the model for the same pixels, "
                  "which differ by at most "
                  f"{max((o.grey or 0) for o in native):.2f} grey levels, and within "
                  f"{max((o.predict or 0) for o in native):.1e} of `model.predict`; loaded back "
                  "here equal in "
                  f"{sum(o.here == 0 for o in own)} of {len(own)}.", ""]
    lines += [f"{', '.join(f'{o} {version(o)}' for o in ('torch', 'timm', 'transformers'))}. "
              "Smallest model of each family, random weights, the head scaled to logits of at most "
              "3. Differences of logits are in units of the "
              "largest one. `grey`: pixels that the image processor makes against our own; "
              "`pipeline`: its probabilities against ours for its pixels; `predict`: against ours "
              "for our pixels.", "",
              "| library | family | model | parameters (M) | pixels | saved as | timm | "
              "transformers | labels | grey | pipeline | predict | here | note |",
              "|---|---|---|---:|---:|---|---|---|---|---|---|---|---|---|"]
    lines += [f"| {o.library} | {o.family} | {o.model} | {o.parameters / 1e6:.2f} | {o.pixels} | "
              f"{o.format} | {number(o.timm)} | {number(o.transformers)} | "
              f"{'' if o.labels is None else 'right' if o.labels else 'wrong'} | "
              f"{'' if o.grey is None else f'{o.grey:.2f}'} | {number(o.pipeline)} | "
              f"{number(o.predict)} | {number(o.here)} | {o.note.replace('|', '/')} |"
              for o in rows]
    return "\n".join(lines) + "\n"

def main() -> int:
    "Run, print the table; 1 if a timm family is not saved as it should be."
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--family", action="append", help="this family only; may be repeated")
    parser.add_argument("--out", type=Path, help="write the table to this file too")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import timm
    import transformers
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    items = [("timm", o) for o in timm.list_modules()] + [("transformers", o) for o in TRANSFORMERS]
    if args.family:
        if unknown := set(args.family) - {o for _, o in items}:
            parser.error(f"unknown families: {', '.join(sorted(unknown))}")
        items = [o for o in items if o[1] in args.family]
    rows: list[Row] = []
    for item in items:
        start = time.perf_counter()
        rows.append(check(*item))
        print(f"{len(rows):3}/{len(items)} {item[0]:12} {item[1]:28} "
              f"{time.perf_counter() - start:6.1f} s  {'ok' if rows[-1].good else rows[-1]}",
              file=sys.stderr, flush=True)
    text = table(rows)
    print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text)
    return int(any(o.library == "timm" and not o.good for o in rows))

if __name__ == "__main__": sys.exit(main())
