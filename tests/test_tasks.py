"""What every task promises: seeds and switches are put back, coordinates stay exact, averages warm up, late parameters learn."""
import copy
import inspect
import os
import random

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

from autotimm import AutoTrainer, BackboneConfig, FeatureBackboneConfig, ImageClassifier, InstanceSegmentor, ObjectDetector, SemanticSegmentor, YOLOXDetector

QUIET = dict(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
PLAIN, MAPS = BackboneConfig("test_resnet", pretrained=False), FeatureBackboneConfig("test_resnet", pretrained=False)
KINDS = ("classifier", "multilabel", "segmentor", "fcos", "yolox", "darknet", "masks")


def build(kind: str = "classifier", **kwargs):
    "A small model of each task, at 64 pixels, for three classes."
    kwargs = dict(image_size=64, lr=1e-2, seed=0, scheduler=None) | kwargs
    if kind in ("classifier", "multilabel"):
        return ImageClassifier(PLAIN, 3, kind == "multilabel", **kwargs)
    if kind == "segmentor": return SemanticSegmentor(MAPS, 3, "fcn", **kwargs)
    if kind == "darknet": return YOLOXDetector("yolox-nano", 3, **{"ema_decay": None, **kwargs})
    boxes = dict(fpn_channels=16, head_num_convs=1) | kwargs
    if kind == "masks": return InstanceSegmentor(MAPS, 3, masks_per_image=4, **boxes)
    return ObjectDetector(MAPS, 3, kind, **boxes)


def sample(kind: str, seed: int) -> dict:
    "One image, 64 pixels high and wide, with what its task needs; boxes lie between pixels."
    g = torch.Generator().manual_seed(seed)
    image = torch.randn(3, 64, 64, generator=g)
    if kind == "classifier": return image, torch.tensor(seed % 3)
    if kind == "multilabel": return image, (torch.rand(3, generator=g) > 0.5).float()
    if kind == "segmentor": return {"image": image, "mask": torch.randint(0, 3, (64, 64), generator=g)}
    corner = torch.rand(3, 2, generator=g) * 24
    boxes = torch.cat([corner, corner + 12.3 + 20 * torch.rand(3, 2, generator=g)], 1)
    found = {"image": image, "boxes": boxes, "labels": torch.arange(3), "iscrowd": torch.zeros(3, dtype=torch.bool),
             "area": (boxes[:, 2:] - boxes[:, :2]).prod(1), "letterbox": torch.tensor([0.1237, 0.1237, 0.0, 0.0, 517.0, 509.0])}
    if kind != "masks": return found
    masks = torch.zeros(3, 64, 64, dtype=torch.bool)
    for o, (x0, y0, x1, y1) in zip(masks, boxes.round().int().tolist()): o[y0:y1, x0:x1] = True
    original = torch.zeros(3, 517, 509, dtype=torch.bool)
    for o, (x0, y0, x1, y1) in zip(original, (boxes / 0.1237).int().tolist()): o[y0:y1, x0:x1] = True
    return found | {"masks": masks, "orig_masks": original}


def join(items: list) -> object:
    "A batch: tensors, and lists where images differ."
    if not isinstance(items[0], dict) or "mask" in items[0]: return torch.utils.data.default_collate(items)
    return {k: torch.stack([o[k] for o in items]) if k in ("image", "letterbox") else [o[k] for o in items] for k in items[0]}


def loader(kind: str = "classifier", n: int = 8, size: int = 4, **kwargs) -> DataLoader:
    "Batches of made-up samples, always the same."
    return DataLoader([sample(kind, i) for i in range(n)], size, collate_fn=join, **kwargs)


def random_states() -> tuple:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def switches() -> tuple:
    return (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark,
            os.environ.get("CUBLAS_WORKSPACE_CONFIG"))


class Own(ImageClassifier):
    "A user's task, with a layer of its own."
    def __init__(self, num_classes: int = 3, **kwargs):
        super().__init__(PLAIN, num_classes, **kwargs)
        self.more = nn.Linear(4, 4)


# Seeds and switches.

@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_governs_the_weights_and_nothing_else(kind):
    names = lambda: {k: v for k, v in os.environ.items() if k.startswith(("PL_", "PYTHON"))}
    before, flags, environment = random_states(), switches(), names()
    first = build(kind, seed=3)
    assert random_states() == before and switches() == flags and names() == environment
    torch.rand(5)
    second, other = build(kind, seed=3), build(kind, seed=4)
    state = first.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in second.state_dict().items())
    assert any(not torch.equal(v, state[k]) for k, v in other.state_dict().items())
    assert first.seed == first.hparams["seed"] == 3


def test_without_a_seed_models_differ():
    first, second = build(seed=None), build(seed=None)
    assert first.seed is None and not torch.equal(first.head.fc.weight, second.head.fc.weight)


def test_a_seed_reaches_the_layers_of_a_users_subclass():
    before = random_states()
    first, second = Own(seed=1), Own(seed=1)
    assert torch.equal(first.more.weight, second.more.weight) and random_states() == before
    with pytest.raises(ValueError, match="num_classes"): Own(num_classes=0, seed=1)
    with pytest.raises(ValueError, match="optimizer|Optimizer|unfreeze_after"): build(seed=1, unfreeze_after=-1)
    with pytest.raises(ValueError, match="seed must be an int"): build(seed=-1)
    assert random_states() == before
    assert "num_classes" in inspect.signature(Own).parameters


def test_a_seed_stands_in_the_checkpoint(tmp_path):
    trainer = pl.Trainer(max_epochs=1, **QUIET)
    trainer.fit(build(seed=5), loader())
    trainer.save_checkpoint(tmp_path / "m.ckpt")
    assert ImageClassifier.load_from_checkpoint(tmp_path / "m.ckpt").seed == 5
    held = torch.load(tmp_path / "m.ckpt", weights_only=True)
    del held["hyper_parameters"]["seed"]    # as one that was written before has none
    torch.save(held, tmp_path / "old.ckpt")
    assert ImageClassifier.load_from_checkpoint(tmp_path / "old.ckpt").seed is None


class Look(pl.Callback):
    "What the switches are in each stage."
    def __init__(self): self.seen: dict[str, tuple] = {}
    def on_train_batch_start(self, *args): self.seen["fit"] = switches()
    def on_validation_batch_start(self, *args): self.seen["validate"] = switches()
    def on_test_batch_start(self, *args): self.seen["test"] = switches()
    def on_predict_batch_start(self, *args): self.seen["predict"] = switches()


def test_deterministic_holds_while_a_model_is_at_work():
    before, held, look = switches(), (True, True, False, ":4096:8"), Look()
    model, trainer = build(deterministic=True), pl.Trainer(max_epochs=1, callbacks=[look], **QUIET)
    assert switches() == before
    for run in (trainer.fit, trainer.validate, trainer.test, trainer.predict):
        run(model, loader())
        assert switches() == before, run.__name__
    assert look.seen == dict.fromkeys(("fit", "validate", "test", "predict"), held)
    seen = []
    model.head.register_forward_hook(lambda *args: seen.append(switches()))
    model.predict(np.zeros((64, 64, 3), dtype=np.uint8))
    model.predict(torch.zeros(1, 3, 64, 64))
    assert seen == [held, held] and switches() == before
    look.seen.clear()
    trainer.fit_loop.max_epochs = 2
    trainer.fit(build(), loader())          # another model of the same trainer did not ask for it
    assert look.seen["fit"] == before


def test_deterministic_is_put_back_after_an_exception():
    class Stop(pl.Callback):
        def on_train_batch_start(self, *args): raise ZeroDivisionError
    before = switches()
    with pytest.raises(ZeroDivisionError): pl.Trainer(max_epochs=1, callbacks=[Stop()], **QUIET).fit(build(deterministic=True), loader())
    assert switches() == before


# The moving average.

def dots(seed: int, n: int = 64) -> list:
    "Bright, dark and striped images: easy to tell apart."
    g, found = torch.Generator().manual_seed(seed), []
    for i in range(n):
        image = 0.3 * torch.randn(3, 32, 32, generator=g)
        if i % 3 == 0: image += 1
        elif i % 3 == 1: image -= 1
        else: image[:, ::2] += 2
        found.append((image, torch.tensor(i % 3)))
    return found


def accuracy(decay: float | None) -> float:
    "Of the weights that a run of 64 steps validates."
    model = build(image_size=32, ema_decay=decay, lr=3e-3, optimizer="sgd", optimizer_kwargs=dict(momentum=0.9))
    trainer = pl.Trainer(max_epochs=8, num_sanity_val_steps=0, **QUIET)
    trainer.fit(model, DataLoader(dots(0), 8), DataLoader(dots(1), 32))
    return float(trainer.callback_metrics["val/accuracy"])


def test_the_average_is_of_use_after_a_few_steps():
    assert accuracy(None) > 0.95 and accuracy(0.999) > 0.95


def test_the_average_follows_its_formula():
    class Follow(pl.Callback):
        def __init__(self): self.average, self.t = None, 0
        def on_train_batch_end(self, trainer, pl_module, *args):
            now = {k: v.double() for k, v in pl_module.state_dict().items()}
            d = min(0.8, (1 + self.t) / (10 + self.t)) if self.t else 0.0
            self.average = now if not self.t else {k: d * v + (1 - d) * now[k] if "num_batches" not in k else now[k] for k, v in self.average.items()}
            self.t += 1
    model, follow = build(ema_decay=0.8), Follow()
    pl.Trainer(max_epochs=4, callbacks=[follow], **QUIET).fit(model, loader())
    for k, v in model.state_dict().items(): torch.testing.assert_close(v.double(), follow.average[k], rtol=1e-5, atol=1e-6, msg=k)


@pytest.mark.parametrize("kind", ["classifier", "darknet"])
def test_an_average_goes_on_after_a_resume_from_lightnings_own(tmp_path, kind):
    "A checkpoint that was written with Lightning's callback, as before, loads with its average and its count."
    theirs = pl.callbacks.EMAWeightAveraging(decay=0.9) if kind == "classifier" else pl.callbacks.WeightAveraging()
    trainer = pl.Trainer(max_epochs=1, callbacks=[theirs], **QUIET)
    trainer.fit(build(kind), loader(kind))
    trainer.save_checkpoint(tmp_path / "old.ckpt")
    held, seen = torch.load(tmp_path / "old.ckpt", weights_only=True), {}
    class Look(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            ours = next(o for o in trainer.callbacks if isinstance(o, pl.callbacks.WeightAveraging))
            kept = {"state_dict": pl_module.state_dict()}
            ours.on_save_checkpoint(trainer, pl_module, kept)
            seen.update(copy.deepcopy(kept), state=ours.state_dict())
    pl.Trainer(max_epochs=2, callbacks=[Look()], **QUIET).fit(build(kind, ema_decay=0.9), loader(kind), ckpt_path=tmp_path / "old.ckpt", weights_only=True)
    for part in ("state_dict", "current_model_state"):
        assert all(torch.equal(v, held[part][k]) for k, v in seen[part].items()), part
    assert int(seen["averaging_state"]["n_averaged"]) == 2 and seen["state"] == {"latest_update_step": 2}


# Half precision: targets are those of float32.

class Keep(pl.Callback):
    "The coordinates of the batches of each stage."
    def __init__(self): self.found: dict[str, list] = {}
    def keep(self, stage: str, batch) -> None:
        if isinstance(batch, dict): self.found.setdefault(stage, []).append({k: batch[k] for k in ("boxes", "area", "letterbox") if k in batch})
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx): self.keep("fit", batch)
    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0): self.keep("validate", batch)
    def on_test_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0): self.keep("test", batch)
    def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0): self.keep("predict", batch)


def targets_at(kind: str, precision: str, trainer_of=pl.Trainer) -> dict:
    "Coordinates of the batches, what places have to predict, and the objects that metrics see."
    model, keep = build(kind), Keep()
    found: dict[str, list] = {}
    data = [sample(kind, i) for i in range(4)]
    if kind == "segmentor": data = [o | {"letterbox": torch.tensor([0.1237, 0.1237, 0.0, 0.0, 517.0, 509.0])} for o in data]
    batches = lambda: DataLoader(data, 2, collate_fn=join if kind != "segmentor" else None)
    if kind != "segmentor":
        assign, objects = model.predictor.assign, model.objects
        def assigned(*args):
            out = assign(*args)
            # SimOTA looks at predictions, FCOS at points and boxes alone.
            found.setdefault("assigned", []).append(args[1] if kind in ("yolox", "darknet") else [out.boxes_xyxy, out.centerness, out.labels])
            return out
        model.predictor.assign = assigned
        model.objects = lambda *args: found.setdefault("objects", []).append(o := objects(*args)) or o
    trainer = trainer_of(max_epochs=1, precision=precision, callbacks=[keep], num_sanity_val_steps=0, **QUIET)
    trainer.fit(model, batches(), batches())
    trainer.test(model, batches(), verbose=False)
    trainer.predict(model, batches())
    assert "convert_input" not in vars(trainer.precision_plugin)
    return found | keep.found


@pytest.mark.parametrize("kind", ["fcos", "yolox", "darknet", "masks", "segmentor"])
def test_coordinates_stay_exact_in_half_precision(kind):
    torch.testing.assert_close(targets_at(kind, "bf16-true"), targets_at(kind, "32-true"), rtol=0, atol=1e-6)


def test_coordinates_stay_exact_under_the_other_trainer():
    torch.testing.assert_close(targets_at("fcos", "bf16-true", AutoTrainer), targets_at("fcos", "32-true"), rtol=0, atol=1e-6)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("kind", ["classifier", "multilabel"])
def test_mixed_targets_stay_exact_in_half_precision(kind, precision):
    def targets(precision: str) -> list:
        model, seen = build(kind, mixup_alpha=0.4, cutmix_alpha=1.0), []
        model.loss_fn.register_forward_pre_hook(lambda module, args: seen.append(args[1].clone()))
        pl.seed_everything(0, verbose=False)
        pl.Trainer(max_epochs=1, precision=precision, **QUIET).fit(model, loader(kind))
        return seen
    found, exact = targets(precision), targets("32-true")
    assert {o.dtype for o in found} == {torch.float32} and any(((o > 0) & (o < 1)).any() for o in exact)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-6)
