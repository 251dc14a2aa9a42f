from .coco import AnnotationError as AnnotationError
from .datamodule import (
    DetectionDataModule as DetectionDataModule,
    ImageDataModule as ImageDataModule,
    InstanceSegmentationDataModule as InstanceSegmentationDataModule,
    MultiLabelImageDataModule as MultiLabelImageDataModule,
    SegmentationDataModule as SegmentationDataModule,
)
from .objects import (
    CSVDetectionDataset as CSVDetectionDataset,
    CSVInstanceDataset as CSVInstanceDataset,
)
from .readers import (
    BadImageError as BadImageError,
    CSVImageDataset as CSVImageDataset,
    MultiLabelImageDataset as MultiLabelImageDataset,
)
from .transforms import (
    TransformConfig as TransformConfig,
    create_inference_transform as create_inference_transform,
    get_transforms_from_backbone as get_transforms_from_backbone,
    list_transform_presets as list_transform_presets,
    resolve_backbone_data_config as resolve_backbone_data_config,
)
