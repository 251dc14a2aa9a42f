"""One `Backbone` from any source: a timm name, a Hub id, a folder, a transformers config or model, your own module."""
from typing import TYPE_CHECKING

from autotimm.core import lazy_names

_WHERE = {
    "sources": "HubAccessError HubCorruptError HubError HubHiddenError HubNotFoundError HubOfflineError ModelSource get_model_source",
    "config": "BackboneConfig FeatureBackboneConfig",
    "backbone": "Backbone FeatureBackbone create_backbone create_feature_backbone get_feature_channels get_feature_info "
                "get_feature_strides list_backbones list_hf_hub_backbones",
}

if TYPE_CHECKING:
    from autotimm.backbones.backbone import (Backbone, FeatureBackbone, create_backbone, create_feature_backbone,
                                             get_feature_channels, get_feature_info, get_feature_strides, list_backbones,
                                             list_hf_hub_backbones)
    from autotimm.backbones.config import BackboneConfig, FeatureBackboneConfig
    from autotimm.backbones.sources import (HubAccessError, HubCorruptError, HubError, HubHiddenError, HubNotFoundError,
                                            HubOfflineError, ModelSource, get_model_source)

__all__ = ["Backbone", "BackboneConfig", "FeatureBackbone", "FeatureBackboneConfig", "HubAccessError", "HubCorruptError",
           "HubError", "HubHiddenError", "HubNotFoundError", "HubOfflineError", "ModelSource", "create_backbone",
           "create_feature_backbone", "get_feature_channels", "get_feature_info", "get_feature_strides", "get_model_source",
           "list_backbones", "list_hf_hub_backbones"]
__getattr__, __dir__ = lazy_names(__name__, {name: f"autotimm.backbones.{module}" for module, names in _WHERE.items()
                                             for name in names.split()})
