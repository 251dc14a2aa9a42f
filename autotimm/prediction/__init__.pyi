from .images import (
    MAX_DOWNLOAD as MAX_DOWNLOAD,
    fetch_image as fetch_image,
    find_images as find_images,
)
from .run import (
    check_prediction as check_prediction,
    inputs_of as inputs_of,
    predict_images as predict_images,
    predict_loader as predict_loader,
    read_and_prepare as read_and_prepare,
)
from .views import (
    MAX_PIXELS as MAX_PIXELS,
    PrepareCrops as PrepareCrops,
    PrepareDense as PrepareDense,
    PrepareImage as PrepareImage,
    PrepareNative as PrepareNative,
    detections_to_original as detections_to_original,
    flip_detections as flip_detections,
    logits_to_classes as logits_to_classes,
    logits_to_original as logits_to_original,
    merge_detections as merge_detections,
    original_size as original_size,
    prepare_classification as prepare_classification,
    prepare_dense as prepare_dense,
)
