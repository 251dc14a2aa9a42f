"""Tasks: a backbone, a head, and what happens in a step."""
from typing import TYPE_CHECKING

from autotimm.core import lazy_names

if TYPE_CHECKING:
    from autotimm.tasks.base import VisionTask
    from autotimm.tasks.classification import ImageClassifier
    from autotimm.tasks.segmentation import SemanticSegmentor

__all__ = ["ImageClassifier", "SemanticSegmentor", "VisionTask"]
__getattr__, __dir__ = lazy_names(__name__, {"VisionTask": "autotimm.tasks.base",
                                             "ImageClassifier": "autotimm.tasks.classification",
                                             "SemanticSegmentor": "autotimm.tasks.segmentation"})
