"""Data modules: images with labels, masks, boxes and instance masks, as the trainer takes them."""
import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
