"""A trained model as one file that runs without this library: ONNX, programs of torch.export, TorchScript, int8."""
import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
