"""Save a model, load it, push it to the Hugging Face Hub; in a form that timm and transformers read too."""
import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
