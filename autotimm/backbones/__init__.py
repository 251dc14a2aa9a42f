"""One `Backbone` from any source: timm, the Hub, a folder, transformers, your own module."""
import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
