"""What lets a run go on exactly: its state in a checkpoint, and the callback that writes and restores it."""
import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
