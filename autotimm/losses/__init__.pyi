from .classification import (
    AsymmetricLoss as AsymmetricLoss,
    BCEWithLogitsLoss as BCEWithLogitsLoss,
    CrossEntropyLoss as CrossEntropyLoss,
    FocalLoss as FocalLoss,
    LOSS_ALIASES as LOSS_ALIASES,
    at_least_float32 as at_least_float32,
    check_class_weights as check_class_weights,
    create_loss as create_loss,
    get_loss as get_loss,
    list_losses as list_losses,
    local_counts as local_counts,
    mean_over_processes as mean_over_processes,
    over_processes as over_processes,
    pixels_as_rows as pixels_as_rows,
    reduce_loss as reduce_loss,
)
from .detection import (
    CenternessLoss as CenternessLoss,
    FCOSLoss as FCOSLoss,
    GIoULoss as GIoULoss,
    MaskLoss as MaskLoss,
    YOLOXLoss as YOLOXLoss,
)
from .segmentation import (
    CombinedSegmentationLoss as CombinedSegmentationLoss,
    DiceLoss as DiceLoss,
    FocalLossPixelwise as FocalLossPixelwise,
    SEGMENTATION_LOSSES as SEGMENTATION_LOSSES,
    TverskyLoss as TverskyLoss,
    create_segmentation_loss as create_segmentation_loss,
)
