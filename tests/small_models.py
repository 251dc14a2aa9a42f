"""A user's own LightningModules and loaders, small enough to train in a blink. Used by the
trainer's tests."""
import getpass
import os
import re
import socket
import zipfile
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

QUIET = dict(accelerator="cpu", enable_progress_bar=False, enable_model_summary=False)


def patterns(n: int = 64, seed: int = 1) -> TensorDataset:
    "Noisy patterns of four classes."
    means = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(4, (n,), generator=g)
    return TensorDataset(means[y] + torch.randn(n, 8, generator=g), y)


def loaders(n: int = 64, batch_size: int = 16, **kwargs) -> tuple[DataLoader, DataLoader]:
    return DataLoader(patterns(n), batch_size, shuffle=True,
                      **kwargs), DataLoader(patterns(32, 2), 16, **kwargs)


class Plain(pl.LightningModule):
    "As in the overview: logs train/loss only, no validation step, no attribute lr."

    def __init__(self, dropout: float = 0.2):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(),
                                 nn.Dropout(dropout), nn.Linear(16, 4))

    def forward(self, x): return self.net(x)

    def loss(self, batch): return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self): return torch.optim.Adam(self.parameters(), lr=0.01)


class Full(Plain):
    "Logs everything in every stage."

    def shared(self, batch, stage):
        x, y = batch
        logits = self(x)
        loss = nn.functional.cross_entropy(logits, y)
        self.log(f"{stage}/loss", loss, on_step=False, on_epoch=True)
        self.log(f"{stage}/accuracy", (logits.argmax(1) == y).float().mean(), on_step=False,
                 on_epoch=True)
        return loss

    def training_step(self, batch, batch_idx): return self.shared(batch, "train")
    def validation_step(self, batch, batch_idx): self.shared(batch, "val")
    def test_step(self, batch, batch_idx): self.shared(batch, "test")
    def predict_step(self, batch, batch_idx): return self(batch[0]).argmax(1)


class WithRate(Full):
    "Keeps its rate in hparams, as most do."

    def __init__(self, lr=0.01, decay: bool = False):
        super().__init__()
        self.save_hyperparameters()

    def configure_optimizers(self):
        return torch.optim.Adam([dict(params=self.net[0].parameters(), lr=self.hparams.lr / 10),
                                 dict(params=[*self.net[1:].parameters()], lr=self.hparams.lr)])


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def tells_nothing_of_the_machine(path, *folders) -> None:
    "Assert that neither the user, nor the host, nor a folder is named in a checkpoint."
    with zipfile.ZipFile(path) as file:
        # What is text stands in the pickle; among the weights a short name would stand by chance.
        text = b"\n".join(file.read(o) for o in file.namelist()
                          if "/data/" not in o) + "\n".join(file.namelist()).encode()
    for secret in (str(Path.home()), os.getcwd(), *map(str, folders)):
        assert len(secret) < 4 or secret.encode() not in text, secret
    # Letters around a name make another word of it, such as the name of a module.
    for name in (socket.gethostname(), getpass.getuser()):
        assert not re.search(rb"(?<![\w.])%s(?![\w.])" % re.escape(name).encode(), text), name
