"""Annotations in spawned workers, whose classes a notebook cannot hold, and masks that would end
the process."""
import json

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, get_worker_info

from autotimm.data.annotations import Annotations
from autotimm.data.formats import read_coco
from autotimm.testing import write_coco


class Probe(torch.utils.data.Dataset):
    "The masks of each image, and the worker that made them."
    def __init__(self, annotations: Annotations) -> None: self.annotations = annotations
    def __len__(self) -> int: return len(self.annotations)
    def __getitem__(self, i: int):
        if i == 0: self.annotations.labels[:] = 2     # seen by the parent if the memory is one
        return get_worker_info().id, self.annotations.target(i), self.annotations.masks(i)


def test_spawned_workers_share_the_arrays(tmp_path):
    root = write_coco(tmp_path, splits=dict(train2017=8))
    annotations = read_coco(root / "annotations/instances_train2017.json", root / "train2017")
    expected = [(annotations.target(i), annotations.masks(i)) for i in range(8)]
    assert (annotations.labels == 0).any()
    workers = set()
    for (worker, target, masks), (wanted, wanted_masks) in zip(
            DataLoader(Probe(annotations), batch_size=None, num_workers=2,
                       multiprocessing_context="spawn"), expected):
        workers.add(worker)
        assert np.array_equal(target["boxes"],
                              wanted["boxes"]) and target["image_id"] == wanted["image_id"]
        assert np.array_equal(masks, wanted_masks)
    assert workers == {0, 1}
    assert (annotations.labels == 2).all()


@pytest.mark.parametrize("segmentation", [
    {"size": [32, 32], "counts": o} for o in ("", "o", "o" * 300 + "0", "5~", "42", "4d0",
                                              "4oooooo1oooooo1", "4nooooo37", "4\0oooo",
                                              [4, -2, 1022], [4, 4], [2**40], [1e300, 1.0], ["x"])]
                         + [
    {"size": [2**30, 2**30], "counts": [2**60]}, {"size": [32, 32]}, [[1, 2, 3, 4]],
    [[1, 2]], [[1, 2, 1e12, 2, 9, 9]],
    [[1, 2, float("nan"), 2, 9, 9]], [[1, 2, 9, 2, 9, 9], [1, 2, float("inf"), 2, 9, 9]],
    [[1, 2, 3, 4, 5, 6, 7]]])
def test_damaged_masks_are_errors_and_end_no_process(tmp_path, segmentation):
    "pycocotools reads and writes beyond its memory, or never returns, for most of these."
    table = {"images": [{"id": 1, "file_name": "ant.png", "height": 32, "width": 32}],
             "categories": [{"id": 1, "name": "ant"}],
             "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9],
                              "area": 81, "iscrowd": 0,
                              "segmentation": segmentation}]}
    (tmp_path / "table.json").write_text(json.dumps(table))
    with pytest.raises(ValueError,
                       match=r"(broken segmentation|The mask of object 0 \(of 1\) of image 'ant.png' cannot be made)"):
        read_coco(tmp_path / "table.json").masks(0)
