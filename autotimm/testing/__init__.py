"""Made-up data for every vision task, and a stand-in for the Hugging Face Hub."""
from autotimm.testing.data import (BUILTIN_FORMATS, SHAPE_NAMES, ShapeScene, accept_builtin,
                                   make_shapes, mask_to_polygons, mask_to_rle, write_boxes_csv,
                                   write_builtin, write_cifar10, write_coco, write_csv,
                                   write_folders, write_masks, write_multilabel_csv, write_voc,
                                   write_yolo)
from autotimm.testing.hub import LocalHub
from autotimm.testing.repos import HubContent, HubRepo, blob_id
from autotimm.testing.server import FAULTS, HubFault

__all__ = ["BUILTIN_FORMATS", "FAULTS", "HubContent", "HubFault", "HubRepo", "LocalHub",
           "SHAPE_NAMES", "ShapeScene", "accept_builtin", "blob_id", "make_shapes",
           "mask_to_polygons", "mask_to_rle", "write_boxes_csv", "write_builtin", "write_cifar10",
           "write_coco", "write_csv", "write_folders", "write_masks", "write_multilabel_csv",
           "write_voc", "write_yolo"]
