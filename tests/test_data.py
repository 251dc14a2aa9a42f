"""What no notebook can hold of the data modules: Lightning around them, worker processes, real
files, missing networks."""
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DistributedSampler

import autotimm.data.images as images
from autotimm.data.datamodule import ImageDataModule, MultiLabelImageDataModule
from autotimm.data.image_loader import ImageLoader
from autotimm.data.datasets import CSVImageDataset
from autotimm.data.images import BadImageError
from autotimm.data.transforms import eval_pipeline
from autotimm.testing import (LocalHub, accept_builtin, write_cifar10, write_csv,
                              write_folders, write_multilabel_csv)

ANTS_BEES = Path(__file__).parents[2] / "shared" / "data" / "ants_bees"
pytestmark = [pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
              pytest.mark.filterwarnings("ignore:.*number of training batches.*smaller than the "
                                         "logging.*")]


class Linear(pl.LightningModule):
    """A user's own module, without a data config, that notes what it is given."""
    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.layer, self.seen, self.validated = torch.nn.Linear(3, num_classes), [], 0

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.seen.append(y.tolist())
        return F.cross_entropy(self.layer(x.mean((2, 3))), y)

    def validation_step(self, batch, batch_idx): self.validated += len(batch[1])
    def test_step(self, batch, batch_idx): self.validated += len(batch[1])
    def configure_optimizers(self): return torch.optim.SGD(self.parameters(), lr=0.1)


def make_trainer(**kwargs):
    options = dict(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
                   enable_progress_bar=False,
                   enable_model_summary=False, num_sanity_val_steps=0)
    return pl.Trainer(**{**options, **kwargs})


def make_folder(root, **counts):
    for name, n in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(n):
            Image.new("RGB", (16, 16), (9 * i % 256, 80, 160)).save(root / name / f"{i:03}.png")
    return root


def test_fit_validate_test_and_the_same_split(tmp_path):
    write_folders(tmp_path, splits=dict(train=24, test=6))
    data, model = ImageDataModule(tmp_path, image_size=32, batch_size=8, num_workers=0,
                                  val_split=0.25), Linear()
    trainer = make_trainer()
    trainer.fit(model, datamodule=data)
    held = [s.name for s in data.val_dataset.samples]
    assert sum(map(len, model.seen)) == 18 and model.validated == 6
    trainer.validate(model, datamodule=data, verbose=False)
    trainer.test(model, datamodule=data, verbose=False)
    assert model.validated == 18 and [s.name for s in data.val_dataset.samples] == held
    assert [s.name for s in ImageDataModule(tmp_path, val_split=0.25).splits.val] == held


def test_no_validation_data_trains(tmp_path):
    data, model = ImageDataModule(make_folder(tmp_path, ant=4), image_size=16, val_split=0,
                                  num_workers=0), Linear()
    make_trainer().fit(model, datamodule=data)
    assert len(model.seen) == 1 and model.validated == 0
    with pytest.raises(RuntimeError, match="no test data"):
        make_trainer().test(model, datamodule=data)


def test_default_size_without_a_data_config_is_said(tmp_path, caplog):
    make_folder(tmp_path, ant=3, bee=3)
    data = ImageDataModule(tmp_path, num_workers=0, val_split=0)
    with caplog.at_level("INFO"):
        make_trainer().fit(Linear(), datamodule=data)
        make_trainer().fit(Linear(), datamodule=data)
    assert data.train_dataset[0][0].shape == (3, 224, 224)
    assert sum("ImageNet's values" in r.message for r in caplog.records) == 1


def test_two_models_in_turn_each_with_its_own(tmp_path):
    make_folder(tmp_path, ant=4, bee=4)
    data = ImageDataModule(tmp_path, num_workers=0)
    sizes = []
    for size in (32, 48):
        model = Linear()
        model.data_config = dict(input_size=(3, size, size), mean=(0.5,) * 3, std=(0.5,
                                 ) * 3, interpolation="bilinear", crop_pct=1.0)
        make_trainer().fit(model, datamodule=data)
        sizes.append((data.train_dataset[0][0].shape[-1], data.val_dataset[0][0].shape[-1],
                      data.data_config["mean"]))
    assert sizes == [(32, 32, (0.5,) * 3), (48, 48, (0.5,) * 3)]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_bad_images_keep_the_epoch_and_its_validation(tmp_path, workers):
    make_folder(tmp_path / "train", ant=3, bee=3), make_folder(tmp_path / "val", ant=3)
    for path in ("train/ant/000.png", "train/bee/001.png", "val/ant/000.png"):
        (tmp_path / path).write_bytes(b"")
    data = ImageDataModule(tmp_path, image_size=16, batch_size=1, num_workers=workers,
                           on_bad_image="report")
    model = Linear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(max_epochs=2).fit(model, datamodule=data)
    assert len(model.seen) == 12 and model.validated == 4
    assert ({k: [Path(o).name for o in v] for k, v in data.bad_images.items()}
            == {"train": data_names(data, "train"), "val": ["000.png"]})
    assert sorted(data_names(data, "train")) == ["000.png", "001.png"]
    assert sum("left out of the train data" in str(w.message) for w in caught) <= 2
    assert "left out as unreadable" in str(data.summary())


def data_names(data, split): return [Path(o).name for o in data.bad_images[split]]


def test_skip_names_each_image_once(tmp_path):
    make_folder(tmp_path, ant=4)
    (tmp_path / "ant" / "002.png").write_bytes((tmp_path / "ant" / "001.png").read_bytes()[:50])
    data = ImageDataModule(tmp_path, image_size=16, val_split=0, num_workers=1, on_bad_image="skip")
    with pytest.warns(UserWarning, match="002.png: image file is truncated") as caught:
        for _ in range(2): assert [len(x) for x, _ in data.train_dataloader()] == [3]
    assert len(caught) == 1


def test_raise_in_a_worker_names_the_file(tmp_path):
    make_folder(tmp_path, ant=2)
    (tmp_path / "ant" / "001.png").write_text("no image")
    data = ImageDataModule(tmp_path, image_size=16, val_split=0, num_workers=1)
    with pytest.raises(BadImageError, match="001.png"): list(data.train_dataloader())


def test_a_truncated_jpeg_is_never_padded(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (200, 200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.jpg")
    data = (tmp_path / "a.jpg").read_bytes()
    for share in (0.3, 0.6, 0.9, 0.99):
        with pytest.raises(BadImageError): images.decode_image(data[:int(len(data) * share)])


def test_lightning_replaces_the_sampler_and_keeps_the_loader(tmp_path, monkeypatch):
    make_folder(tmp_path, ant=5, bee=5)
    for balanced in (False, True):
        data = ImageDataModule(tmp_path, image_size=16, batch_size=5, val_split=0,
                               num_workers=0, on_bad_image="skip", balanced_sampling=balanced)
        trainer = make_trainer()
        monkeypatch.setattr(type(trainer._accelerator_connector), "is_distributed",
                            property(lambda self: True))
        monkeypatch.setattr(pl.Trainer, "distributed_sampler_kwargs",
                            property(lambda self: dict(num_replicas=2, rank=0)))
        monkeypatch.setattr(pl.Trainer, "world_size", property(lambda self: 2))
        from pytorch_lightning.trainer.connectors.data_connector import (
            _DataLoaderSource, _request_dataloader)
        data.trainer, trainer.datamodule = trainer, data
        data.setup()
        for source in (data.train_dataloader(),
                       _request_dataloader(_DataLoaderSource(data, "train_dataloader"))):
            loader = trainer._data_connector._prepare_dataloader(source, shuffle=not balanced,
                                                                 mode="fit")
            assert type(loader) is ImageLoader and isinstance(loader.sampler, DistributedSampler)
            assert loader.collate_fn is source.collate_fn and loader.dataset is data.train_dataset
            assert sum(len(y) for _, y in loader) == 5


def test_checkpoints_hold_no_path(tmp_path):
    make_folder(tmp_path / "private-folder", ant=2, bee=2)
    data, trainer = ImageDataModule(tmp_path / "private-folder", image_size=16,
                                    num_workers=0), make_trainer()
    trainer.fit(Linear(), datamodule=data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert b"private-folder" not in (tmp_path / "a.ckpt").read_bytes()


def test_modules_and_loaders_are_picklable(tmp_path):
    write_multilabel_csv(tmp_path, splits=dict(train=6))
    several = MultiLabelImageDataModule(tmp_path / "train.csv", tmp_path / "images",
                                        image_size=16, num_workers=0)
    several.setup()
    copy = pickle.loads(pickle.dumps(several))
    assert next(iter(copy.train_dataloader()))[1].shape[1] == 3


@pytest.mark.timeout(120)
def test_workers_augment_differently_and_by_the_seed(tmp_path):
    make_folder(tmp_path, ant=8)
    for backend in ("torchvision", "albumentations"):
        if backend == "albumentations": pytest.importorskip("albumentations")
        noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        for path in (tmp_path / "ant").iterdir(): Image.fromarray(noise).save(path)
        data = ImageDataModule(tmp_path, image_size=16, batch_size=4, val_split=0,
                               num_workers=2, transform_backend=backend)
        epochs = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            epochs.append(torch.cat([x for x, _ in data.train_dataloader()]))
        assert torch.equal(epochs[0], epochs[1]) and not torch.equal(epochs[0], epochs[2])
        assert len({o.sum().item() for o in epochs[0]}) >= 7


@pytest.mark.parametrize("options", [dict(dataset_name="CIFAR10"), dict()])
def test_cifar10_in_its_own_files(tmp_path, options):
    write_cifar10(tmp_path, n=50, n_test=20)
    with accept_builtin(tmp_path):
        data = ImageDataModule(tmp_path, **options, image_size=32, batch_size=8, num_workers=0)
        data.prepare_data()
        data.setup()
        assert data.num_classes == 10 and data.class_names[0] == "airplane"
        assert ([len(o) for o in (data.train_dataset, data.val_dataset, data.test_dataset)]
                == [45, 5, 20])
        assert next(iter(data.test_dataloader()))[0].shape == (8, 3, 32, 32)


def test_a_download_without_network_says_so(tmp_path, monkeypatch):
    import torchvision.datasets.utils as utils
    def refuse(*args, **kwargs): raise URLError("no network")
    monkeypatch.setattr(utils.urllib.request, "urlopen", refuse)
    data = ImageDataModule(tmp_path, dataset_name="MNIST")
    with pytest.raises(RuntimeError, match="MNIST could not be downloaded"): data.prepare_data()
    with pytest.raises(RuntimeError, match=r"Call prepare_data\(\)"): data.setup()


def test_hugging_face_data_by_its_id(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features({"image": datasets.Image(),
                                  "label": datasets.ClassLabel(names=["bee", "ant"])})
    rows = {"image": [Image.new("RGB", (8, 8))] * 4, "label": [0, 1, 0, 1]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "rows.parquet")
    with LocalHub() as hub:
        hub.add_files("datasets/org/insects",
                      {"data/train-00000-of-00001.parquet": (tmp_path
                                                             / "rows.parquet").read_bytes()})
        data = ImageDataModule(hf_dataset="org/insects", image_size=8, num_workers=0)
        data.prepare_data()
        assert (data.class_names == ["bee", "ant"]
                and {s.target for s in data.splits.train} == {0, 1} and len(data.splits.val) == 1)
        with pytest.raises(ValueError, match="'org/nothing' cannot be loaded"):
            ImageDataModule(hf_dataset="org/nothing").setup()


def test_class_map_and_unknown_classes(tmp_path):
    write_csv(tmp_path, splits=dict(train=9, val=9))
    (tmp_path / "val.csv").write_text("image,label\n0010.png,square\n0011.png,hexagon\n")
    options = dict(train_csv=tmp_path / "train.csv", image_dir=tmp_path / "images")
    with pytest.raises(ValueError, match="the training data lacks: 'hexagon'"):
        ImageDataModule(val_csv=tmp_path / "val.csv", **options).setup()
    (tmp_path / "val.csv").write_text("image,label\n0010.png,square\n")
    data = ImageDataModule(val_csv=tmp_path / "val.csv", **options)
    assert data.splits.val[0].target == data.class_names.index("square") == 1
    assert CSVImageDataset(tmp_path / "train.csv", tmp_path / "images").classes == data.class_names


def test_no_optional_library_is_imported():
    code = ("import sys, autotimm.data.datamodule.images, autotimm.data.datamodule.objects, "
            "autotimm.viz; "
            "print([m for m in ('pandas', 'datasets', 'albumentations', 'cv2', 'sklearn') if m in "
            "sys.modules])")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          check=True).stdout == "[]\n"


def test_fork_and_spawn(tmp_path):
    data = ImageDataModule(make_folder(tmp_path, ant=4), image_size=16, val_split=0, num_workers=1)
    data.setup()
    loader = ImageLoader(data.train_dataset, batch_size=2, num_workers=1,
                         collate_fn=data.train_dataloader().collate_fn,
                         multiprocessing_context="spawn")
    assert [len(x) for x, _ in loader] == [2, 2]


@pytest.mark.skipif(not ANTS_BEES.is_dir(), reason="the photographs of ants and bees are not there")
def test_real_photographs():
    data = ImageDataModule(ANTS_BEES, image_size=96, batch_size=16, num_workers=0)
    counts = data.class_counts()
    assert (data.class_names == ["ants", "bees"] and set(counts) == {"train", "val"}
            and min(counts["val"].values()) > 50)
    data.setup()
    x, y = next(iter(data.val_dataloader()))
    assert x.shape == (16, 3, 96, 96) and -3 < x.mean() < 3
    from timm.data import create_transform
    config = dict(input_size=(3, 224, 224), mean=(0.0,) * 3, std=(1.0,) * 3,
                  interpolation="bicubic", crop_pct=0.9)
    ours, theirs = eval_pipeline(config), create_transform(**config)
    for sample in data.splits.val[::20]:
        image = images.load_image(sample.image)
        with Image.open(sample.image) as photo: wanted = theirs(photo.convert("RGB"))
        # Decoders differ by a level or two, and so does resizing.
        assert ((ours(image) - wanted).abs() * 255).quantile(0.999) <= 3
