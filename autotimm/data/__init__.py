"""Data modules, data sets and transforms."""
from typing import TYPE_CHECKING

from autotimm.core import lazy_names

_WHERE = {
    "annotations": "AnnotationError CSVDetectionDataset CSVInstanceDataset",
    "datamodule": "DetectionDataModule ImageDataModule InstanceSegmentationDataModule MultiLabelImageDataModule "
                  "SegmentationDataModule",
    "readers": "BadImageError CSVImageDataset MultiLabelImageDataset",
    "transforms": "TransformConfig create_inference_transform get_transforms_from_backbone list_transform_presets "
                  "resolve_backbone_data_config",
}

if TYPE_CHECKING:
    from autotimm.data.annotations import AnnotationError, CSVDetectionDataset, CSVInstanceDataset
    from autotimm.data.datamodule import (DetectionDataModule, ImageDataModule, InstanceSegmentationDataModule,
                                          MultiLabelImageDataModule, SegmentationDataModule)
    from autotimm.data.readers import BadImageError, CSVImageDataset, MultiLabelImageDataset
    from autotimm.data.transforms import (TransformConfig, create_inference_transform, get_transforms_from_backbone,
                                          list_transform_presets, resolve_backbone_data_config)

__all__ = ["AnnotationError", "BadImageError", "CSVDetectionDataset", "CSVImageDataset", "CSVInstanceDataset", "DetectionDataModule",
           "ImageDataModule", "InstanceSegmentationDataModule", "MultiLabelImageDataModule", "MultiLabelImageDataset",
           "SegmentationDataModule", "TransformConfig", "create_inference_transform", "get_transforms_from_backbone",
           "list_transform_presets", "resolve_backbone_data_config"]
__getattr__, __dir__ = lazy_names(__name__, {name: f"autotimm.data.{module}" for module, names in _WHERE.items()
                                             for name in names.split()})
