from . import (
    backbones as backbones,
    boxes as boxes,
    core as core,
    data as data,
    export as export,
    heads as heads,
    hub as hub,
    loggers as loggers,
    losses as losses,
    metrics as metrics,
    optim as optim,
    prediction as prediction,
    report as report,
    results as results,
    serve as serve,
    tasks as tasks,
    testing as testing,
    trainer as trainer,
    viz as viz,
    yolox as yolox,
)
from .backbones.backbone import (
    Backbone as Backbone,
    create_backbone as create_backbone,
    create_feature_backbone as create_feature_backbone,
    get_feature_channels as get_feature_channels,
    get_feature_info as get_feature_info,
    get_feature_strides as get_feature_strides,
)
from .backbones.config import (
    BackboneConfig as BackboneConfig,
    FeatureBackboneConfig as FeatureBackboneConfig,
)
from .backbones.fetch import list_hf_hub_backbones as list_hf_hub_backbones
from .backbones.sources import (
    HubError as HubError,
    ModelSource as ModelSource,
    get_model_source as get_model_source,
)
from .backbones.timm import list_backbones as list_backbones
from .calibration import Calibration as Calibration
from .core import (
    MissingExtraError as MissingExtraError,
    count_parameters as count_parameters,
    seed_everything as seed_everything,
)
from .data.coco import AnnotationError as AnnotationError
from .data.datamodule.images import (
    ImageDataModule as ImageDataModule,
    MultiLabelImageDataModule as MultiLabelImageDataModule,
    SegmentationDataModule as SegmentationDataModule,
)
from .data.datamodule.objects import (
    DetectionDataModule as DetectionDataModule,
    InstanceSegmentationDataModule as InstanceSegmentationDataModule,
)
from .data.datasets import (
    CSVImageDataset as CSVImageDataset,
    MultiLabelImageDataset as MultiLabelImageDataset,
)
from .data.images import BadImageError as BadImageError
from .data.objects import (
    CSVDetectionDataset as CSVDetectionDataset,
    CSVInstanceDataset as CSVInstanceDataset,
)
from .data.preprocessing import (
    TransformConfig as TransformConfig,
    list_transform_presets as list_transform_presets,
    resolve_backbone_data_config as resolve_backbone_data_config,
)
from .data.transforms import (
    create_inference_transform as create_inference_transform,
    get_transforms_from_backbone as get_transforms_from_backbone,
)
from .export.int8 import quantize_onnx as quantize_onnx
from .export.onnx import (
    export_checkpoint_to_onnx as export_checkpoint_to_onnx,
    export_to_onnx as export_to_onnx,
)
from .export.program import (
    export_checkpoint_to_torchscript as export_checkpoint_to_torchscript,
    export_program as export_program,
    export_to_torchscript as export_to_torchscript,
    load_program as load_program,
    load_torchscript as load_torchscript,
    validate_torchscript_export as validate_torchscript_export,
)
from .export.results import ExportError as ExportError
from .export.runtime import (
    OnnxModel as OnnxModel,
    load_onnx as load_onnx,
    validate_onnx_export as validate_onnx_export,
)
from .heads.output import (
    ASPP as ASPP,
    ClassificationHead as ClassificationHead,
    DeepLabV3PlusHead as DeepLabV3PlusHead,
    DetectionHead as DetectionHead,
    FCNHead as FCNHead,
    FPNHead as FPNHead,
    MaskHead as MaskHead,
    UPerNetHead as UPerNetHead,
)
from .heads.pyramid import FPN as FPN
from .hub.push import push_to_hub as push_to_hub
from .hub.save import (
    load_pretrained as load_pretrained,
    save_pretrained as save_pretrained,
)
from .loggers import (
    LoggerConfig as LoggerConfig,
    LoggerManager as LoggerManager,
)
from .losses.classification import (
    FocalLoss as FocalLoss,
    list_losses as list_losses,
)
from .losses.detection import (
    CenternessLoss as CenternessLoss,
    FCOSLoss as FCOSLoss,
    GIoULoss as GIoULoss,
    MaskLoss as MaskLoss,
    YOLOXLoss as YOLOXLoss,
)
from .losses.segmentation import (
    CombinedSegmentationLoss as CombinedSegmentationLoss,
    DiceLoss as DiceLoss,
    FocalLossPixelwise as FocalLossPixelwise,
    TverskyLoss as TverskyLoss,
)
from .metrics.config import (
    LoggingConfig as LoggingConfig,
    MetricConfig as MetricConfig,
)
from .metrics.manager import MetricManager as MetricManager
from .optim.optimizers import list_optimizers as list_optimizers
from .optim.schedulers import list_schedulers as list_schedulers
from .results.images import (
    ClassificationResult as ClassificationResult,
    DetectionResult as DetectionResult,
    Result as Result,
    SegmentationResult as SegmentationResult,
)
from .results.table import Results as Results
from .serve.app import create_app as create_app
from .tasks.base import VisionTask as VisionTask
from .tasks.classification import ImageClassifier as ImageClassifier
from .tasks.detection import ObjectDetector as ObjectDetector
from .tasks.instance import InstanceSegmentor as InstanceSegmentor
from .tasks.segmentation import SemanticSegmentor as SemanticSegmentor
from .tasks.yolox import YOLOXDetector as YOLOXDetector
from .trainer.trainer import AutoTrainer as AutoTrainer
from .training_cli.options import AutoTimmCLI as AutoTimmCLI
from .tuning.trials import TunerConfig as TunerConfig
from .yolox.network import (
    CSPDarknet as CSPDarknet,
    PAFPN as PAFPN,
    YOLOX as YOLOX,
    YOLOXHead as YOLOXHead,
    build_yolox as build_yolox,
    get_yolox_model_info as get_yolox_model_info,
    list_yolox_backbones as list_yolox_backbones,
    list_yolox_heads as list_yolox_heads,
    list_yolox_models as list_yolox_models,
    list_yolox_necks as list_yolox_necks,
)
from .yolox.official import load_official_yolox as load_official_yolox

__version__: str
head = heads
loss = losses
metric = metrics
metrics_module = metrics
task = tasks
