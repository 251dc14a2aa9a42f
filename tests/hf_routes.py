"""The four ways from Hugging Face to a trained classifier, tiny, with data that they learn in a few
steps."""
from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from autotimm.testing import LocalHub

SIZE, CLASSES = 32, 3
TIMM_ID, VIT_ID = "timm/tiny_convnext.shapes", "tester/tiny-vit"
RESNET_ID, TIMM_VIT_ID = "timm/tiny_resnet.shapes", "timm/tiny_vit.shapes"
TINY = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
            image_size=SIZE, patch_size=8)
HAS_TRANSFORMERS = importlib.util.find_spec("transformers") is not None


def fill(hub: LocalHub) -> LocalHub:
    "Put the tiny repositories that these tests ask for into a Hub."
    hub.add_timm(TIMM_ID, "test_convnext", num_classes=10)
    hub.add_timm(RESNET_ID, "test_resnet", num_classes=10)
    hub.add_timm(TIMM_VIT_ID, "test_vit", num_classes=10, img_size=SIZE)
    if HAS_TRANSFORMERS:
        from transformers import ViTConfig
        hub.add_transformers(VIT_ID, ViTConfig(**TINY))
    return hub


def make_set(n: int = 24, seed: int = 0, size: int = SIZE) -> TensorDataset:
    "Noise, brighter in the channel that is the class."
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % CLASSES
    x = torch.randn(n, 3, size, size, generator=g)
    x[torch.arange(n), y] += 1.0
    return TensorDataset(x, y)


def loaders(n: int = 24, batch_size: int = 8,
            shuffle: bool = False) -> tuple[DataLoader, DataLoader]:
    "Batches for training and for validation."
    return (DataLoader(make_set(n), batch_size=batch_size, shuffle=shuffle),
            DataLoader(make_set(12, seed=1), batch_size=6))


class UserModule(pl.LightningModule):
    "What a user writes around a transformers model: no `lr`, no `data_config`, its own steps."

    def __init__(self, vit: nn.Module, width: int, dropout: float, sgd: bool) -> None:
        super().__init__()
        self.vit, self.dropout, self.classifier, self.sgd = (vit, nn.Dropout(dropout),
                                                             nn.Linear(width, CLASSES), sgd)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.classifier(self.dropout(self.vit(pixel_values=pixel_values).pooler_output))

    def step(self, batch: Any, stage: str) -> Tensor:
        x, y = batch
        logits = self(x)
        loss = F.cross_entropy(logits, y)
        right = (logits.argmax(1) == y).float().mean()
        self.log_dict({f"{stage}/loss": loss, f"{stage}/accuracy": right}, on_epoch=True,
                      on_step=False, sync_dist=True,
                      batch_size=len(y))
        return loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor: return self.step(batch, "train")
    def validation_step(self, batch: Any, batch_idx: int) -> None: self.step(batch, "val")
    def test_step(self, batch: Any, batch_idx: int) -> None: self.step(batch, "test")
    def predict_step(self, batch: Any, batch_idx: int) -> Tensor: return self(batch[0]).softmax(-1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.sgd: return torch.optim.SGD(self.parameters(), lr=0.05)
        return torch.optim.AdamW([dict(params=self.vit.parameters(), lr=1e-3),
                                  dict(params=self.classifier.parameters(), lr=4e-3)],
                                 weight_decay=1e-4)


class DirectModule(UserModule):
    "Route 2: the specific class, its config written out."

    def __init__(self, hidden_size: int = 32, dropout: float = 0.0, sgd: bool = False) -> None:
        from transformers import ViTConfig, ViTModel
        super().__init__(ViTModel(ViTConfig(**{**TINY, "hidden_size": hidden_size})),
                         hidden_size, dropout, sgd)
        self.save_hyperparameters()


class AutoModule(UserModule):
    "Route 3: the class that the repository names."

    def __init__(self, model_id: str = VIT_ID, dropout: float = 0.0, sgd: bool = False) -> None:
        from transformers import AutoModel
        vit = AutoModel.from_pretrained(model_id)
        # Without train(), a model that comes out of from_pretrained stays in eval mode.
        super().__init__(vit.train(), vit.config.hidden_size, dropout, sgd)
        self.save_hyperparameters()


def classifier(backbone: Any, dropout: float = 0.0, sgd: bool = False,
               **kwargs: Any) -> pl.LightningModule:
    "Routes 1 and 4: autotimm's own task."
    from autotimm import ImageClassifier
    how: dict[str, Any] = dict(lr=2e-3, scheduler=None)
    if sgd: how = dict(lr=0.05, weight_decay=0.0, optimizer="sgd", scheduler=None)
    return ImageClassifier(backbone, CLASSES, head_dropout=dropout, image_size=SIZE,
                           **{**how, **kwargs})


def _config() -> Any:
    from transformers import ViTConfig
    return ViTConfig(**TINY)


def _model() -> Any:
    from transformers import ViTModel
    return ViTModel(_config())


def _load_classifier(path: Any) -> pl.LightningModule:
    from autotimm import ImageClassifier
    return ImageClassifier.load_from_checkpoint(path)


@dataclass(frozen=True)
class Route:
    "One way to a model."
    name: str
    make: Callable[..., pl.LightningModule]             # takes dropout= and sgd=
    load: Callable[[Any], pl.LightningModule]           # from a checkpoint alone
    native: bool  # through ImageClassifier: brings a data config and class names
    needs_transformers: bool = True

    def build(self, seed: int = 0, **kwargs: Any) -> pl.LightningModule:
        "A model with the weights of a seed."
        torch.manual_seed(seed)
        return self.make(**kwargs)


def _load_user(cls: type[pl.LightningModule]) -> Callable[[Any], pl.LightningModule]:
    return lambda path: cls.load_from_checkpoint(path, weights_only=True).eval()


ROUTES = {o.name: o for o in (
    Route("hub-timm", lambda **k: classifier(f"hf-hub:{TIMM_ID}", **k), _load_classifier,
          True, needs_transformers=False),
    Route("transformers-direct", DirectModule, _load_user(DirectModule), False),
    Route("transformers-auto", AutoModule, _load_user(AutoModule), False),
    Route("transformers-backbone", lambda **k: classifier(_config(), **k), _load_classifier, True),
)}
# The other things that `backbone=` takes from transformers.
VARIANTS = {o.name: o for o in (
    Route("backbone-model", lambda **k: classifier(_model(), **k), _load_classifier, True),
    Route("backbone-hub-id", lambda **k: classifier(VIT_ID, **k), _load_classifier, True),
)}


class Note(pl.Callback):
    "Notes what happens in training."

    def __init__(self) -> None:
        self.losses: list[float] = []                   # of each batch
        self.val: list[dict[str, float]] = []  # what was logged by the end of each validation
        self.grads: list[dict[str, Tensor]] = []        # at each optimiser step
        self.rates: list[list[float]] = []              # of the parameter groups, likewise
        self.sizes: list[int] = []                      # of each batch
        self.hooks: list[str] = []
        self.start: dict[str, Tensor] = {}              # weights

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.hooks.append("train_start")
        self.start = weights(pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule,
                           outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))
        self.sizes.append(len(batch[1]))

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule,
                                 optimizer: Any) -> None:
        self.grads.append({n: p.grad.clone() for n, p in pl_module.named_parameters()
                           if p.grad is not None})
        self.rates.append([g["lr"] for g in optimizer.param_groups])

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.hooks.append("train_epoch_end")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking: return
        self.hooks.append("validation_end")
        self.val.append({k: float(v) for k, v in trainer.callback_metrics.items()})


class Spoil(pl.Callback):
    """Turns the head's weights round before the validation of an epoch, so that it is worse than
    the one before."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or trainer.current_epoch != self.epoch: return
        head = [m for m in pl_module.modules() if isinstance(m, nn.Linear)][-1]
        with torch.no_grad(): head.weight.mul_(-3)


class Rates(pl.Callback):
    "Sets the learning rates of the parameter groups before the first step."

    def __init__(self, rates: list[float]) -> None:
        self.rates = rates

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for group, rate in zip(trainer.optimizers[0].param_groups, self.rates, strict=True):
            group["lr"] = rate


class Killed(RuntimeError): "What ends a run before its time."


class Kill(pl.Callback):
    "Ends the run at the start of an epoch."

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == self.epoch: raise Killed


def weights(model: nn.Module) -> dict[str, Tensor]:
    "A copy of the parameters and of what belongs to them."
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], **tolerance: float) -> None:
    "Both hold the same tensors, bit for bit where no tolerance is given."
    assert found.keys() == wanted.keys()
    for k, v in wanted.items():
        torch.testing.assert_close(found[k], v, **(tolerance or dict(rtol=0, atol=0)),
                                   msg=lambda m, k=k: f"{k}: {m}")


@torch.no_grad()
def logits_of(model: nn.Module, x: Tensor) -> Tensor:
    "Logits in eval mode; the model's modes are left as they were."
    training = model.training
    out = model.eval()(x).detach()
    model.train(training)
    return out


def quiet(root: Any, **kwargs: Any) -> dict[str, Any]:
    "Arguments of a trainer on the CPU that writes to one folder and says little."
    return dict(accelerator="cpu", devices=1, default_root_dir=str(root), enable_progress_bar=False,
                enable_model_summary=False) | kwargs
