"""What every task promises: seeds and switches are put back, coordinates stay exact, averages warm
up, late parameters learn."""
import copy
import inspect
import os
import random
import traceback
import warnings

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from autotimm import (AutoTrainer, BackboneConfig, FeatureBackboneConfig, ImageClassifier,
                      InstanceSegmentor, ObjectDetector, SemanticSegmentor, YOLOXDetector)
from autotimm.metrics import MetricManager

QUIET = dict(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
             enable_checkpointing=False)
PLAIN, MAPS = (BackboneConfig("test_resnet", pretrained=False),
               FeatureBackboneConfig("test_resnet", pretrained=False))
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
    if kind == "segmentor":
        return {"image": image, "mask": torch.randint(0, 3, (64, 64), generator=g)}
    corner = torch.rand(3, 2, generator=g) * 24
    boxes = torch.cat([corner, corner + 12.3 + 20 * torch.rand(3, 2, generator=g)], 1)
    found = {"image": image, "boxes": boxes, "labels": torch.arange(3),
             "iscrowd": torch.zeros(3, dtype=torch.bool),
             "area": (boxes[:, 2:] - boxes[:, :2]).prod(1),
             "letterbox": torch.tensor([0.1237, 0.1237, 0.0, 0.0, 517.0, 509.0])}
    if kind != "masks": return found
    masks = torch.zeros(3, 64, 64, dtype=torch.bool)
    for o, (x0, y0, x1, y1) in zip(masks, boxes.round().int().tolist()): o[y0:y1, x0:x1] = True
    original = torch.zeros(3, 517, 509, dtype=torch.bool)
    for o, (x0, y0, x1, y1) in zip(original, (boxes / 0.1237).int().tolist()):
        o[y0:y1, x0:x1] = True
    return found | {"masks": masks, "orig_masks": original}


def join(items: list) -> object:
    "A batch: tensors, and lists where images differ."
    if not isinstance(items[0], dict) or "mask" in items[0]:
        return torch.utils.data.default_collate(items)
    return {k: torch.stack([o[k] for o in items]) if k in ("image", "letterbox")
            else [o[k] for o in items] for k in items[0]}


def loader(kind: str = "classifier", n: int = 8, size: int = 4, **kwargs) -> DataLoader:
    "Batches of made-up samples, always the same."
    return DataLoader([sample(kind, i) for i in range(n)], size, collate_fn=join, **kwargs)


def random_states() -> tuple:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def switches() -> tuple:
    return (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic,
            torch.backends.cudnn.benchmark,
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
    with pytest.raises(ValueError, match="optimizer|Optimizer|unfreeze_after"):
        build(seed=1, unfreeze_after=-1)
    with pytest.raises(ValueError, match="seed must be an int"): build(seed=-1)
    assert random_states() == before
    assert {"num_classes", "seed", "lr", "metrics"} <= set(inspect.signature(Own).parameters)
    assert ("seed" in inspect.signature(ImageClassifier).parameters
            and "seed" in inspect.signature(YOLOXDetector).parameters)


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
    with pytest.raises(ZeroDivisionError):
        pl.Trainer(max_epochs=1, callbacks=[Stop()], **QUIET).fit(build(deterministic=True),
                                                                  loader())
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
    model = build(image_size=32, ema_decay=decay, lr=3e-3, optimizer="sgd",
                  optimizer_kwargs=dict(momentum=0.9))
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
            self.average = (now if not self.t
                            else {k: d * v + (1 - d) * now[k] if "num_batches" not in k
                                  else now[k] for k, v in self.average.items()})
            self.t += 1
    model, follow = build(ema_decay=0.8), Follow()
    pl.Trainer(max_epochs=4, callbacks=[follow], **QUIET).fit(model, loader())
    for k, v in model.state_dict().items():
        torch.testing.assert_close(v.double(), follow.average[k], rtol=1e-5, atol=1e-6, msg=k)


@pytest.mark.parametrize("kind", ["classifier", "darknet"])
def test_an_average_goes_on_after_a_resume_from_lightnings_own(tmp_path, kind):
    """A checkpoint that was written with Lightning's callback, as before, loads with its average
    and its count."""
    theirs = (pl.callbacks.EMAWeightAveraging(decay=0.9) if kind == "classifier"
              else pl.callbacks.WeightAveraging())
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
    pl.Trainer(max_epochs=2, callbacks=[Look()], **QUIET).fit(build(kind, ema_decay=0.9),
                                                              loader(kind), ckpt_path=tmp_path
                                                              / "old.ckpt", weights_only=True)
    for part in ("state_dict", "current_model_state"):
        assert all(torch.equal(v, held[part][k]) for k, v in seen[part].items()), part
    assert (int(seen["averaging_state"]["n_averaged"]) == 2
            and seen["state"] == {"latest_update_step": 2})


# Half precision: targets are those of float32.

class Keep(pl.Callback):
    "The coordinates of the batches of each stage."
    def __init__(self): self.found: dict[str, list] = {}
    def keep(self, stage: str, batch) -> None:
        if isinstance(batch, dict):
            self.found.setdefault(stage, []).append(
                {k: batch[k] for k in ("boxes", "area", "letterbox") if k in batch})
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx): self.keep("fit", batch)
    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.keep("validate", batch)
    def on_test_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.keep("test", batch)
    def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.keep("predict", batch)


def targets_at(kind: str, precision: str, trainer_of=pl.Trainer) -> dict:
    "Coordinates of the batches, what places have to predict, and the objects that metrics see."
    model, keep = build(kind), Keep()
    found: dict[str, list] = {}
    data = [sample(kind, i) for i in range(4)]
    if kind == "segmentor":
        data = [o | {"letterbox": torch.tensor([0.1237, 0.1237, 0.0, 0.0, 517.0, 509.0])}
                for o in data]
    batches = lambda: DataLoader(data, 2, collate_fn=join if kind != "segmentor" else None)
    if kind != "segmentor":
        assign, objects = model.predictor.assign, model.ground_truth
        def assigned(*args):
            out = assign(*args)
            # SimOTA looks at predictions, FCOS at points and boxes alone.
            found.setdefault("assigned", []).append(args[1] if kind in ("yolox", "darknet")
                                                    else [out.boxes_xyxy, out.centerness,
                                                          out.labels])
            return out
        model.predictor.assign = assigned
        model.ground_truth = lambda *args: found.setdefault("objects",
                                                       []).append(o := objects(*args)) or o
    trainer = trainer_of(max_epochs=1, precision=precision, callbacks=[keep],
                         num_sanity_val_steps=0, **QUIET)
    trainer.fit(model, batches(), batches())
    trainer.test(model, batches(), verbose=False)
    trainer.predict(model, batches())
    assert "convert_input" not in vars(trainer.precision_plugin)
    return found | keep.found


@pytest.mark.parametrize("kind", ["fcos", "yolox", "darknet", "masks", "segmentor"])
def test_coordinates_stay_exact_in_half_precision(kind):
    torch.testing.assert_close(targets_at(kind, "bf16-true"), targets_at(kind, "32-true"),
                               rtol=0, atol=1e-6)


def test_coordinates_stay_exact_under_the_other_trainer():
    torch.testing.assert_close(targets_at("fcos", "bf16-true", AutoTrainer),
                               targets_at("fcos", "32-true"), rtol=0, atol=1e-6)


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
    assert {o.dtype for o in found} == {torch.float32} and any(((o > 0) & (o < 1)).any()
                                                               for o in exact)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-6)


# A backbone that is thawed in the middle of a fit.

class Thaw(pl.Callback):
    "Calls `unfreeze_backbone()` before a step."
    def __init__(self, step: int): self.step = step
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step: pl_module.unfreeze_backbone()


class Rates(pl.Callback):
    "The learning rates of all groups at each step."
    def __init__(self): self.seen: list = []
    def on_train_batch_end(self, trainer, *args):
        self.seen.append([g["lr"] for g in trainer.optimizers[0].param_groups])


def state(module: nn.Module) -> dict: return {k: v.clone() for k, v in module.state_dict().items()}


@pytest.mark.parametrize("kind", ["classifier", "segmentor", "fcos", "darknet", "masks"])
def test_a_backbone_thawed_by_a_callback_learns(kind):
    model = build(kind, freeze_backbone=True)
    before = state(model.backbone)
    seen = []
    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            seen.append(any(not torch.equal(v, before[k])
                            for k, v in pl_module.backbone.state_dict().items()))
    trainer = pl.Trainer(max_epochs=2, callbacks=[Thaw(2), Look()], **QUIET)
    trainer.fit(model, loader(kind))
    assert seen == [False, False, True, True] and not model.frozen
    ids = [id(p) for g in trainer.optimizers[0].param_groups for p in g["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_what_is_thawed_has_the_rates_of_its_layers():
    """The same rates and decays as in a fit that trained the backbone from the start, from the step
    on at which it was thawed."""
    def rates_of(*callbacks, **kwargs) -> list[dict]:
        model, seen = build(layer_decay=0.7, weight_decay=0.02, scheduler="cosine",
                            scheduler_kwargs=dict(warmup_steps=2), **kwargs), []
        names = {id(p): n for n, p in model.named_parameters()}
        class Look(pl.Callback):
            def on_train_batch_end(self, trainer, *args):
                seen.append({names[id(p)]: (g["lr"], g["weight_decay"])
                             for g in trainer.optimizers[0].param_groups for p in g["params"]})
        pl.Trainer(max_epochs=4, callbacks=[*callbacks, Look()], **QUIET).fit(model, loader())
        return seen
    late, whole = rates_of(Thaw(3), freeze_backbone=True), rates_of()
    assert all(set(o) < set(w) for o, w in zip(late[:3], whole))
    assert late[3:] == [{k: pytest.approx(v, rel=1e-9, abs=1e-15) for k, v in o.items()}
                        for o in whole[3:]]


@pytest.mark.parametrize("when", ["before", "callback"])
@pytest.mark.parametrize("scheduler", ["cosine", "onecycle", "tanh", None])
def test_a_run_with_a_thawed_backbone_goes_on(tmp_path, when, scheduler):
    "From a checkpoint after the thawing: the weights are those of the run that nothing broke."
    def fit(epochs: int, path=None, save=None):
        model = build(freeze_backbone=True, scheduler=scheduler, optimizer="adamw", ema_decay=0.5)
        if when == "before" and path is None: model.unfreeze_backbone()
        class Save(pl.Callback):
            def on_train_epoch_end(self, trainer, pl_module):
                if save and trainer.current_epoch == 1: trainer.save_checkpoint(save)
        trainer = pl.Trainer(max_epochs=4, callbacks=[Save(), *([Thaw(3)] if when == "callback"
                                                                else [])], **QUIET)
        trainer.fit(model, loader(), ckpt_path=path, weights_only=True)
        return state(model), trainer
    (whole, _), file = fit(4, save=tmp_path / "m.ckpt"), tmp_path / "m.ckpt"
    again, trainer = fit(4, path=file)
    assert trainer.global_step == 8
    for k, v in again.items(): torch.testing.assert_close(v, whole[k], rtol=0, atol=0, msg=k)
    # A model that is only loaded is as its arguments say
    assert ImageClassifier.load_from_checkpoint(file).frozen


@pytest.mark.parametrize("noted", [True, False], ids=["noted", "written before"])
def test_unfreeze_after_holds_in_an_epoch_that_goes_on(tmp_path, noted):
    """From a checkpoint inside the epoch in which the backbone is thawed, which notes it or was
    written before there was a note."""
    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 3: trainer.save_checkpoint(tmp_path / "m.ckpt")
    model = build(unfreeze_after=1)
    pl.Trainer(max_epochs=2, callbacks=[Save()], **QUIET).fit(model, loader())
    held = torch.load(tmp_path / "m.ckpt", weights_only=True)
    if not noted: torch.save({k: v for k, v in held.items() if k != "thawed"}, tmp_path / "m.ckpt")
    model, seen = build(unfreeze_after=1), []
    class Look(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, *args): seen.append(pl_module.frozen)
    pl.Trainer(max_epochs=2, callbacks=[Look()],
               **QUIET).fit(model, loader(), ckpt_path=tmp_path / "m.ckpt", weights_only=True)
    assert seen and not any(seen)


def test_a_backbone_thawed_by_a_callback_learns_on_two_processes():
    class Same(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            mine = torch.cat([p.detach().flatten() for p in pl_module.backbone.parameters()])
            both = trainer.strategy.all_gather(mine)
            assert torch.equal(both[0], both[1]), "the processes have different weights"
    model = build(freeze_backbone=True, freeze_norm=True)
    before = state(model.backbone)
    trainer = pl.Trainer(max_epochs=2, strategy="ddp_fork", callbacks=[Thaw(1), Same()],
                         **QUIET | dict(devices=2))
    trainer.fit(model, loader(size=2))
    assert any(not torch.equal(v, before[k]) for k, v in model.backbone.state_dict().items())


# Labels and devices.

WRONG = {"classifier": lambda b: (b[0], b[1].index_fill(0, torch.tensor([1]), 3)),
         "multilabel": lambda b: (b[0], b[1] - 2),
         "segmentor": lambda b: b | {"mask": b["mask"].clone().fill_(7)}, **dict.fromkeys(
             ("fcos", "yolox", "darknet", "masks"),
             lambda b: b | {"labels": [o + 1 for o in b["labels"]]})}


@pytest.mark.parametrize("kind", KINDS)
def test_a_label_out_of_range_is_found_in_any_batch(kind):
    """Before the batch leaves the CPU, in the second batch as in the first; the ignored pixels of a
    mask are no such."""
    first, second = loader(kind)
    if kind == "segmentor": first["mask"][:, :8] = 255
    model, moved = build(kind), []
    move = model.transfer_batch_to_device
    model.transfer_batch_to_device = lambda *args: moved.append(1) or move(*args)
    run = lambda *batches: pl.Trainer(max_epochs=1, **QUIET).fit(model,
                                                                 DataLoader(list(batches), None))
    run(first, second)
    assert len(moved) == 2
    with pytest.raises(ValueError, match="must lie in|must be from 0 to 1|must hold"):
        run(first, WRONG[kind](second))
    assert len(moved) == 3
    model.predict_step(first)
    # There are no labels to look at
    pl.Trainer(**QUIET).predict(model, DataLoader([WRONG[kind](second)], None))
    class Data(pl.LightningDataModule):
        def train_dataloader(self): return DataLoader([first], None)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="You have overridden")
        pl.Trainer(max_epochs=1, **QUIET).fit(build(kind), Data())


def test_predict_runs_where_the_model_is(monkeypatch):
    """An accelerator that stands idle is named once, and the model moved for an explicit `device`
    alone."""
    model, image, moves = build(), np.zeros((64, 64, 3), dtype=np.uint8), []
    move = model.to
    model.to = lambda *args, **kwargs: moves.append(args) or move(*args, **kwargs)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator",
                        lambda *args: torch.device("cuda"))
    with pytest.warns(UserWarning, match=r"predict\(..., device='cuda'\) for one call"):
        model.predict(image)
    assert not moves
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.predict(image, device="cpu")
    assert not moves and next(model.parameters()).device.type == "cpu"


@pytest.mark.parametrize("device", ["cuda", "mps", "cpu"])
def test_only_cuda_is_not_waited_for(device):
    class Told(torch.Tensor):
        def to(self, *args, **kwargs):
            return told.append((args[0].type, kwargs.get("non_blocking", False))) or self
    told: list = []
    x, rows = torch.zeros(1, 3, 8, 8).as_subclass(Told), torch.zeros(1, 6).as_subclass(Told)
    build()._run(lambda x, rows: [], x, rows, torch.device(device))
    assert told == [(device, device == "cuda"), (device, False)]


# What a GPU would trip over, on the CPU.

class Ops(TorchDispatchMode):
    "Counts what is asked of a device, and by what."
    def __init__(self, *names: str):
        super().__init__(); self.names, self.count, self.where = names, 0, []
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.names:
            stack = [f"{o.filename}:{o.lineno}" for o in traceback.extract_stack()[:-1]]
            # torchmetrics looks at numbers that lie on the CPU, and takes another way on a GPU.
            if not any("torchmetrics" in o for o in stack):
                self.count += 1
                self.where.append((func.overloadpacket.__name__, stack[-4:]))
        return func(*args, **(kwargs or {}))


READS = ("_local_scalar_dense", "item", "is_nonzero", "equal")
SIZES = ("nonzero", "masked_select", "unique2", "_unique2", "unique_consecutive")


def ops_a_step(kind: str, *names: str, **kwargs) -> tuple[int, list]:
    """How many of these a training step asks for: the difference of a run of three steps and one of
    five."""
    counts = []
    for steps in (3, 5):
        model = build(kind, optimizer="sgd", optimizer_kwargs=dict(momentum=0.9), **kwargs)
        with Ops(*names) as seen:
            pl.Trainer(max_steps=steps, max_epochs=-1, **QUIET).fit(model, loader(kind, 24))
        counts.append(seen)
    return (counts[1].count - counts[0].count) // 2, counts[1].where


@pytest.mark.parametrize("kind", KINDS)
def test_no_step_reads_a_number_from_the_device(kind):
    mixing = dict(mixup_alpha=0.4) if kind in ("classifier", "multilabel") else {}
    count, where = ops_a_step(kind, *READS, ema_decay=0.99, **mixing)
    # The labels are looked at on the CPU, before the batch leaves it: least and most of them.
    assert count == 2, where[-count - 4:]


@pytest.mark.parametrize(("task", "target"), [("multiclass", torch.zeros(4, dtype=torch.long)),
                                              ("multilabel", torch.ones(4, 3))])
@pytest.mark.parametrize("stage", ["train", "val"])
def test_metrics_of_a_classifier_that_are_not_on_the_cpu_read_nothing(task, target, stage):
    "On the meta device there are no numbers to read."
    metrics = MetricManager(None, 3, task).to("meta")
    metrics.update(stage, torch.rand(4, 3, device="meta"), target.to("meta"))
    assert all(o.update_called and o.device.type == "meta"
               for o in metrics.stage_metrics(stage).values())


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_step_waits_for_is_known(kind):
    """The number of places with an object decides the size of what follows: once a step, not once
    an image or level."""
    count, where = ops_a_step(kind, *SIZES, ema_decay=0.99)
    assert count == (0 if kind in ("classifier", "multilabel", "segmentor") else 1), where


# Of torch.use_deterministic_algorithms: what raises on a GPU. Bilinear enlargement and RoIAlign
# have another way there.
REFUSED = ("nll_loss2d_forward", "nll_loss2d_backward", "_adaptive_avg_pool2d_backward",
           "_adaptive_avg_pool3d_backward", "avg_pool3d_backward",
           "adaptive_max_pool2d_backward", "fractional_max_pool2d_backward", "max_unpool2d",
           "upsample_bicubic2d_backward", "upsample_linear1d_backward",
           "_upsample_bilinear2d_aa_backward", "reflection_pad2d_backward", "_ctc_loss_backward",
           "put_", "histc", "median", "grid_sampler_2d_backward",
           "bincount", "kthvalue")
CASES = [*((o, {}) for o in KINDS if o != "segmentor"),
         *(("segmentor", dict(head_type=o, loss_type="dice"))
           for o in ("fcn", "deeplabv3plus", "fpn", "upernet")),
         *(("segmentor", dict(head_type="fcn", loss_type=o))
           for o in ("ce", "focal", "combined", "tversky")),
         *(("classifier", dict(loss_fn=o)) for o in ("focal",)),
         *(("multilabel", dict(loss_fn=o)) for o in ("focal", "asymmetric")),
         *(("fcos", dict(cls_loss_fn=c, reg_loss_fn=r))
           for c, r in (("bce_with_logits", "iou"), ("focal", "diou"), ("focal", "ciou")))]


def fit_once(kind: str, **kwargs) -> Ops:
    "The refused operations of a fit of a deterministic model."
    if "head_type" in kwargs:
        model = SemanticSegmentor(MAPS, 3, image_size=64, seed=0, deterministic=True, **kwargs)
    else: model = build(kind, deterministic=True, **kwargs)
    with Ops(*REFUSED) as seen: pl.Trainer(max_epochs=1, **QUIET).fit(model, loader(kind))
    return seen


@pytest.mark.parametrize(("kind", "kwargs"), CASES,
                         ids=lambda o: o if isinstance(o, str) else "-".join(o.values()))
def test_a_deterministic_step_asks_for_nothing_that_a_gpu_refuses(kind, kwargs):
    seen = fit_once(kind, **kwargs)
    assert not seen.count, seen.where[:3]


def test_a_layer_that_cannot_be_deterministic_is_named(monkeypatch):
    model = build(deterministic=True)
    model.more = nn.Sequential(nn.AdaptiveAvgPool2d(3), nn.AdaptiveAvgPool2d(1),
                               nn.ReflectionPad2d(1))
    model.on_fit_start()
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    with pytest.warns(UserWarning,
                      match=r"gradient of more.0 \(AdaptiveAvgPool2d\), more.2 \(ReflectionPad2d\), and"):
        model.on_fit_start()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(deterministic=True).on_fit_start()
