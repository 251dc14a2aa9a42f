"""A model behind HTTP: POST an image and get JSON, or drop a photo on a page."""
import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
