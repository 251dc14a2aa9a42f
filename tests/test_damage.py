"""Damaged files: none is read to something wrong without a word, and none ends in anything but an
error that names it."""
import io
import json
import multiprocessing
import struct
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader

from autotimm.data.coco import AnnotationError
from autotimm.data.formats import read_coco, read_voc, read_yolo
from autotimm.data.objects import CSVDetectionDataset, CSVInstanceDataset
from autotimm.data.images import BadImage, BadImageError, decode_image, load_image
from autotimm.data.samples import Sample
from autotimm.data.readers import read_csv_split
from autotimm.data.masks import load_mask
from autotimm.data.datasets import (CSVImageDataset, MaskDataset, MultiLabelImageDataset,
                                    SampleDataset)
from autotimm.testing import (write_boxes_csv, write_coco, write_csv, write_multilabel_csv,
                              write_voc, write_yolo)

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import damage  # noqa: E402

PHOTO = damage.picture()


def encoded(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("what", ["images", "annotations"])
def test_a_hundred_damaged_files(what):
    "benchmarks/damage.py reads a thousand of each."
    found = damage.run(what, 100, seed=7, batch=100)
    assert len(found) == 100 and not [o for o in found if o["outcome"] == "silent"]
    assert len({o["outcome"] for o in found}) == 3


MODES = {
    "1": PHOTO.convert("1"), "L": PHOTO.convert("L"), "P": PHOTO.convert("P"), "RGB": PHOTO,
    "RGBA": PHOTO.convert("RGBA"),
    "CMYK": PHOTO.convert("CMYK"), "YCbCr": PHOTO.convert("YCbCr"), "HSV": PHOTO.convert("HSV"),
    "LA": PHOTO.convert("LA"),
    "PA": PHOTO.convert("P").convert("PA"), "La": PHOTO.convert("LA").convert("La"),
    "RGBa": PHOTO.convert("RGBA").convert("RGBa"), "RGBX": PHOTO.convert("RGBX"),
    "I;16": Image.fromarray(np.asarray(PHOTO.convert("L")).astype(np.uint16) * 257),
    "I": Image.fromarray(np.asarray(PHOTO.convert("L")).astype(np.int32) * 257),
    "F": Image.fromarray(np.asarray(PHOTO.convert("L")).astype(np.float32) / 255)}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_pillow_becomes_the_same_picture(mode):
    assert MODES[mode].mode == mode
    for channels in (1, 3, 4):
        image = load_image(MODES[mode], channels)
        assert image.shape == (channels, 56, 72) and image.dtype == torch.uint8
        wanted = load_image(PHOTO, 1).float().mean()
        assert abs(load_image(MODES[mode], 1).float().mean() - wanted) < 4


def test_a_lab_file_becomes_its_colours():
    from PIL import ImageCms
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"),
                                     "RGB", "LAB")
    lab = encoded(ImageCms.applyTransform(PHOTO, to_lab), "TIFF")
    assert (decode_image(lab).float() - load_image(PHOTO).float()).abs().mean() < 4


@pytest.mark.parametrize("pixels, text", [
    (np.linspace(0, 255, 64, dtype=np.float32).reshape(8, 8),
     "lie between 0 and 255; expected uint8, uint16, or floats from 0 to 1"),
    (np.full((8, 8), np.nan, np.float32), "lie between nan and nan"),
    (np.full((8, 8), 70_000, np.int32), "lie between 70000 and 70000"),
    (np.full((8, 8), -1, np.int32), "lie between -1 and -1")])
def test_pixels_that_cannot_be_scaled_are_a_bad_image(pixels, text, tmp_path):
    "A TIFF of floats ended the epoch, and did not say which file it was."
    Image.fromarray(pixels).save(tmp_path / "odd.tiff")
    PHOTO.save(tmp_path / "good.png")
    samples = [Sample(str(tmp_path / o), 0) for o in ("odd.tiff", "good.png")]
    with pytest.raises(BadImageError, match=r"odd\.tiff.*lie between"): SampleDataset(samples)[0]
    bad, good = (SampleDataset(samples, on_bad_image="skip")[i] for i in (0, 1))
    assert (isinstance(bad, BadImage) and bad.name.endswith("odd.tiff") and text in bad.cause
            and good[1] == 0)


def test_a_number_of_channels_that_nobody_has_is_no_bad_image():
    with pytest.raises(ValueError, match="the model takes 5") as e:
        decode_image(encoded(PHOTO, "PNG"), 5)
    assert not isinstance(e.value, BadImageError)


def damaged_pixels(data: bytes) -> bytes:
    "A PNG whose first pixels are right, and the rest zeros; Pillow reads it."
    return data[:len(data) // 2] + bytes(len(data) - len(data) // 2)


def test_a_png_with_wrong_checksums_is_refused(tmp_path):
    data = damaged_pixels(encoded(PHOTO, "PNG"))
    Image.open(io.BytesIO(data)).load()
    with pytest.raises(BadImageError, match="checksum"): decode_image(data)
    classes = Image.fromarray(np.random.default_rng(0).integers(4, size=(48, 48), dtype=np.uint8))
    (tmp_path / "mask.png").write_bytes(damaged_pixels(encoded(classes, "PNG")))
    with pytest.raises(BadImageError, match=r"mask\.png.*checksum"):
        load_mask(tmp_path / "mask.png")
    PHOTO.resize((48, 48)).save(tmp_path / "image.png")
    data = MaskDataset([Sample(str(tmp_path / "image.png"), str(tmp_path / "mask.png"))],
                       lambda o: o, on_bad_image="skip")
    assert isinstance(data[0], BadImage)


def test_a_png_is_read_with_what_may_stand_in_it():
    "Several parts of pixels, text, and bytes behind its end."
    info = titled()
    data = encoded(PHOTO, "PNG", pnginfo=info, compress_level=0)
    at = data.index(b"IDAT") - 4
    length = struct.unpack_from(">I", data, at)[0]
    pixels = data[at + 8:at + 8 + length]
    chunk = lambda part: struct.pack(">I", len(part)) + b"IDAT" + part + struct.pack(
        ">I", zlib.crc32(b"IDAT" + part))
    split = (data[:at] + chunk(pixels[:100]) + chunk(b"") + chunk(pixels[100:])
             + data[at + 12 + length:])
    for good in (data, split, data + b"behind", data[:-12]):
        assert torch.equal(decode_image(good), load_image(PHOTO))


def titled():
    from PIL.PngImagePlugin import PngInfo
    info = PngInfo()
    info.add_text("title", "a text")
    return info


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 100, "subsampling": 0}])
def test_a_jpeg_whose_end_is_zeros_is_refused(options):
    data = encoded(PHOTO, "JPEG", **options)
    for share in (2, 3, 5):
        assert_bad(data[:len(data) * share // 6] + bytes(len(data) - len(data) * share // 6),
                   "end is missing")
    assert_bad(data[:-2], "end is missing")
    exif = Image.Exif()
    exif[0x010e] = "a \xff\xd9 in the header"
    small = encoded(PHOTO, "JPEG", exif=exif.tobytes() + b"\xff\xd8\xff\xd9", **options)
    assert (decode_image(small).shape == decode_image(small + b"\xff\xda behind its end").shape
            == (3, 56, 72))
    assert_bad(small[:-2] + b"\0\0", "end is missing")


def assert_bad(data: bytes, text: str) -> None:
    with pytest.raises(BadImageError, match=text): decode_image(data)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_jpeg_that_states_gigabytes_is_refused_at_once(mode):
    data = encoded(PHOTO.convert(mode), "JPEG")
    assert_bad(damage.resized_header(data, 65_000, 65_000), "states 65000 x 65000 pixels")


# Annotations

def test_what_is_no_text_is_told_by_file(tmp_path):
    yolo = write_yolo(tmp_path / "yolo", dict(train=2), image_size=24)
    whole = (yolo / "labels/train/0001.txt").read_bytes()
    for content in (b"0 0.5 0.5 \xe9\n", whole + b"\0\0\0"):
        (yolo / "labels/train/0001.txt").write_bytes(content)
        with pytest.raises(AnnotationError, match=r"broken file.*\n.*0001\.txt'"): read_yolo(yolo)
    (yolo / "labels/train/0001.txt").write_bytes(b"\xef\xbb\xbf" + whole)
    assert len(read_yolo(yolo)) == 2
    names = (yolo / "data.yaml").read_text()
    for content, text in ((b"names: \xff\n", "not encoded"),
                          (b"names: " + b"[" * 20_000, "no YAML"),
                          (names.replace("circle", "").encode(), "class 0 of 'names' has no name")):
        (yolo / "data.yaml").write_bytes(content)
        with pytest.raises(ValueError, match=rf"data\.yaml.*{text}"): read_yolo(yolo)
    table = write_csv(tmp_path / "csv", dict(train=4), image_size=24) / "train.csv"
    whole = table.read_bytes()
    for content, text in ((whole[:-6] + bytes(6), "bytes of 0"),
                          (whole.replace(b",circle", b',"circle', 1), "quote never closed"),
                          (b"\n".join(whole.splitlines()[1:] * 2).replace(b"0001.png", b"g", 1),
                           "no header|not the names")):
        table.write_bytes(content)
        with pytest.raises(ValueError, match=rf"train\.csv.*({text})"): read_csv_split(table)


def test_a_page_in_place_of_annotations_is_told(tmp_path):
    voc = write_voc(tmp_path, dict(train=2), image_size=24)
    (voc / "Annotations/0001.xml").write_bytes(damage.web_page(b"", np.random.default_rng(0)))
    with pytest.raises(AnnotationError,
                       match=r"0001\.xml: expected <annotation>, got <html>|broken XML.*\n.*0001\.xml"):
        read_voc(voc, "train")


@pytest.mark.parametrize("change, kind", [
    (lambda o: o["annotations"][0].update(area="large"), "broken area"),
    (lambda o: o["annotations"][0].update(area=True), "broken area"),
    (lambda o: o["annotations"][0].update(iscrowd=-5), "broken iscrowd"),
    (lambda o: o["images"][0].update(width="wide"), "broken image size"),
    (lambda o: o["images"][0].update(height=[]), "broken image size"),
    (lambda o: o["annotations"][0].update(category_id=True), "unknown category"),
    (lambda o: o["annotations"][0].update(image_id=True), "annotation of an unknown image"),
    (lambda o: o["annotations"][0]["bbox"].__setitem__(2, True), "box that is no four numbers"),
    (lambda o: o["annotations"][0]["segmentation"][0].__setitem__(0, True), "broken segmentation"),
    (lambda o: o.update(annotatons=o.pop("annotations")), "no annotations")])
def test_a_coco_value_of_another_kind_is_told(tmp_path, change, kind):
    root = write_coco(tmp_path, dict(train2017=2), image_size=24)
    path = root / "annotations/instances_train2017.json"
    assert not read_coco(path).problems
    table = json.loads(path.read_text())
    change(table)
    path.write_text(json.dumps(table))
    with pytest.raises(AnnotationError) as e: read_coco(path)
    assert [o.kind for o in e.value.problems] == [kind] and path.name in str(e.value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert len(read_coco(path, on_problem="report")) == 2


def test_brackets_without_end_are_told(tmp_path):
    (tmp_path / "deep.json").write_text('{"images": ' + "[" * 200_000)
    with pytest.raises(AnnotationError, match=r"deep\.json.*nested too deep"):
        read_coco(tmp_path / "deep.json")


# Workers

class Halve:
    "A transform of one's own, called as albumentations' are."
    def __call__(self, image): return {"image": image[::2, ::2]}


def test_csv_data_sets_with_albumentations_go_to_spawned_workers(tmp_path):
    A = pytest.importorskip("albumentations")
    plain = A.Compose([A.Resize(32, 32)])
    boxes = A.Compose([A.Resize(32, 32)], bbox_params=A.BboxParams(format="pascal_voc"))
    root = {k: write(tmp_path / k, dict(train=2), image_size=24, **more) for k, write, more in (
        ("one", write_csv, {}), ("many", write_multilabel_csv, {}),
        ("boxes", write_boxes_csv, {"masks": True}))}
    tables = {k: (o / "train.csv", o / "images") for k, o in root.items()}
    sets = [CSVImageDataset(*tables["one"], transform=plain, use_albumentations=True),
            CSVImageDataset(*tables["one"], transform=Halve(), use_albumentations=True),
            MultiLabelImageDataset(*tables["many"], transform=plain, use_albumentations=True),
            CSVDetectionDataset(*tables["boxes"], transform=boxes),
            CSVInstanceDataset(*tables["boxes"], transform=boxes)]
    context = multiprocessing.get_context("spawn")
    items = [*DataLoader(ConcatDataset(sets), batch_size=None, num_workers=1,
                         multiprocessing_context=context)]
    here = [o for data in sets for o in (data[0], data[1])]
    images = lambda o: o["image"] if isinstance(o, dict) else o[0]
    assert [images(o).shape[-1] for o in items] == [32, 32, 12, 12, *[32] * 6]
    assert all(torch.equal(images(a), images(b))
               for a, b in zip(items, here)) and torch.equal(items[-1]["masks"], here[-1]["masks"])
