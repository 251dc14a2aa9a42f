"""One `Backbone` from any source: a timm name, a Hub id, a folder, a transformers config or model, your own module."""
import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
