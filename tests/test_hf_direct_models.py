"""transformers' own classes, no Auto class: in a user's own module and as `backbone=`, with
`AutoTrainer`."""
import math

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hf_routes import (CLASSES, ROUTES, SIZE, TINY, VIT_ID, DirectModule, Note, UserModule,
                       assert_same, classifier, loaders,
                       logits_of, make_set, quiet, weights)
from torch import nn
from torch.nn import functional as F

from autotimm import AutoTrainer, ImageClassifier, ModelSource

transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
              pytest.mark.filterwarnings("ignore:.*smaller than the logging interval.*"),
              pytest.mark.filterwarnings("ignore:.*LeafSpec.*")]

STAGES = dict(depths=[1, 1, 1], num_channels=3)
FAMILIES = {
    "ViT": TINY, "DeiT": TINY, "Beit": TINY, "Dinov2": {k: v for k, v in TINY.items()
                                                        if k != "intermediate_size"},
    "Swin": dict(image_size=SIZE, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 2],
                 window_size=4),
    "ConvNext": dict(image_size=SIZE, patch_size=2, num_stages=3, hidden_sizes=[16, 24, 32],
                     **STAGES),
    "ResNet": dict(embedding_size=16, hidden_sizes=[16, 24, 32], layer_type="basic", **STAGES),
}
families = pytest.mark.parametrize("family", FAMILIES)


def config_of(family: str, **more):
    return getattr(transformers, f"{family}Config")(**{**FAMILIES[family], **more})


def model_of(family: str, seed: int = 0, **more):
    torch.manual_seed(seed)
    return getattr(transformers, f"{family}Model")(config_of(family, **more))


def pooled(output, pooling: str) -> torch.Tensor:
    """The library's own pooled output; the class token, as timm's ViTs have it, where the pooler is
    a layer of its own."""
    return output.last_hidden_state[:, 0] if pooling == "cls" else output.pooler_output.flatten(1)


def without_pooler(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v for k, v in state.items() if not k.startswith("pooler.dense")}


class FamilyModule(UserModule):
    "A user's module around any of the classes; its hyperparameters rebuild it."

    def __init__(self, family: str, width: int) -> None:
        super().__init__(model_of(family), width, dropout=0.0, sgd=False)
        self.save_hyperparameters()

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.vit(pixel_values=pixel_values).pooler_output.flatten(1))


def trainer(root, *callbacks: pl.Callback, **kwargs) -> AutoTrainer:
    return AutoTrainer(**quiet(root, callbacks=list(callbacks),
                               **{"max_epochs": 3, "num_sanity_val_steps": 0, **kwargs}))


@families
def test_class_in_a_users_own_module(tmp_path, family):
    """It trains with `AutoTrainer`, and the checkpoint rebuilds it by its hyperparameters, weights
    only."""
    width = (FAMILIES[family].get("hidden_size")
             or model_of(family)(pixel_values=torch.zeros(1, 3, SIZE, SIZE)).pooler_output.numel())
    model, note = FamilyModule(family, width), Note()
    run = trainer(tmp_path, note, max_epochs=5)
    run.fit(model, *loaders())
    assert (sum(note.losses[-3:]) < 0.9 * sum(note.losses[:3])
            and all(map(math.isfinite, note.losses)))
    again = FamilyModule.load_from_checkpoint(run.last_model_path, weights_only=True)
    x = make_set(4, seed=4).tensors[0]
    assert torch.equal(logits_of(again, x), logits_of(model, x))
    assert type(again.vit).__name__ == f"{family}Model"


@families
def test_config_as_backbone(tmp_path, family):
    """A config is a fresh backbone whose pooled output is the library's; the checkpoint alone
    rebuilds model and config."""
    torch.manual_seed(0)
    model, note = classifier(config_of(family)), Note()
    assert (model.backbone.source is ModelSource.TRANSFORMERS
            and model.backbone.name == f"{family}Config")
    x = make_set(4, seed=4).tensors[0]
    own = model.backbone.model
    with torch.no_grad():
        wanted = pooled(own.eval()(pixel_values=x), model.hparams["backbone"]["pooling"])
    torch.testing.assert_close(logits_of(model.backbone, x), wanted)
    run = trainer(tmp_path, note, max_epochs=5)
    run.fit(model.train(), *loaders())
    assert sum(note.losses[-3:]) < 0.9 * sum(note.losses[:3])
    # A parameter that gets no gradient would stop distributed training.
    assert set(note.grads[0]) == {n for n, p in model.named_parameters() if p.requires_grad}
    again = ImageClassifier.load_from_checkpoint(run.last_model_path)
    assert torch.equal(logits_of(again, x), logits_of(model, x))
    assert type(again.backbone.model) is type(own)
    for name, value in FAMILIES[family].items():
        assert getattr(again.backbone.model.config, name) == value


@families
def test_model_as_backbone_trains_as_in_a_users_module(tmp_path, family):
    """The same weights, by `backbone=` and in a module of one's own, are the same after training:
    nothing is in between."""
    mine = model_of(family, seed=3)
    torch.manual_seed(0)
    task = classifier(model_of(family, seed=3), sgd=True)
    own = UserModule(mine, task.backbone.num_features, dropout=0.0, sgd=True)
    own.classifier.load_state_dict(task.head.fc.state_dict())
    own.forward = lambda x: own.classifier(pooled(own.vit(pixel_values=x),
                                                  task.hparams["backbone"]["pooling"]))
    start = weights(task.backbone.model)
    assert_same(start, without_pooler(weights(mine)))
    # One seed for both: stochastic depth drops the same paths.
    for name, model in (("task", task), ("own", own)):
        trainer(tmp_path / name, max_epochs=2, seed=0).fit(model, *loaders())
    assert_same(weights(task.backbone.model), without_pooler(weights(own.vit)), rtol=1e-4,
                atol=1e-6)
    assert_same(weights(task.head.fc), weights(own.classifier), rtol=1e-4, atol=1e-6)
    assert any(not torch.equal(v, start[k]) for k, v in weights(task.backbone.model).items())


def test_no_auto_class_is_needed(tmp_path, monkeypatch):
    """In a user's module, as a model for `backbone=`, and back from the checkpoints of both: no
    Auto class is called."""
    def refuse(*args, **kwargs): raise AssertionError("an Auto class was called")
    for name in ("AutoModel", "AutoConfig", "AutoImageProcessor", "AutoBackbone",
                 "AutoModelForImageClassification"):
        for method in ("from_pretrained", "from_config"):
            if hasattr(getattr(transformers, name), method):
                monkeypatch.setattr(getattr(transformers, name), method, refuse)
    x = make_set(4, seed=4).tensors[0]
    for i, model in enumerate((DirectModule(), classifier(model_of("ViT")),
                               classifier(model_of("Swin")))):
        run = trainer(tmp_path / str(i), max_epochs=1)
        run.fit(model, *loaders())
        again = type(model).load_from_checkpoint(run.last_model_path)
        assert torch.equal(logits_of(again, x), logits_of(model, x))


def test_specific_and_auto_classes_load_the_same(tiny_hub):
    """ViTModel and AutoModel, ViTImageProcessor and AutoImageProcessor, and `backbone=`: the same
    weights, the same pixels."""
    from PIL import Image
    direct, auto = (transformers.ViTModel.from_pretrained(VIT_ID),
                    transformers.AutoModel.from_pretrained(VIT_ID))
    task = classifier(VIT_ID)
    assert type(auto) is type(direct) is type(task.backbone.model)
    assert_same(weights(direct), weights(auto))
    assert_same(without_pooler(weights(direct)), weights(task.backbone.model))
    processors = [o.from_pretrained(VIT_ID) for o in (transformers.ViTImageProcessor,
                                                      transformers.AutoImageProcessor)]
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3),
                                                              dtype=np.uint8))
    ours = task.preprocess(image)
    for o in processors:
        torch.testing.assert_close(o(image, return_tensors="pt")["pixel_values"], ours,
                                   rtol=1e-4, atol=1e-4)
    assert task.data_config["mean"] == tuple(processors[0].image_mean)


def test_model_type_at_run_time(tmp_path, tiny_hub):
    """Auto classes for quick trials: the repository says which class, and each trains in the same
    module."""
    tiny_hub.add_transformers("tester/tiny-beit", config_of("Beit"))
    found = []
    for i, name in enumerate((VIT_ID, "tester/tiny-beit")):
        net = transformers.AutoModel.from_pretrained(name).train()
        model = UserModule(net, net.config.hidden_size, dropout=0.0, sgd=False)
        run = trainer(tmp_path / str(i), max_epochs=1)
        run.fit(model, *loaders())
        found.append(type(net).__name__)
        assert math.isfinite(run.history[-1]["val/loss"])
    assert found == ["ViTModel", "BeitModel"]


def test_hyperparameters_of_a_users_module(tmp_path):
    """`save_hyperparameters` without arguments, as in the overview: in the checkpoint as given, and
    back from it."""
    model = DirectModule(hidden_size=16, dropout=0.1)
    run = trainer(tmp_path, max_epochs=1)
    run.fit(model, *loaders())
    stored = torch.load(run.best_model_path, weights_only=True)
    assert stored["hyper_parameters"] == dict(hidden_size=16, dropout=0.1, sgd=False)
    again = DirectModule.load_from_checkpoint(run.best_model_path, dropout=0.3)
    assert again.vit.config.hidden_size == 16 and again.dropout.p == 0.3
    with pytest.raises(RuntimeError, match="size mismatch"):
        DirectModule.load_from_checkpoint(run.best_model_path, hidden_size=32)


def test_a_module_that_is_handed_its_network(tmp_path):
    """`save_hyperparameters(ignore='net')`: the network is passed again when loading, as Lightning
    has it."""
    class Handed(UserModule):
        def __init__(self, net: nn.Module, width: int = 32) -> None:
            super().__init__(net, width, dropout=0.0, sgd=False)
            self.save_hyperparameters(ignore="net")
    model, run = Handed(model_of("ViT")), trainer(tmp_path, max_epochs=1)
    run.fit(model, *loaders())
    again = Handed.load_from_checkpoint(run.best_model_path, net=model_of("ViT", seed=9))
    assert_same(weights(again), weights(model))


def test_classification_class_with_its_own_loss(tmp_path):
    """`ViTForImageClassification` computes logits and loss itself; the task's loss on the same
    model is the same number."""
    class Whole(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = transformers.ViTForImageClassification(config_of("ViT", num_labels=CLASSES))
        def training_step(self, batch, batch_idx):
            out = self.net(pixel_values=batch[0], labels=batch[1])
            torch.testing.assert_close(out.loss, F.cross_entropy(out.logits, batch[1]))
            self.log("train/loss", out.loss)
            return out.loss
        def configure_optimizers(self): return torch.optim.AdamW(self.parameters(), lr=2e-3)
    note, run = Note(), trainer(tmp_path, max_epochs=5)
    run.callbacks.append(note)
    run.fit(Whole(), loaders()[0])
    assert sum(note.losses[-3:]) < 0.9 * sum(note.losses[:3])
    assert run.best_model_path == run.last_model_path  # no val/loss: the last is the best there is


@pytest.mark.parametrize("family, more", [("ViT", dict(hidden_dropout_prob=0.25)),
                                          ("Beit", dict(drop_path_rate=0.2)),
                                          ("Swin", dict(drop_path_rate=0.2)),
                                          ("Dinov2", dict(drop_path_rate=0.2))])
def test_explicit_settings_are_honoured(family, more):
    "What a config states is in the network, in training only, and in the checkpoint's recipe."
    model = classifier(config_of(family, **more))
    name, value = next(iter(more.items()))
    assert getattr(model.backbone.model.config, name) == value
    assert model.hparams["backbone"]["config"][name] == value
    x = make_set(8, seed=4).tensors[0]
    model.train()
    with torch.no_grad(): assert not torch.equal(model(x), model(x))
    assert torch.equal(logits_of(model, x), logits_of(model, x))


@pytest.mark.parametrize("family", ["ViT", "DeiT", "Dinov2", "Swin", "ConvNext"])
def test_another_size_and_number_of_channels(family, tmp_path):
    "`image_size` and `in_chans` reach the network and the preprocessing; it still trains."
    size = 48
    torch.manual_seed(0)
    model = ImageClassifier(config_of(family), CLASSES, image_size=size, in_chans=1)
    assert model.data_config["input_size"] == (1, size,
                                               size) and len(model.data_config["mean"]) == 1
    x = make_set(6, size=size).tensors[0][:, :1]
    y = torch.arange(6) % CLASSES
    run = trainer(tmp_path, max_epochs=1, checkpoint_monitor=None)
    run.fit(model, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=3))
    again = ImageClassifier.load_from_checkpoint(run.last_model_path)
    assert torch.equal(logits_of(again, x), logits_of(model, x))


def test_weights_of_a_model_are_kept_and_go_back(tmp_path, tiny_hub):
    "A pretrained instance starts with its weights; after training transformers reads them again."
    net = transformers.ViTModel.from_pretrained(VIT_ID)
    model = classifier(net)
    assert_same(weights(model.backbone.model),
                without_pooler(weights(transformers.ViTModel.from_pretrained(VIT_ID))))
    assert net.pooler is not None                   # the user's own object is as it was
    trainer(tmp_path, max_epochs=1).fit(model, *loaders())
    model.backbone.model.save_pretrained(tmp_path / "folder")
    assert_same(without_pooler(weights(transformers.ViTModel.from_pretrained(tmp_path / "folder"))),
                weights(model.backbone.model))
    again = classifier(str(tmp_path / "folder"))
    assert_same(weights(again.backbone.model), weights(model.backbone.model))


def test_frozen_backbone_and_layer_decay(tmp_path):
    """What a task offers holds for transformers too: a frozen backbone stays, lower layers learn
    slower."""
    frozen = classifier(config_of("ViT", hidden_dropout_prob=0.5), freeze_backbone=True)
    before = weights(frozen.backbone)
    x = make_set(4, seed=4).tensors[0]
    with torch.no_grad(): assert torch.equal(frozen.train()(x), frozen(x))          # dropout is off
    trainer(tmp_path, max_epochs=1).fit(frozen, *loaders())
    assert_same(weights(frozen.backbone), before)
    model, note = classifier(config_of("ViT"), layer_decay=0.5), Note()
    run = trainer(tmp_path, note, max_epochs=1)
    run.fit(model, *loaders())
    rate = {id(p): g["lr"] for g in run.optimizers[0].param_groups for p in g["params"]}
    groups = model.backbone.layer_groups()
    params = dict(model.backbone.named_parameters())
    rates = [{rate[id(params[n])] for n in g if params[n].requires_grad} for g in groups]
    flat = [next(iter(o)) for o in rates]
    assert (all(len(o) == 1 for o in rates) and flat == sorted(flat)
            and len(set(flat)) == len(flat) >= 4)
    assert rate[id(model.head.fc.weight)] == pytest.approx(2e-3) and flat[0] < 2e-3 / 8


def test_gradient_checkpointing(tmp_path):
    "The library's own: the same gradients for less memory."
    found = []
    for on in (False, True):
        torch.manual_seed(0)
        model, note = classifier(config_of("ViT"), grad_checkpointing=on), Note()
        assert any(getattr(m, "gradient_checkpointing", False)
                   for m in model.backbone.modules()) == on
        trainer(tmp_path / str(on), note, max_epochs=1,
                limit_train_batches=1).fit(model, loaders()[0])
        found.append(note.grads[0])
    assert_same(found[0], found[1], rtol=1e-4, atol=1e-6)


def test_both_libraries_in_one_project(tmp_path, tiny_hub):
    "One trainer fits all four routes in turn, each in full and in a folder of its own."
    run, folders = trainer(tmp_path, max_epochs=2), []
    for route in ROUTES.values():
        model = route.build()
        run.fit(model, *loaders())
        assert run.global_step == 6 and len(run.history) == 2 and run.current_epoch == 2
        assert_same(weights(route.load(run.last_model_path)), weights(model))
        folders.append(run.run_folder)
    assert len(set(folders)) == 4 and all((o / "last.ckpt").exists() for o in folders)


def test_what_cannot_be_a_backbone_says_so():
    """A class in place of its config, a text model, a size the network cannot run: clear errors
    before any training."""
    with pytest.raises(TypeError, match="backbone must be"): classifier(transformers.ViTConfig)
    with pytest.raises((ValueError, TypeError)):
        classifier(transformers.BertConfig(hidden_size=16, num_hidden_layers=1,
                                           num_attention_heads=2))
    with pytest.raises(ValueError, match="Swin|window"):
        ImageClassifier(config_of("Swin"), CLASSES, image_size=5)
