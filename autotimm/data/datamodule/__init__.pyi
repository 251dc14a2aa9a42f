from .base import VisionDataModule as VisionDataModule
from .images import (
    ImageDataModule as ImageDataModule,
    MultiLabelImageDataModule as MultiLabelImageDataModule,
    SegmentationDataModule as SegmentationDataModule,
)
from .objects import (
    DetectionDataModule as DetectionDataModule,
    InstanceSegmentationDataModule as InstanceSegmentationDataModule,
)
