"""What the classifier's notebook cannot hold: every optimiser and schedule, compiling, DDP,
pictures in loggers, no network."""
import os
import socket
import subprocess
import sys
import textwrap
import warnings

import pytest
import pytorch_lightning as pl
import torch
from small_models import tells_nothing_of_the_machine
from torch.utils.data import DataLoader, TensorDataset

from autotimm import (BackboneConfig, ImageClassifier, LoggingConfig, MetricConfig,
                      list_optimizers, list_schedulers)
from autotimm.testing import make_shapes

QUIET = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False,
             enable_model_summary=False, accelerator="cpu")
SMALL = BackboneConfig("test_resnet", pretrained=False)


def shapes(n: int = 16, seed: int = 0) -> DataLoader:
    scenes = make_shapes(n, image_size=32, max_objects=1, seed=seed)
    x = torch.stack([torch.from_numpy(o.image).permute(2, 0, 1).float() / 127.5 - 1
                     for o in scenes])
    return DataLoader(TensorDataset(x, torch.tensor([int(o.label) for o in scenes])), batch_size=8)


def classifier(**kwargs) -> ImageClassifier:
    return ImageClassifier(SMALL, 3, image_size=32, seed=0, **kwargs)


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


@pytest.mark.parametrize("name", [n for names in list_optimizers().values() for n in names])
def test_every_listed_optimiser_trains(name):
    model = classifier(optimizer=name, scheduler=None)
    before = weights(model)
    pl.Trainer(max_epochs=1, **QUIET).fit(model, shapes())
    after = weights(model)
    assert torch.isfinite(after).all() and not torch.equal(before, after)


@pytest.mark.parametrize("name", [n for names in list_schedulers().values() for n in names])
@pytest.mark.filterwarnings("ignore")
def test_every_listed_schedule_trains(name):
    kwargs = {"monitor": "train/loss"} if "plateau" in name else {}
    model = classifier(scheduler=name, scheduler_kwargs=kwargs)
    trainer = pl.Trainer(max_epochs=2, **QUIET)
    trainer.fit(model, shapes())
    assert trainer.global_step == 4 and all(g["lr"] >= 0
                                            for g in trainer.optimizers[0].param_groups)


def test_plateau_without_its_metric_is_a_clear_error():
    with pytest.raises(Exception, match="val/loss"):
        pl.Trainer(max_epochs=1, **QUIET).fit(classifier(scheduler="plateau"), shapes())


def test_unknown_names_are_errors_with_near_matches():
    with pytest.raises(ValueError, match="Did you mean 'adamw'"):
        pl.Trainer(max_epochs=1, **QUIET).fit(classifier(optimizer="adamww"), shapes())
    with pytest.raises(ValueError, match="Did you mean 'cosine"):
        pl.Trainer(max_epochs=1, **QUIET).fit(classifier(scheduler="cosin"), shapes())
    with pytest.raises(ValueError, match="Accuracy"):
        classifier(metrics=[MetricConfig("a", "torchmetrics", "Acuracy", {}, ["val"])])


def test_layer_decay_gives_lower_layers_lower_rates():
    model = classifier(layer_decay=0.5, scheduler=None)
    trainer = pl.Trainer(max_epochs=1, limit_train_batches=1, **QUIET)
    trainer.fit(model, shapes())
    rate = {id(p): g["lr"] for g in trainer.optimizers[0].param_groups for p in g["params"]}
    first, last = next(model.backbone.parameters()), model.head.fc.weight
    assert rate[id(last)] == pytest.approx(1e-3) and rate[id(first)] < 0.5 * rate[id(last)]


def test_a_compiled_model_saves_plain_names(tmp_path):
    model = classifier(compile_model=True, compile_kwargs={"backend": "aot_eager"})
    trainer = pl.Trainer(max_epochs=1, **QUIET)
    trainer.fit(model, shapes())
    assert model.backbone._compiled_call_impl is not None
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    state = torch.load(tmp_path / "c.ckpt", weights_only=True)["state_dict"]
    assert not any("_orig_mod" in k for k in state)
    x = torch.randn(2, 3, 32, 32)
    again = ImageClassifier.load_from_checkpoint(tmp_path / "c.ckpt", compile_model=False)
    with torch.no_grad():
        torch.testing.assert_close(again(x), model.eval()(x), rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_gives_the_same_gradients():
    grads = []
    for grad_checkpointing in (False, True):
        model = ImageClassifier(BackboneConfig("test_vit", pretrained=False), 3, image_size=32,
                                seed=0,
                                grad_checkpointing=grad_checkpointing)
        x, y = next(iter(shapes()))
        torch.nn.functional.cross_entropy(model(x), y).backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()
                                if p.grad is not None]))
    torch.testing.assert_close(*grads)


def test_a_loaded_model_goes_on_in_training_mode(tmp_path):
    """`load_from_checkpoint` gives eval mode; fitting it trains, BatchNorm included, but for what
    is frozen."""
    trainer = pl.Trainer(max_epochs=1, **QUIET)
    trainer.fit(classifier(), shapes())
    trainer.save_checkpoint(tmp_path / "a.ckpt")

    def modes(**kwargs) -> tuple[bool, bool, bool]:
        model = ImageClassifier.load_from_checkpoint(tmp_path / "a.ckpt", **kwargs)
        assert not model.training
        seen = []
        class Look(pl.Callback):
            def on_train_batch_start(self, trainer, module, batch, batch_idx):
                norms = [o.training for o in module.backbone.modules()
                         if isinstance(o, torch.nn.BatchNorm2d)]
                assert len(set(norms)) == 1
                seen.append((module.training, module.backbone.training, norms[0]))
        pl.Trainer(max_epochs=2, callbacks=[Look()], **QUIET).fit(model, shapes(), shapes())
        assert len(set(seen)) == 1
        return seen[0]
    assert modes() == (True, True, True)
    assert modes(freeze_norm=True) == (True, True, False)
    assert modes(freeze_backbone=True) == (True, False, False)


def test_loading_touches_no_network(tmp_path, monkeypatch):
    model = classifier()
    trainer = pl.Trainer(max_epochs=1, limit_train_batches=1, **QUIET)
    trainer.fit(model, shapes())
    trainer.save_checkpoint(tmp_path / "m.ckpt")

    def refuse(*args, **kwargs): raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    again = ImageClassifier.load_from_checkpoint(tmp_path / "m.ckpt")
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad(): assert torch.equal(again(x), model.eval()(x))


def test_a_checkpoint_tells_nothing_of_the_machine(tmp_path):
    model = classifier(class_names=["a", "b", "c"])
    trainer = pl.Trainer(max_epochs=1, limit_train_batches=1, **QUIET)
    trainer.fit(model, shapes())
    trainer.save_checkpoint(tmp_path / "m.ckpt")
    tells_nothing_of_the_machine(tmp_path / "m.ckpt", tmp_path)


def test_resuming_with_another_number_of_classes_is_an_error(tmp_path):
    trainer = pl.Trainer(max_epochs=1, limit_train_batches=1, **QUIET)
    trainer.fit(classifier(), shapes())
    trainer.save_checkpoint(tmp_path / "m.ckpt")
    other = ImageClassifier(SMALL, 4, image_size=32)
    with pytest.raises(ValueError, match="3 classes where the model has 4"):
        pl.Trainer(max_epochs=2, **QUIET).fit(other, shapes(), ckpt_path=tmp_path / "m.ckpt",
                                              weights_only=True)


def test_the_average_is_what_is_saved(tmp_path):
    model = classifier(ema_decay=0.5, scheduler=None)
    trainer = pl.Trainer(max_epochs=2, logger=False, enable_progress_bar=False,
                         enable_model_summary=False, accelerator="cpu",
                         default_root_dir=tmp_path)
    trainer.fit(model, shapes())
    file, = tmp_path.rglob("*.ckpt")
    averaged = ImageClassifier.load_from_checkpoint(file)
    torch.testing.assert_close(weights(averaged), weights(model))
    held = torch.load(file, weights_only=True)
    assert not torch.equal(held["state_dict"]["head.fc.weight"],
                           held["current_model_state"]["head.fc.weight"])


def test_pictures_reach_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    config = LoggingConfig(log_learning_rate=True, log_gradient_norm=True, log_weight_norm=True,
                           log_confusion_matrix=True,
                           log_predictions=True, predictions_per_epoch=4)
    trainer = pl.Trainer(max_epochs=1, logger=pl.loggers.TensorBoardLogger(tmp_path),
                         enable_checkpointing=False,
                         enable_progress_bar=False, enable_model_summary=False,
                         accelerator="cpu", log_every_n_steps=1)
    trainer.fit(classifier(logging_config=config), shapes(), shapes(seed=1))
    events = EventAccumulator(trainer.logger.log_dir)
    events.Reload()
    assert {"val/confusion_matrix", "val/predictions"} <= set(events.Tags()["images"])
    assert {"train/lr", "train/grad_norm", "train/weight_norm",
            "val/accuracy"} <= set(events.Tags()["scalars"])


def test_metrics_equal_torchmetrics_on_the_whole_set():
    import torchmetrics
    names = dict(accuracy="Accuracy", f1="F1Score", auroc="AUROC", ece="CalibrationError")
    model = classifier(metrics=[MetricConfig(k, "torchmetrics", v, {}, ["val"])
                                for k, v in names.items()])
    loader = shapes(24, seed=3)
    found = pl.Trainer(**QUIET).validate(model, loader, verbose=False)[0]
    x, y = loader.dataset.tensors
    with torch.no_grad(): probabilities = model.eval()(x).softmax(-1)
    for key, name in names.items():
        expected = getattr(torchmetrics, name)(task="multiclass", num_classes=3)(probabilities, y)
        assert found[f"val/{key}"] == pytest.approx(float(expected), abs=1e-6)
    assert (found["val/loss"] == pytest.approx(
        float(torch.nn.functional.cross_entropy(probabilities.log(), y)), abs=1e-5))


@pytest.mark.parametrize("classes, images", [(1, 4), (2, 1), (2, 2)])
def test_few_classes_and_few_images_train(classes, images):
    x, y = torch.randn(images, 3, 32, 32), torch.arange(images) % classes
    loader = DataLoader(TensorDataset(x, y), batch_size=8)
    model = ImageClassifier(BackboneConfig("test_vit", pretrained=False), classes, image_size=32)
    trainer = pl.Trainer(max_epochs=1, **QUIET)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(model, loader, loader)
    assert torch.isfinite(trainer.callback_metrics["val/loss"])


def test_thawing_keeps_two_processes_equal(tmp_path):
    """Under DDP the gradients of a thawed backbone are synchronised: both processes end with the
    same weights."""
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent("""
        import sys, torch, pytorch_lightning as pl
        from torch.utils.data import DataLoader, TensorDataset
        from autotimm import BackboneConfig, ImageClassifier
        g = torch.Generator().manual_seed(0)
        data = TensorDataset(torch.randn(16, 3, 32, 32, generator=g), torch.arange(16) % 3)
        model = ImageClassifier(BackboneConfig("test_vit", pretrained=False), 3, image_size=32, seed=0, unfreeze_after=1, lr=1e-2)
        start = model.backbone.to_spec() and torch.cat([p.detach().flatten() for p in model.backbone.parameters()])
        trainer = pl.Trainer(max_epochs=2, accelerator="cpu", devices=2, strategy="ddp", logger=False,
                             enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
        trainer.fit(model, DataLoader(data, batch_size=4))
        mine = torch.cat([p.detach().flatten() for p in model.backbone.parameters()])
        all_of_them = trainer.strategy.all_gather(mine)
        if trainer.is_global_zero:
            print("equal", torch.equal(all_of_them[0], all_of_them[1]), "moved", not torch.equal(mine, start))
    """))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True,
                          timeout=240, cwd=tmp_path,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert "equal True moved True" in done.stdout
