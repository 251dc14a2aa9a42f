from .data import (
    BUILTIN_FORMATS as BUILTIN_FORMATS,
    SHAPE_NAMES as SHAPE_NAMES,
    ShapeScene as ShapeScene,
    accept_builtin as accept_builtin,
    make_shapes as make_shapes,
    mask_to_polygons as mask_to_polygons,
    mask_to_rle as mask_to_rle,
    write_boxes_csv as write_boxes_csv,
    write_builtin as write_builtin,
    write_cifar10 as write_cifar10,
    write_coco as write_coco,
    write_csv as write_csv,
    write_folders as write_folders,
    write_masks as write_masks,
    write_multilabel_csv as write_multilabel_csv,
    write_voc as write_voc,
    write_yolo as write_yolo,
)
from .hub import LocalHub as LocalHub
from .repos import (
    HubContent as HubContent,
    HubRepo as HubRepo,
    blob_id as blob_id,
)
from .server import (
    FAULTS as FAULTS,
    HubFault as HubFault,
)
