"""Lightning's `Trainer` with searches, runs that can be stopped and resumed exactly, and curves."""
import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
