from .output import (
    ASPP as ASPP,
    ClassificationHead as ClassificationHead,
    DeepLabV3PlusHead as DeepLabV3PlusHead,
    DetectionHead as DetectionHead,
    FCNHead as FCNHead,
    FPNHead as FPNHead,
    MaskHead as MaskHead,
    SEGMENTATION_HEADS as SEGMENTATION_HEADS,
    UPerNetHead as UPerNetHead,
    create_segmentation_head as create_segmentation_head,
)
from .pyramid import (
    ConvNormAct as ConvNormAct,
    FPN as FPN,
    HalvingConv as HalvingConv,
    Pyramid as Pyramid,
    resize_map as resize_map,
)
