from .network import (
    CSPDarknet as CSPDarknet,
    PAFPN as PAFPN,
    YOLOX as YOLOX,
    YOLOXHead as YOLOXHead,
    YOLOXVariant as YOLOXVariant,
    YOLOX_MODELS as YOLOX_MODELS,
    bottlenecks as bottlenecks,
    build_yolox as build_yolox,
    decode_yolox as decode_yolox,
    get_yolox_model_info as get_yolox_model_info,
    list_yolox_backbones as list_yolox_backbones,
    list_yolox_heads as list_yolox_heads,
    list_yolox_models as list_yolox_models,
    list_yolox_necks as list_yolox_necks,
)
from .official import (
    load_official_yolox as load_official_yolox,
    official_to_ours as official_to_ours,
)
