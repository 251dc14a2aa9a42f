"""Numbers on several processes are the numbers on one: losses, gradients, training, metrics,
figures."""
import os
import socket
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils.data import DataLoader
from torchmetrics import Metric

from autotimm import (FeatureBackboneConfig, ImageClassifier, InstanceSegmentor, LoggingConfig,
                      MetricConfig, ObjectDetector, SemanticSegmentor)
from autotimm.losses import (AsymmetricLoss, BCEWithLogitsLoss, CenternessLoss,
                             CombinedSegmentationLoss, CrossEntropyLoss, DiceLoss, FCOSLoss,
                             FocalLoss, FocalLossPixelwise, GIoULoss, MaskLoss, TverskyLoss,
                             YOLOXLoss)
from autotimm.metrics import default_metrics
from autotimm.tasks import base
from autotimm.testing import make_shapes

QUIET: dict[str, Any] = dict(accelerator="cpu", logger=False, enable_checkpointing=False,
                             enable_progress_bar=False, enable_model_summary=False,
                             num_sanity_val_steps=0, use_distributed_sampler=False)
TASKS = ("single", "multi", "segmentation", "fcos", "yolox", "masks")
COUNTS = (5, 1)     # images: uneven batches, and processes without an image
ALONE = ("single", "fcos")
PICTURES = LoggingConfig(False, False, log_confusion_matrix=True, log_predictions=True,
                         predictions_per_epoch=3)


def metric(name: str, metric_class: str, **params: Any) -> MetricConfig:
    return MetricConfig(name, "torchmetrics", metric_class, params, ["val", "test"])


def build(task: str, **kwargs: Any) -> pl.LightningModule:
    """A small model of a task, the same on every process; its metrics keep sums, lists of tensors,
    and lists of unequal length."""
    kwargs = dict(image_size=64, seed=0, optimizer="sgd", scheduler=None, lr=0.05) | kwargs
    backbone: Any = FeatureBackboneConfig("test_resnet", pretrained=False)
    if task in ("single", "multi"):
        multi = task == "multi"
        own = {} if multi else dict(class_weights=[1.0, 5.0, 0.2], logging_config=PICTURES)
        more = [metric("auroc", "AUROC"), metric("error", "MultilabelRankingLoss" if multi
                                                 else "CalibrationError")]
        return ImageClassifier(backbone, 3, multi,
                               metrics=default_metrics("multilabel" if multi else "multiclass")
                               + more, **own, **kwargs)
    if task == "segmentation":
        return SemanticSegmentor(backbone, 4, class_weights=[1.0, 5.0, 0.2, 3.0],
                                 logging_config=PICTURES, **kwargs)
    kwargs |= dict(fpn_channels=16, head_num_convs=1, score_thresh=0.0, lr=0.01)
    if task == "masks": return InstanceSegmentor(backbone, 3, **kwargs)
    own = (dict(metrics=default_metrics("detection") + [metric("iou", "IntersectionOverUnion")])
           if task == "fcos" else {})
    return ObjectDetector(backbone, 3, task, strides=(8, 16, 32), **own, **kwargs)


def samples(task: str, n: int) -> list[dict[str, Any]]:
    """Images of shapes and their targets; the second has no object, and a good part of masks is
    ignored."""
    found = []
    for i, scene in enumerate(make_shapes(n, 64, seed=3)):
        image = torch.from_numpy(scene.image).permute(2, 0, 1).float() / 255 - 0.5
        labels, mask = torch.from_numpy(scene.labels), torch.from_numpy(scene.mask).long()
        mask[:, :8 * i] = 255
        kept = slice(0, 0 if i == 1 else None)
        found.append(dict(image=image, label=labels[0],
                          many=torch.bincount(labels, minlength=3).clamp(max=1).float(), mask=mask,
                          boxes=torch.from_numpy(scene.boxes).float()[kept], labels=labels[kept],
                          masks=torch.from_numpy(scene.masks).bool()[kept]))
    return found


class Collate:
    "The batches of a task."
    def __init__(self, task: str): self.task = task

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        images = torch.stack([o["image"] for o in rows])
        dense = {"single": "label", "multi": "many", "segmentation": "mask"}.get(self.task)
        if dense is not None: return images, torch.stack([o[dense] for o in rows])
        return dict(images=images, **{k: [o[k] for o in rows]
                                      for k in ("boxes", "labels", "masks")})


def dealt(task: str, n: int, rank: int, processes: int, batch_size: int = 2) -> DataLoader:
    "Of n images those of a process, each once; where it has none, one that stands in."
    mine = range(rank, n, processes)
    loader = DataLoader(samples(task, n), batch_size, sampler=mine or [0], collate_fn=Collate(task))
    if not mine: loader.stand_in = True
    return loader


class Still(pl.Callback):
    "Holds BatchNorm and dropout still, and keeps the losses of the steps."
    def on_train_batch_start(self, trainer, model, *_):
        for o in model.modules():
            if isinstance(o, nn.modules.batchnorm._BatchNorm | nn.Dropout | nn.Dropout2d): o.eval()

    def on_train_start(self, *_): self.losses: list[float] = []
    def on_train_batch_end(self, trainer, model, outputs, *_):
        self.losses.append(float(outputs["loss"]))


def trained(task: str, rank: int, processes: int, **how: Any) -> dict[str, Any]:
    """An epoch of two steps with six images each: the losses of the steps, what was logged, the
    weights."""
    # Of all places, since chance would pick others on each process.
    model, still = build(task, **(dict(masks_per_image=10_000) if task == "masks" else {})), Still()
    trainer = pl.Trainer(max_epochs=1, callbacks=[still], **QUIET, **how)
    trainer.fit(model, dealt(task, 12, rank, processes, 6 // processes))
    logged = {k: float(v) for k, v in trainer.callback_metrics.items() if k != "train/num_pos"}
    return dict(losses=still.losses, logged=logged,
                weights={k: v.clone() for k, v in model.state_dict().items()})


def measured(task: str, n: int, rank: int, processes: int, **how: Any) -> dict[str, Any]:
    "What is logged of some images in validation and test, and what the figures show."
    model, figures = build(task, **(dict(masks_per_image=4) if task == "masks" else {})), []
    draw, base.plot_confusion_matrix = base.plot_confusion_matrix, lambda counts, names: counts
    model.draw_predictions = lambda images, *_, **look: torch.stack(list(images))
    model.figures = lambda: figures.append(type(model).figures(model)) or {}
    try:
        trainer = pl.Trainer(**QUIET, **how)
        loader = dealt(task, n, rank, processes)
        found = dict(trainer.validate(model, loader, verbose=False)[0])
        if n > 1: found |= trainer.test(model, loader, verbose=False)[0]
    finally: base.plot_confusion_matrix = draw
    return dict(logged=found, figures=figures[0])


def loss_cases() -> dict[str, tuple[Any, list[Tensor], list[Tensor]]]:
    """Losses, what they are given that has gradients, and what has not; the first third of the
    images counts little or nothing."""
    torch.manual_seed(1)
    ids, many = torch.tensor([-100, -100, 0, 1, 2, 2]), torch.rand(6, 3)
    masks = torch.randint(0, 3, (6, 4, 4))
    masks[:2], masks[2, :3] = 255, 255
    logits, pixels = torch.randn(6, 3), torch.randn(6, 3, 4, 4)
    boxes = [torch.rand(6, 4, 4).cumsum(-1) for _ in range(2)]
    cls, ctr, share = torch.randn(6, 4, 3), torch.randn(6, 4), torch.rand(6, 4)
    none, one, some = (torch.full((6, 4), -1) for _ in range(3))
    one[5, 2], some[2:] = 1, torch.randint(-2, 3, (4, 4)).clamp(min=-1)
    weights = [1.0, 5.0, 0.2]
    found: dict[str, tuple[Any, list[Tensor], list[Tensor]]] = {
        "cross_entropy": (CrossEntropyLoss(0.1, weights), [logits], [ids]),
        "unweighted": (CrossEntropyLoss(), [logits], [ids]),
        "shares": (CrossEntropyLoss(0.0, weights), [logits], [many]),
        "bce": (BCEWithLogitsLoss(weights), [logits], [many]),
        "focal": (FocalLoss(ignore_index=-100), [logits], [ids]),
        "focal_many": (FocalLoss(), [logits], [many]),
        "asymmetric": (AsymmetricLoss(), [logits], [many]),
        "dice": (DiceLoss(3), [pixels], [masks]), "tversky": (TverskyLoss(3), [pixels], [masks]),
        "pixels": (FocalLossPixelwise(), [pixels], [masks]),
        "combined": (CombinedSegmentationLoss(3, class_weights=weights), [pixels], [masks]),
        "giou": (lambda p, t: GIoULoss()(p.flatten(0, 1), t.flatten(0, 1)), [boxes[0]], [boxes[1]]),
        "weighted_giou": (lambda p, t, w: GIoULoss()(p.flatten(0, 1), t.flatten(0, 1), w.flatten()),
                          [boxes[0]], [boxes[1], share]),
        "centerness": (lambda p, t: CenternessLoss()(p.flatten(), t.flatten()), [ctr], [share]),
        "masks": (lambda p, t: MaskLoss()(p[(t >= 0).any((1, 2))], (t == 1)[(t >= 0).any((1, 2))]),
                  [pixels[:, 0]], [masks.where(masks != 255, -1)])}
    # With one object among all processes there are less than one each.
    for name, labels in (("none", none), ("one", one), ("some", some)):
        found[f"fcos_{name}"] = (lambda *o: FCOSLoss(3)(*o)["total_loss"], [cls, boxes[0], ctr],
                                 [labels, boxes[1], share])
        found[f"yolox_{name}"] = (lambda c, b, o, *t: YOLOXLoss(3)(c, o, b, *t)["total_loss"],
                                  [cls, boxes[0], ctr], [labels, boxes[1], share])
    return found


def gradients(name: str, which: slice) -> list[Tensor]:
    "A loss of some of the six images, and its gradients."
    loss_fn, given, targets = loss_cases()[name]
    leaves = [o.clone().requires_grad_() for o in given]
    loss = loss_fn(*(o[which] for o in (*leaves, *targets)))
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def work(rank: int, processes: int, port: int, out: Path) -> None:
    "One of several processes."
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=processes, timeout=timedelta(minutes=3))
    share = 6 // processes
    found: dict[str, Any] = dict(losses={k: gradients(k, slice(share * rank, share * (rank + 1)))
                                         for k in loss_cases()})
    # In evaluation one process may have a batch more.
    if rank == 0:
        for loss_fn, given, targets in loss_cases().values():
            if isinstance(loss_fn, nn.Module): loss_fn.eval()(*given, *targets)
            with torch.no_grad(): loss_fn(*given, *targets)
    how: dict[str, Any] = dict(strategy="ddp", devices=processes)
    for task in TASKS:
        found[task] = dict(trained=trained(task, rank, processes, **how),
                           measured={n: measured(task, n, rank, processes, **how) for n in COUNTS})
        # A search, say, on one process alone.
        if rank == 0 and task in ALONE:
            found[task]["alone"] = (trained(task, 0, 1, devices=1)["logged"]
                                    | measured(task, 1, 0, 1, devices=1)["logged"])
    torch.save(found, out / f"{processes}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    "What one process comes to."
    return {task: dict(trained=trained(task, 0, 1, devices=1),
                       measured={n: measured(task, n, 0, 1, devices=1) for n in COUNTS})
            for task in TASKS}


@pytest.fixture(scope="module", params=[2, 3])
def found(request, tmp_path_factory) -> list[dict[str, Any]]:
    "What each of two, or of three, processes comes to."
    out = tmp_path_factory.mktemp("processes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (request.param, port, out), request.param)
    return [torch.load(out / f"{request.param}-{rank}.pt", weights_only=True)
            for rank in range(request.param)]


def agree(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.timeout(600)
def test_losses_and_gradients_are_those_of_the_whole_batch(found):
    for name in loss_cases():
        loss, *grads = gradients(name, slice(None))
        agree(torch.stack([o["losses"][name][0] for o in found]).mean(), loss)
        for i, expected in enumerate(grads):
            # Each process holds the gradient of its images; the mean over the processes is that of
            # the whole.
            agree(torch.stack([o["losses"][name][1 + i] for o in found]).mean(0), expected)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("task", TASKS)
def test_training_is_that_of_one_process(found, one, task):
    expected = one[task]["trained"]
    agree(torch.tensor([o[task]["trained"]["losses"] for o in found]).mean(0),
          torch.tensor(expected["losses"]))
    for o in found:
        agree(o[task]["trained"]["logged"], expected["logged"])
        agree(o[task]["trained"]["weights"], expected["weights"])
    assert expected["losses"][0] != pytest.approx(expected["losses"][-1], rel=1e-3)  # it did train


@pytest.mark.timeout(600)
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("task", TASKS)
def test_metrics_losses_and_figures_count_each_image_once(found, one, task, count):
    expected = one[task]["measured"][count]
    assert {"val/loss", "test/loss"} <= set(expected["logged"]) or count == 1
    for o in found:
        assert o[task]["measured"][count]["logged"].keys() == expected["logged"].keys()
        agree(o[task]["measured"][count], expected)
    if task == "single":
        assert (expected["figures"]["val/confusion_matrix"].sum() == count
                and len(expected["figures"]["val/predictions"]) == min(3, count))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("task", ALONE)
def test_a_run_of_one_process_waits_for_no_other(found, one, task):
    agree(found[0][task]["alone"], one[task]["trained"]["logged"]
          | one[task]["measured"][1]["logged"])


class Break(pl.Callback):
    "Breaks a stage off after its first batch."
    def __init__(self, stage: str): self.stage = stage
    def stop(self, stage: str) -> None:
        if stage == self.stage: raise ArithmeticError("broken off")

    def on_train_batch_end(self, *_): self.stop("train")
    def on_validation_batch_end(self, *_): self.stop("val")
    def on_test_batch_end(self, *_): self.stop("test")


def whole_run(model: pl.LightningModule, *callbacks: pl.Callback) -> dict[str, float]:
    "What a fit and a test log; the rate is so low that the weights stay."
    trainer = pl.Trainer(max_epochs=1, callbacks=[Still(), *callbacks], **QUIET)
    trainer.fit(model, dealt("single", 6, 0, 1), dealt("single", 5, 0, 1))
    fitted = {k: float(v) for k, v in trainer.callback_metrics.items()}
    return {**fitted, **trainer.test(model, dealt("single", 5, 0, 1), verbose=False)[0]}


@pytest.mark.parametrize("stage", ["train", "val", "test"])
def test_an_epoch_that_was_broken_off_leaves_nothing_behind(stage, monkeypatch):
    counts: list[int] = []
    monkeypatch.setattr(base, "plot_confusion_matrix",
                        lambda matrix, names: counts.append(int(matrix.sum())))
    expected, model = whole_run(build("single", lr=1e-30)), build("single", lr=1e-30)
    with pytest.raises(ArithmeticError): whole_run(model, Break(stage))
    agree(whole_run(model), expected)
    assert set(counts) == {5}


def test_the_sums_of_an_epoch_can_be_kept_and_put_back():
    model, again = build("single"), build("single")
    halves = [DataLoader(samples("single", 12)[part], 2, collate_fn=Collate("single"))
              for part in (slice(4), slice(4, 12))]
    for batch in halves[0]: model._step(batch, "train")
    states = {name: (o._update_count, o.metric_state) for name, o in model.named_modules()
              if isinstance(o, Metric)}
    for name, o in again.named_modules():
        if name not in states: continue
        o._update_count = states[name][0]
        for k, v in states[name][1].items(): setattr(o, k, v)
    for batch in halves[1]:
        for o in (model, again): o._step(batch, "train")
    assert again.losses_of("train").compute() == model.losses_of("train").compute() != {}
    assert again.metrics.compute("train") == model.metrics.compute("train") != {}
    assert not [k for k in model.state_dict() if "losses" in k or "metrics" in k]


@pytest.fixture
def elsewhere(monkeypatch):
    """A process group that takes no tensor from another device than the strategy's, which at the
    end of an epoch is not the CPU."""
    def refuse(name: str):
        def collective(*given: Any, **_: Any) -> None:
            tensors = [t for o in given for t in (o if isinstance(o, list) else [o])
                       if isinstance(t, Tensor)]
            raise AssertionError(f"{name} of a tensor on {tensors[0].device}") if any(
                t.device.type != "meta" for t in tensors) else NotImplementedError(name)
        return collective

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    for name in ("all_reduce", "all_gather", "all_gather_into_tensor", "broadcast",
                 "reduce", "gather"):
        monkeypatch.setattr(dist, name, refuse(name))
    logged: dict[str, torch.device] = {}

    def log(self: pl.LightningModule, name: str, value: Any, sync_dist: bool = False,
            **_: Any) -> None:
        if sync_dist: dist.all_reduce(value)        # as Lightning does
        logged[name] = value.device

    end = base.VisionTask._log_epoch

    def log_epoch(self: base.VisionTask, stage: str) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(type(self.trainer.strategy), "root_device",
                          property(lambda _: torch.device("meta")))
            patch.setattr(pl.LightningModule, "log", log)
            end(self, stage)

    monkeypatch.setattr(base.VisionTask, "_log_epoch", log_epoch)
    monkeypatch.setattr(base, "several_processes", lambda module: True)
    yield logged
    dist.destroy_process_group()


@pytest.mark.parametrize("task", TASKS)
def test_what_goes_into_a_collective_lies_on_the_device_of_the_strategy(task, elsewhere):
    trainer = pl.Trainer(**QUIET)
    trainer.validate(build(task), dealt(task, 2, 0, 1), verbose=False)
    assert ({"val/loss", {"segmentation": "val/miou", "single": "val/accuracy",
                          "multi": "val/f1"}.get(task, "val/map")} <= set(elsewhere))
    assert {o.type for o in elsewhere.values()} == {"meta"}
