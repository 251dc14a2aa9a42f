"""Tasks: a backbone, a head, and what happens in a step."""
from typing import TYPE_CHECKING

from autotimm.core import lazy_names

_WHERE = {"base": "VisionTask", "classification": "ImageClassifier", "segmentation": "SemanticSegmentor",
          "detection": "ObjectDetector", "yolox": "YOLOXDetector", "instance": "InstanceSegmentor"}

if TYPE_CHECKING:
    from autotimm.tasks.base import VisionTask
    from autotimm.tasks.classification import ImageClassifier
    from autotimm.tasks.detection import ObjectDetector
    from autotimm.tasks.instance import InstanceSegmentor
    from autotimm.tasks.segmentation import SemanticSegmentor
    from autotimm.tasks.yolox import YOLOXDetector

__all__ = ["ImageClassifier", "InstanceSegmentor", "ObjectDetector", "SemanticSegmentor", "VisionTask", "YOLOXDetector"]
__getattr__, __dir__ = lazy_names(__name__, {name: f"autotimm.tasks.{module}" for module, name in _WHERE.items()})
