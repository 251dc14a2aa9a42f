"""What becomes of damaged files: a thousand images and a thousand annotation files, each damaged in
one way, by fixed seeds.

    python benchmarks/damage.py                       # both tables
    python benchmarks/damage.py --files 100 --what images
    python benchmarks/damage.py --what annotations --show silent      # each file that was read
    wrongly without a word

Every file is read as a data set reads it, in processes of their own, so that a crash is counted and
ends nothing. The columns:

equal       read to what the undamaged file holds: the damage did no harm
reported    a `BadImageError`, an `AnnotationError` or a `ValueError` that names the file, or a
problem that is noted
undetected  read to something else that is a valid file too: a format without checksums says nothing
of a wrong byte among its
            pixels, a table nothing of a 7 that was a 1
silent      what must not be: a crash, a hang, another exception, one that does not name the file,
more memory than a gigabyte,
            or something else read out of a file that the damage made invalid
"""
import argparse
import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
import tempfile
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

OUTCOMES = ("equal", "reported", "undetected", "silent")
Damage = Callable[[bytes, np.random.Generator], bytes]


# What happens to any file

def cut(data: bytes, rng: np.random.Generator) -> bytes:
    "Its beginning."
    return data[:rng.integers(1, len(data))]


def lost_start(data: bytes, rng: np.random.Generator) -> bytes:
    "Its end."
    return data[rng.integers(1, len(data)):]


def flipped_bits(data: bytes, rng: np.random.Generator) -> bytes:
    "One to eight bits are turned."
    changed = bytearray(data)
    for place in rng.integers(len(data), size=rng.integers(1, 9)):
        changed[place] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def wrong_header(data: bytes, rng: np.random.Generator) -> bytes:
    "One to four of the first 64 bytes are others."
    changed = bytearray(data)
    for place in rng.integers(min(64, len(data)), size=rng.integers(1, 5)):
        changed[place] = int(rng.integers(256))
    return bytes(changed)


def span(data: bytes, rng: np.random.Generator) -> tuple[int, int]:
    "Where a part of up to an eighth of a file begins and ends."
    start = int(rng.integers(len(data)))
    return start, min(len(data), start + 1 + int(rng.integers(max(2, len(data) // 8))))


def zeroed(data: bytes, rng: np.random.Generator) -> bytes:
    "A part is zeros, as after a crash of the file system."
    start, end = span(data, rng)
    return data[:start] + bytes(end - start) + data[end:]


def zeroed_end(data: bytes, rng: np.random.Generator) -> bytes:
    "All from some place on is zeros: a download that was never finished."
    start = int(rng.integers(1, len(data)))
    return data[:start] + bytes(len(data) - start)


def noise(data: bytes, rng: np.random.Generator) -> bytes:
    "A part is random bytes."
    start, end = span(data, rng)
    return data[:start] + rng.bytes(end - start) + data[end:]


def lost_part(data: bytes, rng: np.random.Generator) -> bytes:
    "A part is gone."
    start, end = span(data, rng)
    return data[:start] + data[end:]


def doubled_part(data: bytes, rng: np.random.Generator) -> bytes:
    "A part stands there twice."
    start, end = span(data, rng)
    return data[:end] + data[start:]


def empty(data: bytes, rng: np.random.Generator) -> bytes:
    "Nothing."
    return b""


def all_zeros(data: bytes, rng: np.random.Generator) -> bytes:
    "As long as it was, and nothing in it."
    return bytes(len(data))


def web_page(data: bytes, rng: np.random.Generator) -> bytes:
    "What a server answered in its place."
    return b"<!DOCTYPE html>\n<html><head><title>404</title></head><body>Not found</body></html>\n"


def line_ends(data: bytes, rng: np.random.Generator) -> bytes:
    "Copied as if it were text: each line feed got a carriage return."
    return data.replace(b"\n", b"\r\n")


ANY: dict[str, Damage] = {o.__name__: o for o in (cut, lost_start, flipped_bits, wrong_header,
                                                  zeroed, zeroed_end, noise, lost_part,
                                                  doubled_part, empty, all_zeros, web_page,
                                                  line_ends)}
# What is left is no file of its format, whatever the format.
HOPELESS = {"empty", "all_zeros", "web_page"}


# Images

def picture(size: tuple[int, int] = (72, 56)) -> Any:
    "A picture with shapes, edges and noise."
    from PIL import Image

    from autotimm.testing import make_shapes
    return Image.fromarray(make_shapes(1, 96, seed=3)[0].image).resize(size)


def image_files() -> dict[str, bytes]:
    "The same picture in every usual format."
    from PIL import Image
    photo, files = picture(), {}
    deep = Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257)
    float_image = Image.fromarray(np.asarray(photo.convert("L")).astype(np.float32) / 255)
    forms: list[tuple[str, str, Any, dict[str, Any]]] = [
        ("jpeg", "JPEG", photo, {}), ("progressive.jpeg", "JPEG", photo, {"progressive": True}),
        ("grey.jpeg", "JPEG", photo.convert("L"), {}),
        ("png", "PNG", photo, {}), ("palette.png", "PNG", photo.convert("P"), {}),
        ("deep.png", "PNG", deep, {}),
        ("tiff", "TIFF", photo, {}), ("lzw.tiff", "TIFF", photo, {"compression": "tiff_lzw"}),
        ("float.tiff", "TIFF", float_image, {}),
        ("webp", "WEBP", photo, {}), ("lossless.webp", "WEBP", photo, {"lossless": True}),
        ("gif", "GIF", photo, {}), ("bmp", "BMP", photo, {})]
    for name, form, image, options in forms:
        buffer = io.BytesIO()
        image.save(buffer, form, **options)
        files[name] = buffer.getvalue()
    return files


def resized_header(data: bytes, width: int, height: int) -> bytes:
    "A file whose header states another size; the checksums are right."
    changed = bytearray(data)
    if data[:2] == b"\xff\xd8":
        place = next(m.start() for m in re.finditer(rb"\xff[\xc0\xc2]\0[\x0b\x11]", data))
        struct.pack_into(">HH", changed, place + 5, height, width)
    elif data[:4] == b"\x89PNG":
        struct.pack_into(">II", changed, 16, width, height)
        struct.pack_into(">I", changed, 29, zlib.crc32(changed[12:29]))
    elif data[:2] == b"BM": struct.pack_into("<ii", changed, 18, width, height)
    elif data[:3] == b"GIF":
        struct.pack_into("<HH", changed, 6, width, height)
        struct.pack_into("<HH", changed, data.index(b"\x2c\0\0\0\0") + 5, width, height)
    elif data[:2] == b"II":
        first, = struct.unpack_from("<I", data, 4)
        for k in range(struct.unpack_from("<H", data, first)[0]):
            tag, kind = struct.unpack_from("<HH", data, place := first + 2 + 12 * k)
            if tag in (256, 257, 278):
                struct.pack_into("<HII", changed, place + 2, 4, 1, width if tag == 256 else height)
    elif data[12:16] == b"VP8 ":
        struct.pack_into("<HH", changed, 26, width & 0x3fff, height & 0x3fff)
    elif data[12:16] == b"VP8L":
        struct.pack_into("<I", changed, 21, (min(width or 1, 16384) - 1)
                         | (min(height or 1, 16384) - 1) << 14)
    else: raise ValueError(f"no header of a size is known in {data[:16]!r}.")
    return bytes(changed)


def wrong_size(data: bytes, rng: np.random.Generator) -> bytes:
    "The header states up to four times the width or height, or none at all."
    width, height = picture().size
    return resized_header(data, *[(0, height), (width, 0),
                                  (width * int(rng.integers(2, 5)), height),
                                  (width, height * int(rng.integers(2, 5)))][rng.integers(4)])


def bomb(data: bytes, rng: np.random.Generator) -> bytes:
    "The header states gigabytes of pixels."
    return resized_header(data, int(rng.integers(30_000, 65_500)),
                          int(rng.integers(30_000, 65_500)))


IMAGE_DAMAGE: dict[str, Damage] = {**ANY, "wrong_size": wrong_size, "bomb": bomb,
                                   "swapped_suffix": lambda data, rng: data}

def must_be_reported(kind: str, name: str) -> bool:
    "Whether other pixels than the undamaged file's are a fault of the reader: the format can tell."
    ends = kind == "zeroed_end" and name.endswith("jpeg")
    return (kind in HOPELESS or kind == "cut" or ends or name.endswith("png")
            and kind not in ("wrong_size", "swapped_suffix"))


def read_image(path: Path) -> bytes:
    "The shape and pixels of an image, as a data set reads it."
    from autotimm.data.samples import Sample
    from autotimm.data.datasets import SampleDataset
    image = SampleDataset([Sample(str(path), 0)]).load(0)
    return repr(tuple(image.shape)).encode() + image.numpy().tobytes()


# Annotations

def replaced(data: bytes, start: int, end: int, new: str) -> bytes:
    return data[:start] + new.encode() + data[end:]


def pick(found: list[Any], rng: np.random.Generator) -> Any:
    return found[int(rng.integers(len(found)))]


# What a number is not.
WRONG = ("", "text", "nan", "inf", "-inf", "-5000", "1e300", "9" * 400, "None", "1,5",
         "0x10", "[1]", "\0", "é")
CELL = {"csv": re.compile(rb"[^,\n\r]+"), "txt": re.compile(rb"[^ \n]+"),
        "xml": re.compile(rb"(?<=>)[^<>]+(?=</(?!object|size|bndbox))"),
        "json": re.compile(rb"-?[0-9.]+(?=[,}\]])"), "yaml": re.compile(rb"(?<=: ).+|\d+(?=:)")}
NUMBER = {"csv": re.compile(rb"(?<=,)-?[0-9.]+"), "txt": re.compile(rb"(?<= )[0-9.]+"),
          "xml": re.compile(rb"(?<=>)\d+(?=</[xy]m)"),
          "json": re.compile(rb"(?<=[ \[])[0-9.]+(?=[,}\]])"), "yaml": re.compile(rb"\d+(?=:)")}


def suffix_of(data: bytes) -> str:
    "The kind of an undamaged file."
    head = data.lstrip()[:200]
    return ("json" if head[:1] == b"{" else "xml" if head[:1] == b"<" else "yaml"
            if b"names:" in data else "csv" if b"," in head else "txt")


def wrong_number(data: bytes, rng: np.random.Generator) -> bytes:
    "A number is none, or none that can be right."
    suffix = suffix_of(data)
    found = pick([*NUMBER[suffix].finditer(data)] or [*CELL[suffix].finditer(data)], rng)
    new = pick(WRONG, rng)
    if suffix == "json":
        new = pick(["null", '"text"', "NaN", "Infinity", "-5000", "1e300", "9" * 400,
                    "[]", "{}", "[[1]]", "true", '""'], rng)
    return replaced(data, *found.span(), new)


def missing_value(data: bytes, rng: np.random.Generator) -> bytes:
    "A value is gone, with what names it where the format has that."
    suffix = suffix_of(data)
    if suffix == "json":
        found = pick(
            [*re.finditer(
                rb'"(images|annotations|categories|id|image_id|category_id|bbox|file_name|name)": ("[^"]*"|[0-9.]+|\[[^\[\]{}]*\]),? ?', data)], rng)
    elif suffix == "xml":
        found = pick([*re.finditer(rb"<(name|xmin|xmax|ymin|ymax)>[^<]*</\1>", data)], rng)
    else: found = pick([*CELL[suffix].finditer(data)], rng)
    return replaced(data, *found.span(), "")


def twice(data: bytes, rng: np.random.Generator) -> bytes:
    "A record, a line, a value or an id stands there twice."
    suffix = suffix_of(data)
    if suffix == "json":
        table = json.loads(data)
        rows = table[pick(["images", "annotations", "categories"], rng)]
        rows.append({**pick(rows, rng)})
        return json.dumps(table).encode()
    if suffix == "xml":
        found = pick([*re.finditer(rb"<(bndbox|object|name|xmin)>.*?</\1>", data, re.DOTALL)], rng)
    elif suffix == "csv": found = pick([*re.finditer(rb"[^,\n]+,", data)], rng)
    else: found = pick([*CELL[suffix].finditer(data)], rng)
    return data[:found.end()] + (b" " if suffix == "txt"
                                 else b"") + found.group() + data[found.end():]


def other_nesting(data: bytes, rng: np.random.Generator) -> bytes:
    "Brackets, tags or quotes where there should be none, or far too many."
    suffix = suffix_of(data)
    if suffix == "json":
        table = json.loads(data)
        key = pick(list(table), rng)
        deep = "[" * 200_000
        return [json.dumps([table]), json.dumps({**table, key: {"0": table[key]}}),
                json.dumps({**table, key: [table[key]]}),
                json.dumps({"data": table}), json.dumps(table)[:-1] + f', "x": {deep}',
                json.dumps({**table, key: None}),
                json.dumps({k: v for k, v in table.items() if k != key})][rng.integers(7)].encode()
    if suffix == "xml":
        bombs = b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY a "aaaaaaaaaa">' + b"".join(
            b'<!ENTITY %c "%s">' % (98 + k, b"&%c;" % (97 + k) * 10)
            for k in range(9)) + b"]><annotation><object>&j;</object></annotation>"
        return [bombs, b"<a>" * 100_000, data.replace(b"<bndbox>",
                                                      b"<bndbox><box>").replace(
                                                          b"</bndbox>", b"</box></bndbox>"),
                data.replace(b"annotation>", b"html>"), data + data][rng.integers(5)]
    if suffix == "yaml":
        return [b"names: " + b"[" * 20_000, b"- " + data, b"names: &a [*a]\n", b"names: 3\n",
                data.replace(b"  ", b"\t")][rng.integers(5)]
    line = pick([*re.finditer(rb"[^\n]+\n", data)], rng)
    return [replaced(data, *line.span(), f'"{line.group().decode()}'),
            replaced(data, *line.span(), line.group().decode().replace(",", ";").replace(" ", ",")),
            replaced(data, *line.span(), " ".join(["0.5"] * 20_001) + "\n")][rng.integers(3)]


def wrong_encoding(data: bytes, rng: np.random.Generator) -> bytes:
    "Text in another encoding, or with bytes that are no text."
    text = data.decode()
    place = int(rng.integers(len(data)))
    return [text.encode("utf-16"), text.encode("utf-16-le"), text.encode("utf-32"),
            text.encode("utf-8-sig"), data[:place] + "é".encode("cp1252") + data[place:],
            data[:place] + b"\0" + data[place:], text.encode("cp500")][rng.integers(7)]


TEXT_DAMAGE: dict[str, Damage] = {**ANY, **{o.__name__: o
                                            for o in (wrong_number, missing_value, twice,
                                                      other_nesting, wrong_encoding)}}


@dataclass(frozen=True)
class Format:
    "A data set of one format, one file of which is damaged."
    file: str                             # the file, in the folder of the data set
    write: Callable[[Path], Any]          # the undamaged data set
    read: Callable[[Path], Any]           # what it holds, as something to compare
    # Whether bytes are a valid file of the format, whoever reads them
    valid: Callable[[bytes], bool]
    damage: dict[str, Damage]
    # What an error may name in place of the file: an image that a table names and that is not there
    others: tuple[str, ...] = ()


def content(annotations: Any) -> Any:
    "All that annotations say, as plain values."
    return [annotations.class_names, annotations.category_ids, [
        [annotations.image_id(i), annotations.image_name(i), annotations.sizes[i].tolist(),
         {k: v.tolist() for k, v in annotations.target(i).items() if hasattr(v, "tolist")},
         np.packbits(annotations.masks(i)).tolist() if annotations.has_masks else None]
        for i in range(len(annotations))]]


def good_box(box: Any, width: float, height: float) -> bool:
    "Whether xyxy is a box in an image."
    x0, y0, x1, y1 = box
    return bool(np.isfinite(box).all() and -1 <= x0 < x1 <= width + 1
                and -1 <= y0 < y1 <= height + 1)


def unlike(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    "A JSON object, none of whose keys stands there twice."
    if len(dict(pairs)) < len(pairs): raise ValueError("a key twice")
    return dict(pairs)


def no_constant(name: str) -> None: raise ValueError(f"{name} is no JSON")


def checked(valid: Callable[[bytes], bool]) -> Callable[[bytes], bool]:
    "The same; what cannot even be read is not valid."
    def check(data: bytes) -> bool:
        try: return bool(valid(data))
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError,
                OverflowError, SyntaxError):
            return False
    return check


@checked
def valid_coco(data: bytes) -> bool:
    def whole(value: Any) -> bool: return type(value) is int and 0 <= value < 2**31
    table = json.loads(data.decode(), object_pairs_hook=unlike, parse_constant=no_constant)
    images, objects, kinds = table["images"], table.get("annotations", []), table["categories"]
    sizes = {o["id"]: (o["width"], o["height"]) for o in images}
    ids = [[o["id"] for o in rows] for rows in (images, objects, kinds)]
    return (all(whole(k) for rows in ids for k in rows)
            and all(len(set(rows)) == len(rows) for rows in ids)
            and all(isinstance(o["file_name"], str) and whole(o["width"]) and whole(o["height"])
                    for o in images)
            and all(isinstance(o["name"], str) for o in kinds)
            and len({o["name"] for o in kinds}) == len(kinds)
            and all(type(o["image_id"]) is int and type(o["category_id"]) is int
                    and o["category_id"] in ids[2] and o.get("iscrowd", 0) in (0, 1)
                    and all(type(v) in (int, float) for v in o["bbox"])
                    and type(o.get("area", 0)) in (int, float) and o.get("area", 0) >= 0
                    and isinstance(o["segmentation"], list) and o["segmentation"]
                    and all(len(r) >= 6 and len(r) % 2 == 0
                            and all(type(v) in (int, float) for v in r) for r in o["segmentation"])
                    and good_box([*o["bbox"][:2], o["bbox"][0] + o["bbox"][2], o["bbox"][1]
                                  + o["bbox"][3]], *sizes[o["image_id"]]) for o in objects))


@checked
def valid_voc(data: bytes) -> bool:
    from xml.etree import ElementTree
    root = ElementTree.fromstring(data)
    width, height = (int(root.findtext(f"size/{o}") or "") for o in ("width", "height"))
    objects = root.findall("object")
    known = {"annotation", "folder", "filename", "size", "width", "height", "depth",
             "segmented", "object", "name", "pose", "truncated",
             "difficult", "bndbox", "xmin", "ymin", "xmax", "ymax"}
    boxes = [[float(o.findtext(f"bndbox/{k}") or "") for k in ("xmin", "ymin", "xmax", "ymax")]
             for o in objects]
    return (root.tag == "annotation" and {o.tag for o in root.iter()} <= known
            and all((o.findtext("name") or "").strip() for o in objects)
            and all(len(o) == 5 and len(o.find("bndbox") or ()) == 4 for o in objects)
            and all((o.findtext("difficult") or "") in ("0", "1") for o in objects)
            and all(good_box(o, width, height) for o in boxes))


@checked
def valid_yolo(data: bytes) -> bool:
    rows = [line.split() for line in data.decode().splitlines() if line.strip()]
    boxes = [[float(o) for o in row[1:]] for row in rows]
    return all(re.fullmatch(r"\d+", row[0]) and int(row[0]) < 3 and len(row) == 5
               for row in rows) and all(
        0 <= x <= 1 and 0 <= y <= 1 and good_box([x - w / 2, y - h / 2, x + w / 2, y + h / 2], 1, 1)
        and w <= 1.01 and h <= 1.01 for x, y, w, h in boxes)


@checked
def valid_yaml(data: bytes) -> bool:
    import yaml
    try: table = yaml.safe_load(data.decode())
    except yaml.YAMLError: return False
    names = table["names"]
    return (isinstance(names, dict) and all(type(k) is int for k in names)
            and all(isinstance(o, str) for o in names.values()) and isinstance(table["train"], str))


def table_of(data: bytes) -> list[list[str]]:
    import csv
    text = data.decode()
    if "\0" in text: raise ValueError("NUL")
    try: return [o for o in csv.reader(io.StringIO(text, newline=""), strict=True) if o]
    except csv.Error as e: raise ValueError(str(e)) from e


@checked
def valid_boxes(data: bytes) -> bool:
    header, *rows = table_of(data)
    return (header == ["image_path", "x_min", "y_min", "x_max", "y_max", "label"]
            and all(len(o) == 6 and o[5].strip() and o[0].strip() for o in rows)
            and all(good_box([float(o) for o in row[1:5]], 48, 48) for row in rows))


@checked
def valid_labels(data: bytes) -> bool:
    header, *rows = table_of(data)
    return len(set(header)) == len(header) == 2 and all(len(o) == 2 and o[0].strip()
                                                        and o[1].strip() for o in rows)


@checked
def valid_tags(data: bytes) -> bool:
    header, *rows = table_of(data)
    return (len(set(header)) == len(header) == 4
            and all(len(o) == 4 and o[0].strip() and {k.strip() for k in o[1:]} <= {"0", "1"}
                    for o in rows))


def mode_rgb(data: bytes, rng: np.random.Generator) -> bytes:
    return as_image(data, lambda o: o.convert("RGB"), "PNG")
def mode_float(data: bytes, rng: np.random.Generator) -> bytes:
    return as_image(data, lambda o: o.convert("F"), "TIFF")
def other_size(data: bytes, rng: np.random.Generator) -> bytes:
    return as_image(data, lambda o: o.resize((24, 48), 0), "PNG")
def other_numbers(data: bytes, rng: np.random.Generator) -> bytes:
    return as_image(data, lambda o: o.point(lambda v: v + 100), "PNG")
def as_jpeg(data: bytes, rng: np.random.Generator) -> bytes:
    return as_image(data, lambda o: o.point(lambda v: 80 * v), "JPEG")


def as_image(data: bytes, change: Callable[[Any], Any], form: str) -> bytes:
    "An image file, changed and saved in another form."
    from PIL import Image
    buffer = io.BytesIO()
    change(Image.open(io.BytesIO(data))).save(buffer, form)
    return buffer.getvalue()


MASK_DAMAGE: dict[str, Damage] = {**ANY, "bomb": bomb,
                                  **{o.__name__: o for o in (mode_rgb, mode_float,
                                                             other_size, other_numbers, as_jpeg)}}


def read_samples(dataset: Any) -> Any:
    "Targets of a data set, whose images are all there."
    return [[np.asarray(dataset.samples[i].target).tolist(), Path(dataset.samples[i].image).name,
             tuple(dataset.load(i).shape)] for i in range(len(dataset))]


@cache
def formats() -> dict[str, Format]:
    from autotimm import testing
    from autotimm.data.formats import read_coco, read_csv_boxes, read_voc, read_yolo
    from autotimm.data.masks import MaskCodes, read_masks
    from autotimm.data.datasets import CSVImageDataset, MaskDataset, MultiLabelImageDataset
    small = dict(image_size=48, max_objects=2, seed=1)
    labels = lambda o: CSVImageDataset(o / "train.csv", o / "images")
    tags = lambda o: MultiLabelImageDataset(o / "train.csv", o / "images")
    def masks(root: Path) -> Any:
        data = MaskDataset(read_masks(root).train, lambda o: o, MaskCodes(4))
        return [data.read(i)["mask"].tolist() for i in range(len(data))]
    return {
        "coco": Format("annotations/instances_train2017.json",
                       lambda o: testing.write_coco(o, dict(train2017=4), **small),
                       lambda o: content(read_coco(o / "annotations/instances_train2017.json",
                                                   o / "train2017", masks=True)), valid_coco,
                       TEXT_DAMAGE),
        "voc": Format("Annotations/0002.xml",
                      lambda o: testing.write_voc(o, dict(train=4), **small),
                      lambda o: content(read_voc(o, "train")), valid_voc, TEXT_DAMAGE),
        "yolo": Format("labels/train/0002.txt",
                       lambda o: testing.write_yolo(o, dict(train=4), **small),
                       lambda o: content(read_yolo(o)), valid_yolo, TEXT_DAMAGE),
        "yaml": Format("data.yaml", lambda o: testing.write_yolo(o, dict(train=4), **small),
                       lambda o: content(read_yolo(o)), valid_yaml, TEXT_DAMAGE),
        "boxes.csv": Format("train.csv",
                            lambda o: testing.write_boxes_csv(o, dict(train=4), **small),
                            lambda o: content(read_csv_boxes(o / "train.csv", o / "images")),
                            valid_boxes, TEXT_DAMAGE),
        "labels.csv": Format("train.csv", lambda o: testing.write_csv(o, dict(train=6), **small),
                             lambda o: [labels(o).classes, read_samples(labels(o))],
                             valid_labels, TEXT_DAMAGE, ("/images/",)),
        "tags.csv": Format("train.csv",
                           lambda o: testing.write_multilabel_csv(o, dict(train=6), **small),
                           lambda o: [tags(o).label_names, read_samples(tags(o))],
                           valid_tags, TEXT_DAMAGE, ("/images/",)),
        "mask.png": Format("masks/train/0002.png",
                           lambda o: testing.write_masks(o, dict(train=2), **small), masks,
                           lambda data: False, MASK_DAMAGE),
    }


# Reading what was damaged

class Hang(BaseException):
    "Reading took too long."


def one(read: Callable[[], Any], wanted: Any, names: tuple[str, ...],
        invalid: bool) -> tuple[str, str]:
    "How reading one file ended, and what was said."
    from autotimm.data.coco import AnnotationError
    from autotimm.data.images import BadImageError
    import resource
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.alarm(20)
    try: found = read()
    except (BadImageError, AnnotationError, ValueError) as e:
        if not any(o in str(e) for o in names):
            return "silent", f"the file is not named: {type(e).__name__}: {e}"
        if type(e) not in (BadImageError, AnnotationError, ValueError):
            return "silent", f"{type(e).__name__}: {e}"
        return (("silent", f"too much memory: {e}") if "alloc" in str(e) or "memory" in str(e)
                else ("reported", str(e)))
    except Hang: return "silent", "it takes more than 20 seconds"
    except Exception as e:  # noqa: BLE001 - what else is raised is what is counted here
        return "silent", f"{type(e).__name__}: {e}"
    finally: signal.alarm(0)
    if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before > 2**20:
        return "silent", "more than a gigabyte of memory"
    if found == wanted: return "equal", ""
    return ("silent", "read to something else") if invalid else ("undetected", "")


def image_cases(folder: Path, start: int, stop: int, seed: int) -> Iterator[dict[str, str]]:
    "What becomes of images number `start` to `stop`."
    files, kinds = image_files(), list(IMAGE_DAMAGE)
    whole = {}
    for name, data in files.items():
        (folder / name).write_bytes(data)
        whole[name] = read_image(folder / name)
    suffixes = sorted({Path(o).suffix for o in files})
    for i in range(start, stop):
        kind, rng = kinds[i % len(kinds)], np.random.default_rng([seed, i])
        name = list(files)[int(rng.integers(len(files)))]
        data = IMAGE_DAMAGE[kind](files[name], rng)
        path = (folder
                / f"damaged_{i}{pick(suffixes, rng) if kind == 'swapped_suffix' else Path(name).suffix}")
        path.write_bytes(data)
        outcome, said = one(partial(read_image, path), whole[name], (path.name,),
                            must_be_reported(kind, name))
        yield {"kind": kind, "name": name, "outcome": outcome, "said": said}


def annotation_cases(folder: Path, start: int, stop: int, seed: int) -> Iterator[dict[str, str]]:
    "What becomes of annotation files number `start` to `stop`."
    whole = {}
    for name, form in formats().items():
        form.write(folder / name)
        whole[name] = form.read(folder / name)
        if (not form.valid(data := (folder / name / form.file).read_bytes())
            and form.valid.__name__ == "check"):
            raise AssertionError(f"{name}: the undamaged file is not valid: {data[:300]!r}")
    for i in range(start, stop):
        name = list(formats())[i % len(formats())]
        form, rng = formats()[name], np.random.default_rng([seed, i])
        kind = list(form.damage)[i // len(formats()) % len(form.damage)]
        path = folder / name / form.file
        before = path.read_bytes()
        path.write_bytes(after := form.damage[kind](before, rng))
        outcome, said = one(partial(form.read, folder / name), whole[name],
                            (path.name, path.stem, *form.others), not form.valid(after))
        path.write_bytes(before)
        yield {"kind": kind, "name": name, "outcome": outcome, "said": said}


CASES = {"images": image_cases, "annotations": annotation_cases}


def work(what: str, start: int, stop: int, seed: int) -> None:
    "Print a line of JSON for each file; runs in a process of its own."
    import resource

    import torch
    def hang(*_: Any) -> None: raise Hang
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, hang)
    resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30, 8 * 2**30))
    with tempfile.TemporaryDirectory() as folder:
        print("ready", flush=True)
        for case in CASES[what](Path(folder), start, stop, seed):
            print(json.dumps(case), flush=True)


def run(what: str, files: int = 1000, seed: int = 0, batch: int = 250) -> list[dict[str, str]]:
    """How reading each of so many damaged files ended: what was done to it, its format, the
    outcome, and what was said."""
    found: list[dict[str, str]] = []
    while len(found) < files:
        start, stop = len(found), min(files, len(found) + batch)
        command = [sys.executable, __file__, "--worker", what, str(start), str(stop), str(seed)]
        try:
            done = subprocess.run(command, capture_output=True, text=True,
                                  timeout=60 + 5 * (stop - start))
        except subprocess.TimeoutExpired as e:
            done = subprocess.CompletedProcess(command, -signal.SIGKILL, (e.stdout or b"").decode(),
                                               (e.stderr or b"").decode())
        lines = done.stdout.splitlines()
        if "ready" not in lines:
            raise RuntimeError(f"The reader did not start:\n{done.stderr[-2000:]}")
        found += [json.loads(o) for o in lines[lines.index("ready") + 1:]]
        if len(found) == stop: continue
        if done.returncode >= 0: raise RuntimeError(f"The reader failed:\n{done.stderr[-2000:]}")
        found.append({"kind": "?", "name": f"file {len(found)}", "outcome": "silent",
                      "said": f"the process was ended by {signal.Signals(-done.returncode).name}"})
    return found


def rows(found: list[dict[str, str]]) -> list[list[object]]:
    "A row for each kind of damage, and one for all."
    kinds = list(dict.fromkeys(o["kind"] for o in found))
    def row(name: str, some: list[dict[str, str]]) -> list[object]:
        counts = Counter(o["outcome"] for o in some)
        return [name, len(some), *(counts[o] for o in OUTCOMES)]
    return [*(row(kind.replace("_", " "), [o for o in found if o["kind"] == kind])
              for kind in kinds), row("all", found)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--files", type=int, default=1000, help="of each sort (default: 1000)")
    parser.add_argument("--what", choices=list(CASES), help="default: both")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", choices=OUTCOMES, help="also list the files that ended so")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker: return work(args.worker[0], *map(int, args.worker[1:]))
    from common import table
    for what in [args.what] if args.what else CASES:
        began, found = time.monotonic(), run(what, args.files, args.seed)
        print(f"\n{len(found)} damaged {what}, {time.monotonic() - began:.0f} "
              f"s\n\n{table(rows(found), ['damage', 'files', *OUTCOMES])}")
        for o in found:
            if o["outcome"] == args.show:
                print(f"{o['kind']:16}{o['name']:18}{' '.join(o['said'].split())[:230]}")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
