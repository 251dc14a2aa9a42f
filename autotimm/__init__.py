"""Train vision models: any timm or transformers backbone, any task, one trainer.

Public names are imported when they are first used, so that `import autotimm` costs milliseconds.
"""
from typing import TYPE_CHECKING, Any

from autotimm.core import lazy_names

_WHERE = {  # module -> its public names; tests/test_package.py holds it equal to the block for type checkers below
    "core": "MissingExtraError count_parameters seed_everything",
    "backbones": "Backbone BackboneConfig FeatureBackboneConfig HubError ModelSource create_backbone "
                 "create_feature_backbone get_feature_channels get_feature_info get_feature_strides get_model_source "
                 "list_backbones list_hf_hub_backbones",
    "losses": "CenternessLoss CombinedSegmentationLoss DiceLoss FCOSLoss FocalLoss FocalLossPixelwise GIoULoss MaskLoss TverskyLoss YOLOXLoss list_losses",
    "heads": "ASPP ClassificationHead DeepLabV3PlusHead DetectionHead FCNHead FPN FPNHead MaskHead UPerNetHead",
    "yolox": "CSPDarknet PAFPN YOLOX YOLOXHead build_yolox get_yolox_model_info list_yolox_backbones list_yolox_heads "
             "list_yolox_models list_yolox_necks load_official_yolox",
    "optim": "list_optimizers list_schedulers",
    "metrics": "LoggingConfig MetricConfig MetricManager",
    "loggers": "LoggerConfig LoggerManager",
    "data": "AnnotationError BadImageError CSVDetectionDataset CSVImageDataset CSVInstanceDataset DetectionDataModule "
            "ImageDataModule InstanceSegmentationDataModule MultiLabelImageDataModule MultiLabelImageDataset "
            "SegmentationDataModule TransformConfig create_inference_transform get_transforms_from_backbone list_transform_presets "
            "resolve_backbone_data_config",
    "results": "ClassificationResult DetectionResult Result Results SegmentationResult",
    "calibration": "Calibration",
    "hub": "load_pretrained push_to_hub save_pretrained",
    "export": "ExportError OnnxModel export_checkpoint_to_onnx export_checkpoint_to_torchscript export_program export_to_onnx "
              "export_to_torchscript load_onnx load_program load_torchscript quantize_onnx validate_onnx_export "
              "validate_torchscript_export",
    "tasks": "ImageClassifier InstanceSegmentor ObjectDetector SemanticSegmentor VisionTask YOLOXDetector",
    "trainer": "AutoTrainer TunerConfig",
    "training_cli": "AutoTimmCLI",
    "serve": "create_app",
}
_MODULES = {  # public submodules and their other names
    "core": "core", "testing": "testing", "backbones": "backbones", "data": "data", "boxes": "boxes", "heads": "heads", "head": "heads", "yolox": "yolox",
    "losses": "losses", "loss": "losses", "optim": "optim", "results": "results", "prediction": "prediction", "hub": "hub", "export": "export", "serve": "serve", "report": "report", "metrics": "metrics", "metrics_module": "metrics",
    "metric": "metrics", "loggers": "loggers", "viz": "viz", "tasks": "tasks", "task": "tasks", "trainer": "trainer",
}
_NAMES = {name: module for module, names in _WHERE.items() for name in names.split()}

if TYPE_CHECKING:
    from autotimm.backbones import (Backbone, BackboneConfig, FeatureBackboneConfig, HubError, ModelSource,
                                    create_backbone, create_feature_backbone, get_feature_channels, get_feature_info,
                                    get_feature_strides, get_model_source, list_backbones, list_hf_hub_backbones)
    from autotimm.core import MissingExtraError, count_parameters, seed_everything
    from autotimm.data import (AnnotationError, BadImageError, CSVDetectionDataset, CSVImageDataset, CSVInstanceDataset,
                               DetectionDataModule, ImageDataModule, InstanceSegmentationDataModule,
                               MultiLabelImageDataModule, MultiLabelImageDataset, SegmentationDataModule,
                               TransformConfig, create_inference_transform, get_transforms_from_backbone,
                               list_transform_presets, resolve_backbone_data_config)
    from autotimm.heads import (ASPP, FPN, ClassificationHead, DeepLabV3PlusHead, DetectionHead, FCNHead, FPNHead,
                                MaskHead, UPerNetHead)
    from autotimm.loggers import LoggerConfig, LoggerManager
    from autotimm.losses import (CenternessLoss, CombinedSegmentationLoss, DiceLoss, FCOSLoss, FocalLoss, FocalLossPixelwise,
                                 GIoULoss,
                                 MaskLoss, TverskyLoss, YOLOXLoss, list_losses)
    from autotimm.metrics import LoggingConfig, MetricConfig, MetricManager
    from autotimm.optim import list_optimizers, list_schedulers
    from autotimm.calibration import Calibration
    from autotimm.export import (ExportError, OnnxModel, export_checkpoint_to_onnx, export_checkpoint_to_torchscript,
                                 export_program, export_to_onnx, export_to_torchscript, load_onnx, load_program,
                                 load_torchscript, quantize_onnx, validate_onnx_export, validate_torchscript_export)
    from autotimm.hub import load_pretrained, push_to_hub, save_pretrained
    from autotimm.serve import create_app
    from autotimm.training_cli import AutoTimmCLI
    from autotimm.results import ClassificationResult, DetectionResult, Result, Results, SegmentationResult
    from autotimm.tasks import (ImageClassifier, InstanceSegmentor, ObjectDetector, SemanticSegmentor, VisionTask,
                                YOLOXDetector)
    from autotimm.trainer import AutoTrainer, TunerConfig
    from autotimm.yolox import (PAFPN, YOLOX, CSPDarknet, YOLOXHead, build_yolox, get_yolox_model_info,
                                list_yolox_backbones, list_yolox_heads, list_yolox_models, list_yolox_necks,
                                load_official_yolox)

__all__ = [
    "ASPP", "AnnotationError", "AutoTimmCLI", "AutoTrainer", "Backbone", "BackboneConfig", "BadImageError",
    "CSPDarknet", "CSVDetectionDataset", "CSVImageDataset", "CSVInstanceDataset", "Calibration", "CenternessLoss",
    "ClassificationHead", "ClassificationResult", "CombinedSegmentationLoss", "DeepLabV3PlusHead",
    "DetectionDataModule", "DetectionHead", "DetectionResult", "DiceLoss", "ExportError", "FCNHead", "FCOSLoss",
    "FPN", "FPNHead", "FeatureBackboneConfig", "FocalLoss", "FocalLossPixelwise", "GIoULoss", "HubError",
    "ImageClassifier", "ImageDataModule", "InstanceSegmentationDataModule", "InstanceSegmentor", "LoggerConfig",
    "LoggerManager", "LoggingConfig", "MaskHead", "MaskLoss", "MetricConfig", "MetricManager", "MissingExtraError",
    "ModelSource", "MultiLabelImageDataModule", "MultiLabelImageDataset", "ObjectDetector", "OnnxModel", "PAFPN",
    "Result", "Results", "SegmentationDataModule", "SegmentationResult", "SemanticSegmentor", "TransformConfig",
    "TunerConfig", "TverskyLoss", "UPerNetHead", "VisionTask", "YOLOX", "YOLOXDetector", "YOLOXHead", "YOLOXLoss",
    "build_yolox", "count_parameters", "create_app", "create_backbone", "create_feature_backbone",
    "create_inference_transform", "export_checkpoint_to_onnx", "export_checkpoint_to_torchscript", "export_program",
    "export_to_onnx", "export_to_torchscript", "get_feature_channels", "get_feature_info", "get_feature_strides",
    "get_model_source", "get_transforms_from_backbone", "get_yolox_model_info", "list_backbones",
    "list_hf_hub_backbones", "list_losses", "list_optimizers", "list_schedulers", "list_transform_presets",
    "list_yolox_backbones", "list_yolox_heads", "list_yolox_models", "list_yolox_necks", "load_official_yolox",
    "load_onnx", "load_pretrained", "load_program", "load_torchscript", "push_to_hub", "quantize_onnx",
    "resolve_backbone_data_config", "save_pretrained", "seed_everything", "validate_onnx_export",
    "validate_torchscript_export",
]

_getattr, __dir__ = lazy_names(__name__, {k: f"autotimm.{v}" for k, v in _NAMES.items()},
                               {k: f"autotimm.{v}" for k, v in _MODULES.items()})


def __getattr__(name: str) -> Any:
    if name != "__version__": return _getattr(name)
    from importlib.metadata import version
    return version("autotimm")
