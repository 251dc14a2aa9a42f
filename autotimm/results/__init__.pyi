from .coco import (
    coco_dataset as coco_dataset,
    file_names as file_names,
)
from .images import (
    ClassificationResult as ClassificationResult,
    DetectionResult as DetectionResult,
    Result as Result,
    SegmentationResult as SegmentationResult,
)
from .table import Results as Results
