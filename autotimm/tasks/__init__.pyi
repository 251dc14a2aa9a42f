from .base import VisionTask as VisionTask
from .classification import ImageClassifier as ImageClassifier
from .detection import ObjectDetector as ObjectDetector
from .instance import InstanceSegmentor as InstanceSegmentor
from .segmentation import SemanticSegmentor as SemanticSegmentor
from .yolox import YOLOXDetector as YOLOXDetector
