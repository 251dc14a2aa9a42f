"""One HTML file that shows what a trained model can do, and where it goes wrong."""
import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
