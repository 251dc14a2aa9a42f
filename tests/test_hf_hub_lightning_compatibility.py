"""Lightning's own features with Lightning's own trainer and a timm model from the Hub, on a
LocalHub."""
import math
import warnings
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from ddp_route import in_one_process, in_two_processes
from hf_routes import (CLASSES, RESNET_ID, SIZE, TIMM_ID, TIMM_VIT_ID, Kill, Killed, Note,
                       Spoil, assert_same, classifier,
                       loaders, logits_of, make_set, quiet, weights)
from pytorch_lightning.callbacks import (BackboneFinetuning, EarlyStopping, EMAWeightAveraging,
                                         LearningRateMonitor,
                                         ModelCheckpoint, ModelSummary, StochasticWeightAveraging)
from torch import nn
from torch.utils.data import DataLoader

from autotimm import ImageClassifier, ImageDataModule, LoggingConfig, MetricConfig, seed_everything

pytestmark = [pytest.mark.usefixtures("tiny_hub"),
              pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
              pytest.mark.filterwarnings("ignore:.*smaller than the logging interval.*")]


def build(backbone: str = TIMM_ID, seed: int = 0, **kwargs) -> ImageClassifier:
    seed_everything(seed)
    return classifier(f"hf-hub:{backbone}", **kwargs)


def trainer(root: Path, *callbacks: pl.Callback, **kwargs) -> pl.Trainer:
    return pl.Trainer(**quiet(root, callbacks=list(callbacks),
                              **{"max_epochs": 2, "logger": False, "enable_checkpointing": False,
                                                                  "num_sanity_val_steps": 0,
                                 **kwargs}))


@pytest.mark.parametrize("repo", [TIMM_ID, RESNET_ID, TIMM_VIT_ID])
def test_fit_learns(tmp_path, repo):
    "A ConvNeXt, a ResNet and a ViT of the Hub start from the repository's weights and learn."
    import timm
    model, note = build(repo), Note()
    stored = timm.create_model(f"hf-hub:{repo}", pretrained=True, num_classes=0)
    assert_same(weights(model.backbone.model), weights(stored))
    fit = trainer(tmp_path, note, max_epochs=4)
    fit.fit(model, *loaders())
    assert fit.global_step == 12 and len(note.losses) == 12
    assert sum(note.losses[-3:]) < 0.8 * sum(note.losses[:3])
    moved = [k for k, v in model.named_parameters() if not torch.equal(v, note.start[k])]
    assert len(moved) == len([p for p in model.parameters() if p.requires_grad])


def test_validate_and_test_agree_with_a_hand_written_loop(tmp_path):
    model, run = build(), trainer(tmp_path)
    run.fit(model, *loaders())
    data = make_set(20, seed=3)
    x, y = data.tensors
    logits = logits_of(model, x)
    wanted = {"loss": float(nn.functional.cross_entropy(logits, y)),
              "accuracy": float((logits.argmax(1) == y).float().mean())}
    for stage, run_stage in (("val", run.validate), ("test", run.test)):
        # The last batch is smaller
        found = run_stage(model, DataLoader(data, batch_size=6), verbose=False)[0]
        assert found == pytest.approx({f"{stage}/{k}": v for k, v in wanted.items()}, rel=1e-5)


def test_predict_gives_probabilities_in_order(tmp_path):
    model = build()
    data = make_set(10, seed=3)
    found = torch.cat(trainer(tmp_path).predict(model, DataLoader(data, batch_size=4)))
    torch.testing.assert_close(found, logits_of(model, data.tensors[0]).softmax(-1))
    assert found.shape == (10, CLASSES) and not found.requires_grad


def test_a_data_module_feeds_all_stages(tmp_path, tiny_folder):
    """Lightning's trainer with our data module: the model's own preprocessing, class names into the
    model."""
    model, data = build(), ImageDataModule(tiny_folder, batch_size=6, num_workers=0)
    run = trainer(tmp_path)
    run.fit(model, datamodule=data)
    assert (data.data_config["input_size"] == (3, SIZE, SIZE)
            and data.data_config["mean"] == model.data_config["mean"])
    assert model.class_names == data.class_names and len(model.class_names) == CLASSES
    found = run.test(model, datamodule=data, verbose=False)[0]
    assert set(found) == {"test/loss", "test/accuracy"} and math.isfinite(found["test/loss"])


def test_model_checkpoint_keeps_the_best(tmp_path):
    "The best of three epochs, of which the last is spoilt; the file's name says its value."
    keep = ModelCheckpoint(tmp_path, "best-{epoch}-{val/loss:.4f}", monitor="val/loss",
                           save_top_k=2, auto_insert_metric_name=False)
    note, model = Note(), build()
    trainer(tmp_path, keep, note, Spoil(2), max_epochs=3,
            enable_checkpointing=True).fit(model, *loaders())
    losses = [o["val/loss"] for o in note.val]
    best = min(range(3), key=losses.__getitem__)
    assert best != 2
    assert float(keep.best_model_score) == pytest.approx(losses[best])
    assert f"{losses[best]:.4f}" in keep.best_model_path
    assert (sorted(float(o) for o in keep.best_k_models.values())
            == pytest.approx(sorted(losses)[:2]))
    again = ImageClassifier.load_from_checkpoint(keep.best_model_path)
    found = trainer(tmp_path).validate(again, loaders()[1], verbose=False)[0]
    assert found["val/loss"] == pytest.approx(losses[best], rel=1e-5)


def test_a_checkpoint_needs_no_hub(tmp_path, tiny_hub):
    "Equal logits, with nothing asked of the Hub, which is down."
    model, run = build(), trainer(tmp_path)
    run.fit(model, *loaders())
    run.save_checkpoint(tmp_path / "model.ckpt")
    asked = len(tiny_hub.requests)
    tiny_hub.fault("down")
    try: again = ImageClassifier.load_from_checkpoint(tmp_path / "model.ckpt")
    finally: tiny_hub.clear_faults()
    x = make_set(5, seed=4).tensors[0]
    assert torch.equal(logits_of(again, x), logits_of(model, x))
    assert len(tiny_hub.requests) == asked
    stored = torch.load(tmp_path / "model.ckpt", weights_only=True)
    assert stored["hyper_parameters"]["backbone_name"] == f"hf-hub:{TIMM_ID}"


def test_resume_equals_the_unbroken_run(tmp_path):
    """With Lightning's trainer, where neither order nor dropout draws random numbers; the cosine
    schedule goes on as well."""
    def run(root: Path, *callbacks: pl.Callback, ckpt_path: Path | None = None) -> ImageClassifier:
        model = build(RESNET_ID, scheduler="cosine")
        keep = ModelCheckpoint(root, save_last=True)
        trainer(root, keep, *callbacks, max_epochs=4,
                enable_checkpointing=True).fit(model, *loaders(), ckpt_path=ckpt_path)
        return model
    whole = run(tmp_path / "whole")
    with pytest.raises(Killed): run(tmp_path / "parts", Kill(2))
    note = Note()
    parts = run(tmp_path / "parts", note, ckpt_path=tmp_path / "parts" / "last.ckpt")
    assert note.hooks.count("train_epoch_end") == 2
    assert_same(weights(parts), weights(whole))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precision(tmp_path, precision):
    "What autocast and the weights are in each precision; the loss stays finite and falls."
    seen, model, note = [], build(), Note()
    blocks = [m for m in model.backbone.modules() if isinstance(m, nn.Conv2d)]
    blocks[1].register_forward_hook(lambda m, args, out: seen.append((out.dtype, m.weight.dtype)))
    trainer(tmp_path, note, precision=precision, max_epochs=4).fit(model, *loaders())
    wanted = {"bf16-mixed": (torch.bfloat16, torch.float32),
              "bf16-true": (torch.bfloat16, torch.bfloat16),
              "64-true": (torch.float64, torch.float64)}[precision]
    assert set(seen) == {wanted}
    assert all(map(math.isfinite, note.losses)) and sum(note.losses[-3:]) < sum(note.losses[:3])


def test_early_stopping_stops_at_the_spoilt_epoch(tmp_path):
    stop = EarlyStopping("val/loss", patience=1)
    run = trainer(tmp_path, stop, Spoil(2), max_epochs=6)
    run.fit(build(), *loaders())
    assert stop.stopped_epoch == 2 and run.current_epoch == 3


def test_learning_rate_monitor_sees_the_schedule(tmp_path):
    "Warm-up, then cosine: as logged by Lightning's callback and by the model itself."
    logger = pl.loggers.CSVLogger(tmp_path)
    model = build(scheduler="cosine", scheduler_kwargs=dict(warmup_epochs=1),
                  logging_config=LoggingConfig(True, True))
    run = trainer(tmp_path, LearningRateMonitor("step"), logger=logger, max_epochs=3,
                  log_every_n_steps=1)
    run.fit(model, *loaders())
    logger.save()
    rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    head, rows = rows[0].split(","), [dict(zip(rows[0].split(","), r.split(","))) for r in rows[1:]]
    name = next(o for o in head if o.startswith("lr-"))
    rates = [float(r[name]) for r in rows if r[name]]
    own = [float(r["train/lr"]) for r in rows if r["train/lr"]]
    assert len(rates) == len(own) == 9
    assert (rates.index(max(rates)) in (2, 3) and rates[0] < max(rates) / 2
            and rates[-1] < max(rates) / 4)
    assert own == pytest.approx(rates, rel=1e-4, abs=1e-7)
    assert all(float(r["train/grad_norm"]) > 0 for r in rows if r["train/grad_norm"])


@pytest.mark.parametrize("by_argument", [True, False], ids=["ema_decay", "callback"])
def test_moving_average_of_the_weights(tmp_path, by_argument):
    """Lightning's callback, put in by `ema_decay` or by the user: after training the model holds
    the average."""
    decay, run = 0.5, []  # the average starts with the weights after the first step
    class Follow(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            now = pl_module.head.state_dict()
            key = next(k for k in now if k.endswith("weight"))
            run.append(now[key].clone())
    model = build(ema_decay=decay) if by_argument else build()
    callbacks = [Follow()] if by_argument else [Follow(), EMAWeightAveraging(decay=decay)]
    trainer(tmp_path, *callbacks, max_epochs=1).fit(model, *loaders())
    average = run[0]
    for t, o in enumerate(run[1:], 1):
        # That of `ema_decay` warms up.
        d = min(decay, (1 + t) / (10 + t)) if by_argument else decay
        average = d * average + (1 - d) * o
    head = next(v for k, v in model.head.state_dict().items() if k.endswith("weight"))
    torch.testing.assert_close(head, average, rtol=1e-4, atol=1e-6)
    assert not torch.equal(head, run[-1])


def test_stochastic_weight_averaging_and_finetuning_callbacks(tmp_path):
    "Two of Lightning's callbacks that take the model apart: it has `backbone`, and can be copied."
    model = build(RESNET_ID)
    before = weights(model.backbone)
    norms = {f"{n}.{k}" for n, m in model.backbone.named_modules() if isinstance(m, nn.BatchNorm2d)
             for k in ("weight", "bias")}
    moved: list[set[str]] = []
    class Look(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            moved.append({n for n, p in pl_module.backbone.named_parameters()
                          if not torch.equal(p, before[n])})
    thaw = BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False)
    trainer(tmp_path, thaw, Look()).fit(model, *loaders())
    assert moved[0] == norms and moved[1] == {n for n, _ in model.backbone.named_parameters()}
    swa = StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=1)
    trainer(tmp_path, swa, max_epochs=3).fit(build(RESNET_ID), *loaders())
    assert swa.n_averaged > 0


def test_loggers_and_metrics(tmp_path):
    """TensorBoard and CSV at once get losses, default and further metrics; the hyperparameters are
    plain."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    metrics = [MetricConfig("accuracy", "torchmetrics", "Accuracy",
                            {"task": "multiclass", "num_classes": CLASSES}, ["train", "val"]),
               MetricConfig("auroc", "torchmetrics", "AUROC", {}, ["val"])]
    board, table = pl.loggers.TensorBoardLogger(tmp_path), pl.loggers.CSVLogger(tmp_path)
    run = trainer(tmp_path, logger=[board, table], log_every_n_steps=1)
    run.fit(build(metrics=metrics), *loaders())
    read = EventAccumulator(board.log_dir).Reload()
    assert {"train/loss", "val/loss", "train/accuracy", "val/accuracy",
            "val/auroc"} <= set(read.Tags()["scalars"])
    assert (read.Scalars("val/auroc")[-1].value
            == pytest.approx(float(run.callback_metrics["val/auroc"])))
    assert "val/auroc" in (Path(table.log_dir) / "metrics.csv").read_text()
    assert f"hf-hub:{TIMM_ID}" in (Path(table.log_dir) / "hparams.yaml").read_text()


def test_accumulated_gradients_equal_those_of_the_large_batch(tmp_path):
    found = []
    for batch_size, accumulate in ((4, 2), (8, 1)):
        note = Note()
        run = trainer(tmp_path, note, accumulate_grad_batches=accumulate, max_epochs=1)
        run.fit(build(), loaders(batch_size=batch_size)[0])
        assert run.global_step == 3
        found.append(note.grads[0])
    assert_same(found[0], found[1], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("how", ["norm", "value"])
def test_gradient_clipping(tmp_path, how):
    class Look(pl.Callback):
        norms: list[float] = []
        largest: list[float] = []
        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            grads = [p.grad for p in pl_module.parameters() if p.grad is not None]
            if not grads: return
            self.norms.append(float(torch.nn.utils.get_total_norm(grads)))
            self.largest.append(max(float(g.abs().max()) for g in grads))
    note, look = Note(), Look()
    look.norms, look.largest = [], []
    limit = 0.01
    trainer(tmp_path, note, look, gradient_clip_val=limit,
            gradient_clip_algorithm=how).fit(build(), *loaders())
    before = [float(torch.nn.utils.get_total_norm(list(g.values()))) for g in note.grads]
    assert min(before) > limit
    assert (max(look.norms if how == "norm" else look.largest) <= limit * 1.001
            and len(look.norms) >= 4)


def test_two_processes(tmp_path):
    """DDP with Lightning's trainer: both ranks end with the weights and metrics that one process
    has on the same batches."""
    ranks, one = (in_two_processes(tmp_path, ["hub-timm"], "lightning")["hub-timm"],
                  in_one_process(tmp_path, "hub-timm", "lightning"))
    assert [(o["rank"], o["world_size"], o["steps"])
            for o in ranks] == [(0, 2, 4), (1, 2, 4)] and one["world_size"] == 1
    assert_same(ranks[0]["weights"], ranks[1]["weights"])
    assert_same(ranks[0]["weights"], one["weights"], rtol=1e-3, atol=1e-5)
    for o in ranks: assert o["metrics"] == pytest.approx(one["metrics"], rel=1e-3, abs=1e-5)


def test_profiler(tmp_path):
    profiler = pl.profilers.SimpleProfiler(dirpath=tmp_path, filename="profile")
    trainer(tmp_path, profiler=profiler, max_epochs=1).fit(build(), *loaders())
    text = next(tmp_path.glob("*profile*")).read_text()
    assert "run_training_batch" in text and "ImageClassifier" in text


def test_fast_dev_run_and_limits(tmp_path):
    run, note = trainer(tmp_path, first := Note(), fast_dev_run=True), Note()
    run.fit(build(), *loaders())
    assert len(first.losses) == 1 and run.global_step == 1
    limited = trainer(tmp_path, note, max_epochs=3, limit_train_batches=2, limit_val_batches=1,
                      val_check_interval=1)
    limited.fit(build(), *loaders())
    assert len(note.losses) == 6 and len(note.val) == 6
    by_steps = trainer(tmp_path, max_epochs=-1, max_steps=4)
    by_steps.fit(build(), *loaders())
    assert by_steps.global_step == 4


def test_overfit_batches(tmp_path):
    "One batch is learned by heart."
    note = Note()
    trainer(tmp_path, note, overfit_batches=1, max_epochs=20).fit(build(lr=5e-3), loaders()[0])
    assert len(note.losses) == 20 and note.losses[-1] < 0.1 * note.losses[0]


def test_model_summary(tmp_path):
    model = build()
    summary = pl.utilities.model_summary.summarize(model)
    assert summary.total_parameters == sum(p.numel() for p in model.parameters())
    assert {"backbone", "head", "loss_fn", "metrics"} <= set(summary.layer_names)
    trainer(tmp_path, ModelSummary(max_depth=2), max_epochs=1,
            limit_train_batches=1).fit(model, *loaders())


def test_compile_on_request(tmp_path):
    "Compiled when fitting starts, and only then; the checkpoint loads without it."
    model = build(compile_model=True, compile_kwargs=dict(backend="eager"))
    plain = build()
    assert model.backbone._compiled_call_impl is None
    run, notes = [trainer(tmp_path, Note(), max_epochs=1) for _ in range(2)], []
    for o, m in zip(run, (model, plain)):
        o.fit(m, *loaders())
        notes.append([c for c in o.callbacks if isinstance(c, Note)][0].losses)
    assert (model.backbone._compiled_call_impl is not None
            and plain.backbone._compiled_call_impl is None)
    assert notes[0] == pytest.approx(notes[1], rel=1e-4)
    run[0].save_checkpoint(tmp_path / "model.ckpt")
    state = torch.load(tmp_path / "model.ckpt", weights_only=True)["state_dict"]
    assert not [k for k in state if "_orig_mod" in k]
    again = ImageClassifier.load_from_checkpoint(tmp_path / "model.ckpt")
    x = make_set(4, seed=4).tensors[0]
    torch.testing.assert_close(logits_of(again, x), logits_of(model, x), rtol=1e-4, atol=1e-5)


def test_lightnings_own_tuner(tmp_path):
    "The model has `lr` where Lightning's learning-rate finder looks for it."
    model, run = build(), trainer(tmp_path, max_epochs=8)
    tuner = pl.tuner.Tuner(run)
    found = tuner.lr_find(model, loaders()[0], num_training=20, update_attr=True)
    assert model.lr == model.hparams["lr"] == found.suggestion() > 0
    run.fit(model, *loaders())
    assert {g["lr"] for g in run.optimizers[0].param_groups} == {model.lr}


def test_no_warning_on_ordinary_use(tmp_path):
    "Building and training say nothing that a user would have to look into."
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        # Lightning about torch
        warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        model = build()
        trainer(tmp_path, max_epochs=1, log_every_n_steps=1).fit(model, *loaders())
