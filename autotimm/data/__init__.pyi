from .coco import AnnotationError as AnnotationError
from .datamodule.images import (
    ImageDataModule as ImageDataModule,
    MultiLabelImageDataModule as MultiLabelImageDataModule,
    SegmentationDataModule as SegmentationDataModule,
)
from .datamodule.objects import (
    DetectionDataModule as DetectionDataModule,
    InstanceSegmentationDataModule as InstanceSegmentationDataModule,
)
from .datasets import (
    CSVImageDataset as CSVImageDataset,
    MultiLabelImageDataset as MultiLabelImageDataset,
)
from .images import BadImageError as BadImageError
from .objects import (
    CSVDetectionDataset as CSVDetectionDataset,
    CSVInstanceDataset as CSVInstanceDataset,
)
from .preprocessing import (
    TransformConfig as TransformConfig,
    list_transform_presets as list_transform_presets,
    resolve_backbone_data_config as resolve_backbone_data_config,
)
from .transforms import (
    create_inference_transform as create_inference_transform,
    get_transforms_from_backbone as get_transforms_from_backbone,
)
