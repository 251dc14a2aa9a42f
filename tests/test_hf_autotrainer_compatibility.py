"""The matrix: every feature of `AutoTrainer` with each of the four routes from Hugging Face, every
cell run."""
import math
import re
import warnings
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from ddp_route import in_one_process, in_two_processes
from hf_routes import (CLASSES, HAS_TRANSFORMERS, ROUTES, SIZE, VARIANTS, Kill, Killed,
                       Note, Rates, Route, Spoil, assert_same, loaders, logits_of,
                       make_set, quiet, weights)
from pytorch_lightning.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from autotimm import AutoTrainer, ImageDataModule, LoggerConfig, LoggerManager, TunerConfig
from autotimm.data.preprocessing import IMAGENET_DATA_CONFIG
from autotimm.data.transforms import eval_pipeline

pytestmark = [pytest.mark.usefixtures("tiny_hub"),
              pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
              pytest.mark.filterwarnings("ignore:.*smaller than the logging interval.*"),
              pytest.mark.filterwarnings("ignore:.*LeafSpec.*")]
OVERVIEW = Path(__file__).parents[2] / "shared" / "overview.md"


def cells(*more: Route) -> pytest.MarkDecorator:
    "One test for each route."
    return pytest.mark.parametrize("route", [*ROUTES.values(), *more], ids=lambda o: o.name)


@pytest.fixture(autouse=True)
def needs(request):
    "Routes 2 to 4 want transformers."
    call = getattr(request.node, "callspec", None)
    if call and "route" in call.params and call.params["route"].needs_transformers:
        pytest.importorskip("transformers")


def trainer(root: Path, *callbacks: pl.Callback, **kwargs) -> AutoTrainer:
    return AutoTrainer(**quiet(root, callbacks=list(callbacks),
                               **{"max_epochs": 3, "num_sanity_val_steps": 0, **kwargs}))


def by_hand(model: nn.Module, data: DataLoader) -> dict[str, float]:
    "Loss and accuracy over a data set, in one batch."
    x, y = data.dataset.tensors
    logits = logits_of(model, x)
    return {"loss": float(nn.functional.cross_entropy(logits, y)),
            "accuracy": float((logits.argmax(1) == y).float().mean())}


@cells(*VARIANTS.values())
def test_basic_training(tmp_path, route):
    """It learns: the loss falls, all depths of the network move, the history tells, images never
    seen are recognised."""
    model, note = route.build(), Note()
    run = trainer(tmp_path, note, max_epochs=6)
    run.fit(model, *loaders())
    assert run.global_step == len(note.losses) == 18 and run.state.finished
    assert (all(map(math.isfinite, note.losses))
            and sum(note.losses[-3:]) < 0.7 * sum(note.losses[:3]))
    names = [n for n, p in model.named_parameters() if p.requires_grad and p.ndim > 1]
    now = weights(model)
    assert not any(torch.equal(now[n], note.start[n])
                   for n in (names[0], names[len(names) // 2], names[-1]))
    assert [o["epoch"] for o in run.history] == list(range(6)) and run.history[-1]["step"] == 18
    assert run.history[-1]["val/loss"] == pytest.approx(by_hand(model, loaders()[1])["loss"],
                                                        rel=1e-4)
    assert run.test(model, DataLoader(make_set(30, seed=9), 10),
                    verbose=False)[0]["test/accuracy"] > 0.9


@cells(*VARIANTS.values())
def test_checkpointing(tmp_path, route, tiny_hub):
    """The best file is the best epoch and reloads to its logits, weights only; the last file is the
    last epoch."""
    seen: list[torch.Tensor] = []
    x = make_set(5, seed=4).tensors[0]
    class Logits(pl.Callback):
        def on_validation_end(self, trainer, pl_module): seen.append(logits_of(pl_module, x))
    model = route.build()
    run = trainer(tmp_path, Logits(), Spoil(2))
    run.fit(model, *loaders())
    losses = [o["val/loss"] for o in run.history]
    best = min(range(3), key=losses.__getitem__)
    assert (best != 2 and f"epoch={best:02d}" in run.best_model_path
            and f"{losses[best]:.4g}" in run.best_model_path)
    again = route.load(run.best_model_path)
    assert torch.equal(logits_of(again, x), seen[best]) and not again.training
    last = route.load(run.last_model_path)
    assert (torch.equal(logits_of(last, x), logits_of(model, x))
            and not torch.equal(logits_of(last, x), seen[best]))
    stored = torch.load(run.best_model_path, weights_only=True)
    assert (stored["epoch"] == best and str(tmp_path) not in repr({k: v for k, v in stored.items()
                                                                   if k != "state_dict"}))


@cells()
def test_early_stopping(tmp_path, route):
    "The run ends at the epoch that is worse than the one before, not earlier, not later."
    stop, note = EarlyStopping("val/loss", patience=1, min_delta=0.0), Note()
    run = trainer(tmp_path, stop, note, Spoil(2), max_epochs=8)
    run.fit(route.build(), *loaders())
    losses = [o["val/loss"] for o in run.history]
    assert losses[2] > losses[1] < losses[0]
    assert (stop.stopped_epoch == 2 and run.current_epoch == len(losses) == 3
            and len(note.losses) == 9)
    assert float(stop.best_score) == pytest.approx(losses[1])


@cells()
def test_multiple_callbacks(tmp_path, route):
    """Early stopping, two checkpoints, a rate monitor and one's own, together: each does its work,
    the list is not changed."""
    stop, rates, note = EarlyStopping("val/loss", patience=1), LearningRateMonitor("step"), Note()
    by_loss = ModelCheckpoint(tmp_path / "loss", "{epoch}", monitor="val/loss", save_top_k=2)
    by_accuracy = ModelCheckpoint(tmp_path / "accuracy", "{epoch}-{val/accuracy:.2f}",
                                  monitor="val/accuracy", mode="max")
    mine = [stop, by_loss, by_accuracy, rates, note, Spoil(3)]
    given = list(mine)
    run = AutoTrainer(**quiet(tmp_path, callbacks=mine, max_epochs=8, log_every_n_steps=1,
                              logger=[LoggerConfig("csv", {"save_dir": str(tmp_path)})]))
    run.fit(route.build(), *loaders())
    assert mine == given and all(any(o is c for c in run.callbacks) for o in mine)
    assert stop.stopped_epoch == 3 and run.current_epoch == 4
    losses = [o["val/loss"] for o in run.history]
    two = sorted(sorted(range(4), key=losses.__getitem__)[:2])
    assert sorted(o.stem for o in (tmp_path / "loss").glob("*.ckpt")) == [f"epoch={i}" for i in two]
    accuracy = max(o["val/accuracy"] for o in run.history)
    assert (float(by_accuracy.best_model_score) == pytest.approx(accuracy)
            and f"{accuracy:.2f}" in Path(by_accuracy.best_model_path).name)
    assert run.best_model_path == by_loss.best_model_path
    assert note.hooks == ["train_start"] + ["validation_end", "train_epoch_end"] * 4
    assert len(rates.lrs) >= 1 and Path(run.last_model_path).exists()
    # The user's checkpoints are the only best ones
    assert not list((tmp_path / "checkpoints").rglob("best-*"))


@cells()
def test_gradient_accumulation(tmp_path, route):
    "Two batches of 4 make the step of one batch of 8: as many steps, the same gradient."
    found = []
    for batch_size, accumulate in ((4, 2), (8, 1)):
        note = Note()
        run = trainer(tmp_path, note, max_epochs=2, accumulate_grad_batches=accumulate)
        run.fit(route.build(), *loaders(batch_size=batch_size))
        assert run.global_step == len(note.grads) == 6 and len(note.losses) == 6 * accumulate
        found.append(note.grads[0])
    assert_same(found[0], found[1], rtol=1e-3, atol=1e-6)
    assert max(float(g.abs().max()) for g in found[0].values()) > 1e-3


def check_precision(root: Path, route: Route, precision: str, device: str,
                    dtype: torch.dtype) -> None:
    "Layers compute in `dtype`, weights stay float32, the loss is finite and falls."
    seen, model, note = set(), route.build(), Note()
    layer = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))][1]
    def look(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        seen.add((torch.is_autocast_enabled(device), torch.get_autocast_dtype(device),
                  output.dtype, module.weight.dtype))
    layer.register_forward_hook(look)
    kind = "gpu" if device == "cuda" else "cpu"
    run = AutoTrainer(**quiet(root, callbacks=[note], max_epochs=6, precision=precision,
                              num_sanity_val_steps=0) | {"accelerator": kind})
    run.fit(model, *loaders())
    assert seen == {(True, dtype, dtype, torch.float32)}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert (all(map(math.isfinite, note.losses))
            and sum(note.losses[-3:]) < 0.7 * sum(note.losses[:3]))
    assert run.test(model, loaders()[1], verbose=False)[0]["test/accuracy"] > 0.8


@cells()
def test_bf16_mixed_precision(tmp_path, route):
    check_precision(tmp_path, route, "bf16-mixed", "cpu", torch.bfloat16)


@pytest.mark.skipif(not torch.cuda.is_available(),
                    reason="fp16 needs a GPU, and there is none here")
@cells()
def test_fp16_mixed_precision_on_a_gpu(tmp_path, route):
    check_precision(tmp_path, route, "16-mixed", "cuda", torch.float16)


@cells()
def test_validation_and_testing(tmp_path, route):
    """The numbers are those of a hand-written loop; testing takes the best epoch unless told
    otherwise."""
    model = route.build()
    run = trainer(tmp_path, Spoil(2))
    train, val = loaders()
    run.fit(model, train, val)
    spoilt, best = by_hand(model, val), min(o["val/loss"] for o in run.history)
    assert (run.validate(model, val, verbose=False)[0]
            == pytest.approx({f"val/{k}": v for k, v in spoilt.items()}, rel=1e-4))
    assert (run.test(model, val, ckpt_path=None, verbose=False)[0]
            == pytest.approx({f"test/{k}": v for k, v in spoilt.items()}, rel=1e-4))
    found = run.test(model, val, ckpt_path="best", verbose=False)[0]
    assert found["test/loss"] == pytest.approx(best, rel=1e-4) and best < spoilt["loss"]
    assert run.test(model, val, verbose=False)[0] == found          # without a word, the best
    x = val.dataset.tensors[0]
    predicted = torch.cat(run.predict(model, val))
    torch.testing.assert_close(predicted, logits_of(model, x).softmax(-1), rtol=1e-4, atol=1e-5)


@cells()
def test_image_data_module(tmp_path, tiny_folder, route):
    """Folders of images: a native model gives its own preprocessing and takes the class names, a
    user's gets ImageNet's."""
    seen: list[torch.Tensor] = []
    class Look(pl.Callback):
        def on_test_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
            seen.append(batch[0])
    model = route.build()
    data = ImageDataModule(tiny_folder, batch_size=6, num_workers=0,
                           image_size=None if route.native else SIZE)
    run = trainer(tmp_path, Look(), max_epochs=2)
    run.fit(model, datamodule=data)
    found = run.test(model, datamodule=data, verbose=False)[0]
    assert set(found) == {"test/loss", "test/accuracy"} and math.isfinite(found["test/loss"])
    assert len(run.history) == 2 and run.global_step == 6
    if route.native:
        assert model.class_names == data.class_names and data.data_config == model.data_config
        assert route.load(run.best_model_path).class_names == data.class_names
    else: assert data.data_config["mean"] == IMAGENET_DATA_CONFIG["mean"]
    wanted = (model.get_transform() if route.native
              else eval_pipeline({**IMAGENET_DATA_CONFIG, "input_size": (3, SIZE, SIZE)}))
    from PIL import Image
    files = sorted((tiny_folder / "test").rglob("*.png"))
    torch.testing.assert_close(torch.cat(seen), torch.stack([wanted(Image.open(o)) for o in files]),
                               rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def mlflow_uri(tmp_path_factory):
    "One MLflow store, since making its tables takes seconds."
    pytest.importorskip("mlflow")
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/runs.db"


@cells()
def test_logger_manager_with_several_loggers(tmp_path, monkeypatch, mlflow_uri, route):
    "TensorBoard, CSV, W&B offline and MLflow at once: each holds the same last values."
    for name in ("tensorboard", "wandb"): pytest.importorskip(name)
    from mlflow import MlflowClient
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    manager = LoggerManager([
        LoggerConfig("tensorboard", {"save_dir": str(tmp_path / "tb")}),
        LoggerConfig("csv", {"save_dir": str(tmp_path / "csv")}),
        LoggerConfig("wandb", {"project": "routes", "save_dir": str(tmp_path), "offline": True}),
        LoggerConfig("mlflow", {"experiment_name": route.name, "tracking_uri": mlflow_uri,
                                "artifact_location": str(tmp_path / "art")})])
    run = trainer(tmp_path, max_epochs=2, logger=manager, log_every_n_steps=1)
    assert run.loggers == manager.loggers
    board_of_weights = manager.get_logger_by_backend("wandb").experiment
    try:
        run.fit(route.build(), *loaders())
        summary = dict(board_of_weights.summary)
    finally: board_of_weights.finish()
    wanted = {k: run.history[-1][k] for k in ("train/loss", "val/loss", "val/accuracy")}
    board = EventAccumulator(manager.get_logger_by_backend("tensorboard").log_dir).Reload()
    assert {k: board.Scalars(k)[-1].value for k in wanted} == pytest.approx(wanted, rel=1e-5)
    lines = [o.split(",") for o in (Path(manager.get_logger_by_backend("csv").log_dir)
                                    / "metrics.csv").read_text().splitlines()]
    column = {k: [o[lines[0].index(k)] for o in lines[1:] if o[lines[0].index(k)]] for k in wanted}
    assert {k: float(v[-1]) for k, v in column.items()} == pytest.approx(wanted, rel=1e-5)
    stored = MlflowClient(mlflow_uri).get_run(manager.get_logger_by_backend("mlflow").run_id)
    assert {k: stored.data.metrics[k] for k in wanted} == pytest.approx(wanted, rel=1e-5)
    assert {k: summary[k] for k in wanted} == pytest.approx(wanted, rel=1e-5)
    assert list(tmp_path.rglob("offline-run-*/*.wandb"))


@cells()
def test_tuner_config_for_rate_and_size(tmp_path, tiny_folder, route):
    """Both are found, set and used, for a user's module as it is; training then is that of a run
    that was told both."""
    def data(size: int) -> dict:
        if route.native:
            return dict(datamodule=ImageDataModule(tiny_folder, batch_size=size, num_workers=0))
        torch.manual_seed(0)
        return dict(zip(("train_dataloaders", "val_dataloaders"), loaders(18, size, shuffle=True)))
    config = TunerConfig(auto_lr=True, auto_batch_size=True,
                         lr_find_kwargs=dict(num_training=12, min_lr=1e-5, max_lr=0.5),
                         batch_size_kwargs=dict(init_val=4, max_val=6, steps_per_trial=1))
    note, model, given = Note(), route.build(), data(3)
    before = weights(model)
    run = trainer(tmp_path / "searched", note, max_epochs=2, seed=0, tuner_config=config)
    run.fit(model, **given)
    assert_same(note.start, before)
    rate, size = run.tuning.lr, run.tuning.batch_size
    assert size.suggestion == 6 and set(note.sizes) == {6} and run.global_step == 6
    assert 1e-5 <= rate.suggestion <= 0.5 and len(rate.lrs) == len(rate.losses) > 3
    assert (note.rates[0] == pytest.approx(rate.rates)
            and max(rate.rates) == pytest.approx(rate.suggestion))
    if route.native:
        assert model.lr == pytest.approx(rate.suggestion) and given["datamodule"].batch_size == 6
    # Their ratio is kept
    else: assert rate.rates[1] == pytest.approx(4 * rate.rates[0]) and not hasattr(model, "lr")
    told = route.build()
    trainer(tmp_path / "told", Rates(rate.rates), max_epochs=2, seed=0).fit(told, **data(6))
    assert_same(weights(told), weights(model), rtol=1e-4, atol=1e-6)


@cells()
def test_resume_equals_the_unbroken_run(tmp_path, route):
    """Killed in its third epoch and gone on with from the last: bit for bit the unbroken run,
    shuffled data and dropout included."""
    def run(root: str, *callbacks: pl.Callback, seed: int = 0,
            ckpt_path: str | None = None) -> tuple[AutoTrainer, nn.Module]:
        model = route.build(seed, dropout=0.2)
        one = trainer(tmp_path / root, *callbacks, max_epochs=4, seed=seed)
        one.fit(model, *loaders(shuffle=True), ckpt_path=ckpt_path)
        return one, model
    whole, wanted = run("whole")
    with pytest.raises(Killed): run("parts", Kill(2))
    note = Note()
    parts, model = run("parts", note, seed=7, ckpt_path="last")
    assert len(note.losses) == 6 and parts.global_step == whole.global_step == 12
    assert_same(weights(model), weights(wanted))
    assert parts.history == whole.history


def test_resuming_from_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="last"):
        trainer(tmp_path).fit(ROUTES["hub-timm"].build(), *loaders(), ckpt_path="last")


@pytest.fixture(scope="module")
def two_processes(tiny_hub, tmp_path_factory):
    "What each of two processes comes to, with each route in turn."
    root = tmp_path_factory.mktemp("ddp")
    return (root, in_two_processes(root, [o.name for o in ROUTES.values()
                                          if HAS_TRANSFORMERS or not o.needs_transformers]))


@cells()
def test_two_process_ddp(two_processes, route):
    """Both ranks end with the same weights, which are those of one process; metrics are over both;
    one folder is written."""
    root, found = two_processes
    ranks, one = found[route.name], in_one_process(root, route.name)
    assert [(o["rank"], o["world_size"], o["steps"])
            for o in ranks] == [(0, 2, 4), (1, 2, 4)] and one["steps"] == 4
    assert_same(ranks[0]["weights"], ranks[1]["weights"])
    assert_same(ranks[0]["weights"], one["weights"], rtol=1e-3, atol=1e-5)
    for o in ranks:
        assert o["metrics"] == pytest.approx(one["metrics"], rel=1e-3, abs=1e-5)
        assert [r["epoch"] for r in o["history"]] == [0, 1, 2,
                                                      3] and o["history"] == ranks[0]["history"]
    assert ranks[0]["best"] == ranks[1]["best"] and Path(ranks[0]["best"]).exists()
    files = sorted(re.sub("epoch=.*", "", o.name) for o in Path(ranks[0]["best"]).parent.iterdir())
    assert files == ["best-", "last.ckpt"]
    assert_same(weights(route.load(ranks[0]["last"])), ranks[0]["weights"])


def test_fp16_on_a_cpu_becomes_bf16(tmp_path):
    "The overview's `precision='16-mixed'` also runs where there is no GPU."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = trainer(tmp_path, max_epochs=1, precision="16-mixed")
        run.fit(ROUTES["hub-timm"].build(), *loaders())
    assert run.precision == "bf16-mixed" and math.isfinite(run.history[0]["train/loss"])


ROWS = {"Basic Training": test_basic_training, "Checkpointing": test_checkpointing,
        "Early Stopping": test_early_stopping,
        "Multiple Callbacks": test_multiple_callbacks,
        "Gradient Accumulation": test_gradient_accumulation,
        "Mixed Precision": test_bf16_mixed_precision,
        "Validation/Testing": test_validation_and_testing,
        "ImageDataModule": test_image_data_module,
        "LoggerManager": test_logger_manager_with_several_loggers,
        "TunerConfig": test_tuner_config_for_rate_and_size,
        "PyTorch Lightning": test_basic_training, "Training/Val/Test": test_validation_and_testing,
        "Distributed (DDP)": test_two_process_ddp}


@pytest.mark.skipif(not OVERVIEW.exists(), reason="the overview does not stand beside this "
                                                  "checkout")
def test_every_row_of_the_overview_has_its_cells():
    """Each feature that the overview ticks for all three of its approaches is run here for them and
    for `backbone=`."""
    text = OVERVIEW.read_text()
    ticked = re.findall(r"^\| \*\*([^*]+)\*\* \| ✅[^|]*\| ✅[^|]*\| ✅[^|]*\|$", text, flags=re.M)
    assert len(ticked) >= 14 and set(ticked) <= set(ROWS), set(ticked) - set(ROWS)
    assert len(ROUTES) == 4 and CLASSES == 3
    for test in ROWS.values():
        mark = next(o for o in test.pytestmark if o.name == "parametrize")
        assert {o.name for o in mark.args[1]} >= set(ROUTES)
