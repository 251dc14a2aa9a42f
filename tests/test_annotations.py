"Annotations in spawned workers: what a notebook, whose classes no other process can import, cannot hold."
import numpy as np
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
            DataLoader(Probe(annotations), batch_size=None, num_workers=2, multiprocessing_context="spawn"), expected):
        workers.add(worker)
        assert np.array_equal(target["boxes"], wanted["boxes"]) and target["image_id"] == wanted["image_id"]
        assert np.array_equal(masks, wanted_masks)
    assert workers == {0, 1}
    assert (annotations.labels == 2).all()
