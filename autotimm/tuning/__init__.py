"""Searches for the learning rate and the batch size before a training, which leave no trace behind."""
import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
