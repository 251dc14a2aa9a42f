from .backbone import (
    Backbone as Backbone,
    FeatureBackbone as FeatureBackbone,
    create_backbone as create_backbone,
    create_feature_backbone as create_feature_backbone,
    get_feature_channels as get_feature_channels,
    get_feature_info as get_feature_info,
    get_feature_strides as get_feature_strides,
)
from .config import (
    BackboneConfig as BackboneConfig,
    FeatureBackboneConfig as FeatureBackboneConfig,
)
from .fetch import list_hf_hub_backbones as list_hf_hub_backbones
from .sources import (
    HubAccessError as HubAccessError,
    HubCorruptError as HubCorruptError,
    HubError as HubError,
    HubHiddenError as HubHiddenError,
    HubNotFoundError as HubNotFoundError,
    HubOfflineError as HubOfflineError,
    ModelSource as ModelSource,
    get_model_source as get_model_source,
)
from .timm import list_backbones as list_backbones
