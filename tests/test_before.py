"""What a version before wrote is read by this one: checkpoints, model folders, YAML files, run
folders and command lines.

The files stand in tests/before, beside the script that wrote them on 2026-11-30.
"""
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from before.make import CLASSES, EPOCHS, MODELS, QUIET, STEPS, answers, data_of, photos

from autotimm.cli import build_parser, main
from autotimm.hub import load_pretrained
from autotimm.tasks import ImageClassifier, ObjectDetector
from autotimm.testing import write_coco, write_masks, write_multilabel_csv
from autotimm.trainer import AutoTrainer

BEFORE = Path(__file__).parent / "before"
EXPECTED = json.loads((BEFORE / "expected.json").read_text())
CHECKPOINTS = [(name, when) for name in MODELS for when in ("epoch", "step")]


def assert_said(model, name: str, expected: list[float]) -> None:
    assert answers(model, name) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name, when", CHECKPOINTS)
def test_a_checkpoint_loads_to_the_same_outputs(name, when):
    cls = ImageClassifier if name == "classifier" else MODELS[name]
    assert_said(cls.load_from_checkpoint(BEFORE / f"{name}_{when}.ckpt"), name,
                EXPECTED[name]["answers"][when])


@pytest.mark.parametrize("name, when", CHECKPOINTS)
def test_a_checkpoint_is_trained_to_the_end(name, when, tmp_path):
    """After two epochs of four, or two batches later: as many steps as an unbroken run, its rates,
    and one history."""
    trainer, model = AutoTrainer(EPOCHS, default_root_dir=str(tmp_path), seed=0,
                                 **QUIET), MODELS[name]()
    trainer.fit(model, **data_of(name, tmp_path), ckpt_path=BEFORE / f"{name}_{when}.ckpt")
    assert (trainer.current_epoch, trainer.global_step) == (EPOCHS, EPOCHS * STEPS)
    whole = EXPECTED[name]["history"]
    assert [(o["epoch"], o["step"]) for o in trainer.history] == [(o["epoch"], o["step"])
                                                                  for o in whole]
    assert trainer.history[:2] == whole[:2] and trainer.history[2].keys() == whole[2].keys()
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(EXPECTED[name]["lr"],
                                                                        abs=1e-9)
    assert Path(trainer.last_model_path).is_file() and Path(trainer.best_model_path).is_file()


@pytest.mark.parametrize("name, cls", [("folder", ImageClassifier), ("detector", ObjectDetector),
                                       ("run", ImageClassifier)])
def test_a_model_folder_loads_to_the_same_outputs(name, cls):
    folder = BEFORE / (name if name != "run" else "run/model")
    model = load_pretrained(folder)
    assert type(model) is cls and model.class_names == CLASSES
    assert_said(model, name, EXPECTED[name]["answers"])
    assert_said(cls.from_pretrained(folder), name, EXPECTED[name]["answers"])


def test_a_model_folder_predicts_and_loads_in_timm_and_transformers(tmp_path):
    images = sorted((photos(tmp_path) / "test").rglob("*.png"))
    found = ImageClassifier.from_pretrained(BEFORE / "folder").predict(images)
    assert len(found) == 6 and {o.label for o in found} <= set(CLASSES)
    import timm
    assert_said(timm.create_model(f"local-dir:{BEFORE / 'folder'}", pretrained=True),
                "folder", EXPECTED["folder"]["answers"])
    from transformers import AutoModelForImageClassification
    model = AutoModelForImageClassification.from_pretrained(BEFORE / "folder")
    assert list(model.config.id2label.values()) == CLASSES


@pytest.fixture
def here(tmp_path, monkeypatch):
    "A folder to work in: photos, and the run folder as it was."
    photos(tmp_path)
    shutil.copytree(BEFORE / "run", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_folder_goes_on(here):
    assert main(["fit", "--resume", "run", "--epochs", "3"]) == 0
    rows = json.loads(Path("run/history.json").read_text())
    assert [(o["epoch"], o["step"]) for o in rows] == [(0, 4), (1, 8), (2, 12)]
    assert rows[:2] == json.loads((BEFORE / "run/history.json").read_text())


def test_a_saved_configuration_starts_a_new_run(here):
    assert main(["fit", "--config", "run/config.yaml", "--out", "again"]) == 0
    assert len(json.loads(Path("again/history.json").read_text())) == 2
    before, after = (yaml.safe_load(Path(o, "config.yaml").read_text()) for o in ("run", "again"))
    for part in ("trainer", "model", "data"):
        assert {k: after[part][k] for k in before[part]} == before[part], part


@pytest.mark.parametrize("path", sorted((BEFORE / "examples").glob("*.yaml")), ids=lambda o: o.stem)
def test_a_yaml_file_is_read_as_it_was(path, capsys):
    "Each value that the file states arrives; test_cli.py trains with today's files."
    with pytest.raises(SystemExit) as e: main(["fit", "--config", str(path), "--print_config"])
    assert e.value.code == 0
    printed, stated = yaml.safe_load(capsys.readouterr().out), yaml.safe_load(path.read_text())
    for part in ("trainer", "data"):
        assert {k: printed[part][k] for k in stated[part]} == stated[part]
    plain = {k: v for k, v in stated["model"].items() if not isinstance(v, (dict, list))
             and k not in ("class_path", "backbone")}
    assert {k: printed["model"][k] for k in plain} == plain


@pytest.mark.parametrize("name", ["autotimm.BackboneConfig", "autotimm.backbones.BackboneConfig"])
def test_a_class_path_of_a_yaml_file_is_understood(name, tmp_path, capsys):
    "`autotimm.backbones` was one module when such files were written."
    backbone = {"class_path": name, "init_args": {"model_name": "test_vit", "pretrained": False}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"task": "classification",
                                                       "model": {"backbone": backbone},
                                                       "data": {"data_dir": "photos"}}))
    with pytest.raises(SystemExit) as e:
        main(["fit", "--config", str(tmp_path / "run.yaml"), "--print_config"])
    assert e.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)["model"]["backbone"]
    assert (printed["class_path"].endswith(".BackboneConfig")
            and printed["init_args"].items() >= backbone["init_args"].items())


def lines(part: str) -> list[str]:
    "The command lines of a part of commands.txt."
    text = (BEFORE / "commands.txt").read_text()
    found = re.search(rf"^# {part}\b.*\n((?:.+\n)+)", text, re.MULTILINE)
    assert found, part
    return found[1].splitlines()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    "A data set of each kind, and the examples as they were."
    root = photos(tmp_path_factory.mktemp("data")).parent
    write_multilabel_csv(root / "tags", splits=dict(train=6, val=3), image_size=24)
    write_masks(root / "masks", splits=dict(train=2, val=1), image_size=24)
    write_coco(root / "coco", splits=dict(train2017=2, val2017=1), image_size=24)
    shutil.copytree(BEFORE / "examples", root / "examples")
    return root


@pytest.mark.parametrize("line", lines("fit"))
def test_a_line_that_trains_is_understood(line, data, monkeypatch, capsys):
    monkeypatch.chdir(data)
    with pytest.raises(SystemExit) as e: main([*shlex.split(line)[1:], "--print_config"])
    assert e.value.code == 0, capsys.readouterr().err


@pytest.mark.parametrize("line", lines("parse"))
def test_a_line_is_understood(line):
    words = shlex.split(line)[1:]
    assert build_parser().parse_args(words).verb == words[0]


def test_lines_on_a_run_do_what_they_say(here, capsys):
    for line in lines("run"):
        assert main(shlex.split(line)[1:]) == 0, f"{line}\n{capsys.readouterr().err}"
    for name in ("found.csv", "found.json", "first.png", "measured.json", "folder/config.json",
                 "back.ckpt"):
        assert Path(name).stat().st_size, name
