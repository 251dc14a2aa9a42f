"""`autotimm fit | validate | test`: from a command line to a run folder."""
import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
