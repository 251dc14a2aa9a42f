"""The command line: every verb, every example file, run folders, errors in one line, exit codes."""
import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from autotimm.cli import main

EXAMPLES = Path(__file__).parents[1] / "examples"
TINY = "--workers 0 --epochs 1 --trainer.accelerator cpu --trainer.enable_progress_bar false --trainer.enable_model_summary false".split()
SMALL = ["--backbone", "test_resnet", "--no-pretrained", "--image-size", "32", *TINY]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder to work in, with a data set of each kind."
    from autotimm.testing import write_coco, write_folders, write_masks, write_multilabel_csv
    root = tmp_path_factory.mktemp("cli")
    write_folders(root / "photos", splits=dict(train=18, val=6, test=6), image_size=32,
                  max_objects=1)
    write_multilabel_csv(root / "tags", splits=dict(train=12, val=6, test=6), image_size=32)
    write_masks(root / "masks", splits=dict(train=4, val=3), image_size=64)
    write_coco(root / "coco", splits=dict(train2017=4, val2017=3), image_size=64)
    return root


@pytest.fixture
def here(place, monkeypatch):
    "The same, as the current folder."
    monkeypatch.chdir(place)
    return place


@pytest.fixture(scope="module")
def run(place):
    "A run of two epochs on photos."
    before = os.getcwd()
    os.chdir(place)
    try:
        assert (main(["fit", "--data", "photos", "--out", "runs/first", *SMALL, "--epochs", "2"])
                == 0)
    finally: os.chdir(before)
    return place / "runs/first"


def test_a_run_folder_says_all_about_a_run(run, here):
    there = {o.relative_to(run).as_posix() for o in run.rglob("*") if o.is_file()}
    assert {"config.yaml", "run.json", "history.csv", "history.json", "curves.png",
            "report.html", "model/config.json",
            "model/model.safetensors", "checkpoints/version_0/last.ckpt"} <= there
    noted = json.loads((run / "run.json").read_text())
    assert ((run / noted["best"]).is_file() and set(noted["metrics"])
            == {"val/loss", "val/accuracy", "test/loss", "test/accuracy"})
    rows = list(csv.DictReader((run / "history.csv").open()))
    assert [o["epoch"] for o in rows] == ["0", "1"]
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["data"]["data_dir"] == "photos"
            and config["model"]["backbone"] == {"model_name": "test_resnet", "pretrained": False})


def test_nothing_saved_names_this_machine(run, here):
    import getpass
    import zipfile
    for path in run.rglob("*"):
        if not path.is_file(): continue
        content = path.read_bytes()
        if path.suffix == ".ckpt":
            with zipfile.ZipFile(path) as file:
                content = b"".join(file.read(o) for o in file.namelist()
                                   if not re.search(r"/data/\d+$", o))
        assert str(here).encode() not in content and os.path.expanduser(
            "~").encode() + b"/" not in content, path
        if len(getpass.getuser()) > 5: assert getpass.getuser().encode() not in content, path


def test_absolute_paths_become_portable(here):
    assert main(["fit", "--data", str(here / "photos"), "--out", "runs/absolute", *SMALL]) == 0
    assert (yaml.safe_load(Path("runs/absolute/config.yaml").read_text())["data"]["data_dir"]
            == "photos")


def test_the_saved_configuration_runs_to_the_same_result(run, here):
    assert main(["fit", "--config", str(run / "config.yaml"), "--out", "runs/again"]) == 0
    noted = [json.loads((o / "run.json").read_text())["metrics"] for o in (run, Path("runs/again"))]
    assert noted[0] == noted[1]
    states = [torch.load(next((o / "checkpoints/version_0").glob("best-*.ckpt")),
                         weights_only=True)["state_dict"] for o in (run, Path("runs/again"))]
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())


def test_the_model_folder_is_the_best_checkpoint(run, here):
    from autotimm import ImageClassifier
    from autotimm.hub import load_pretrained
    x = torch.rand(2, 3, 32, 32)
    best = ImageClassifier.load_from_checkpoint(
        run / json.loads((run / "run.json").read_text())["best"])
    torch.testing.assert_close(load_pretrained(run / "model")(x), best(x))


def test_a_run_is_not_written_over(run, here, capsys):
    before = {o: o.stat().st_mtime_ns for o in run.rglob("*")}
    assert main(["fit", "--data", "photos", "--out", "runs/first", *SMALL]) == 1
    said = capsys.readouterr().err
    assert "not overwritten" in said and "--resume runs/first" in said and "Traceback" not in said
    assert {o: o.stat().st_mtime_ns for o in run.rglob("*")} == before


def test_runs_are_numbered(here):
    for n in (1, 2):
        assert main(["fit", "--data", "photos", *SMALL, "--trainer.limit_train_batches", "1"]) == 0
        assert Path(f"runs/test_resnet-{n}/report.html").is_file()


def test_a_run_goes_on(here):
    assert main(["fit", "--data", "photos", "--out", "runs/long", *SMALL]) == 0
    assert main(["fit", "--resume", "runs/long", "--epochs", "3"]) == 0
    assert [o["epoch"] for o in json.loads(Path("runs/long/history.json").read_text())] == [0, 1, 2]
    assert yaml.safe_load(Path("runs/long/config.yaml").read_text())["trainer"]["max_epochs"] == 3
    assert main(["fit", "--resume", "runs/long"]) == 0
    assert len(json.loads(Path("runs/long/history.json").read_text())) == 3


def test_validate_and_test_of_a_run(run, here, capsys):
    noted = json.loads((run / "run.json").read_text())["metrics"]
    assert main(["test", str(run), "--json", "test.json", "--report", "test.html"]) == 0
    assert json.loads(Path("test.json").read_text()) == {k: v for k, v in noted.items()
                                                         if k.startswith("test/")}
    assert ("Confusion" in Path("test.html").read_text()
            and "test/accuracy" in capsys.readouterr().out)
    assert main(["validate", str(run), "--ckpt", "last", "--json", "val.json"]) == 0
    assert set(json.loads(Path("val.json").read_text())) == {"val/loss", "val/accuracy"}
    assert main(["test", "photos"]) == 1 and "not a run folder" in capsys.readouterr().err
    assert main(["test"]) == 1 and "needs a run folder" in capsys.readouterr().err


def test_other_classes_are_refused(run, here, capsys):
    from autotimm.testing import write_folders
    folder = write_folders("renamed", splits=dict(train=9, val=6, test=6), image_size=32,
                           max_objects=1)
    for path in folder.glob("*/circle"): path.rename(path.with_name("zebra"))
    assert main(["test", str(run), "--data", "renamed"]) == 1
    assert "trained on 3 classes (circle, square, triangle)" in capsys.readouterr().err


TRIALS = {
    "classification": ["--data", "photos", *SMALL],
    "multilabel": ["--data", "tags", *SMALL],
    "segmentation": ["--data", "masks", *SMALL, "--image-size", "32", "--batch-size", "2"],
    "detection": ["--data", "coco", *SMALL, "--image-size", "32", "--batch-size", "2",
                  "--model.fpn_channels", "16", "--model.head_num_convs", "1"],
    "yolox": ["--data", "coco", *TINY, "--backbone", "yolox-nano", "--image-size", "64",
              "--batch-size", "2", "--trainer.check_val_every_n_epoch", "1"],
    "instance_segmentation": ["--data", "coco", *SMALL, "--image-size", "32", "--batch-size",
                              "2", "--model.fpn_channels", "16", "--model.head_num_convs", "1"],
    "transformers_backbone": ["--data", "photos", *TINY],
    "own_module": ["--data", "photos", *TINY],
}


def test_every_example_has_a_trial():
    assert {o.stem for o in EXAMPLES.glob("*.yaml")} == set(TRIALS)


@pytest.mark.parametrize("name", TRIALS)
def test_example(name, here, capsys):
    out = Path("runs") / name
    assert main(["fit", "--config", str(EXAMPLES / f"{name}.yaml"), "--out", str(out),
                 *TRIALS[name]]) == 0, capsys.readouterr().err
    page = (out / "report.html").read_text()
    assert "<script" not in page and len(page) < 2e6
    metrics = json.loads((out / "run.json").read_text())["metrics"]
    assert "val/loss" in metrics
    assert (out / "model").is_dir() == (name != "own_module")
    stated = yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text())
    assert yaml.safe_load((out / "config.yaml").read_text())["task"] == stated["task"]
    if name == "own_module": return
    images = {"photos": "photos/test/circle", "tags": "tags/images", "masks": "masks/images/val",
              "coco": "coco/val2017"}[TRIALS[name][1]]
    assert main(["predict", images, "--model", str(out), "--json", f"{name}.json", "--csv",
                 f"{name}.csv", "--device", "cpu"]) == 0, capsys.readouterr().err
    assert (len(json.loads(Path(f"{name}.json").read_text())["results"])
            == len(list(Path(images).iterdir())))
    if name == "segmentation":
        assert (main(["predict", images, "--model", str(out), "--masks", "said", "--device", "cpu"])
                == 0)
        assert (sorted(o.stem for o in Path("said").iterdir())
                == sorted(o.stem for o in Path(images).iterdir()))
    if name not in ("classification", "yolox"): return
    assert main(["validate", str(out), "--json", "again.json"]) == 0
    assert (json.loads(Path("again.json").read_text())["val/loss"]
            == pytest.approx(metrics["val/loss"], rel=1e-5))


def test_reports_escape_what_the_data_says(here):
    from autotimm.testing import write_folders
    folder = write_folders("hostile", splits=dict(train=9, val=6), image_size=32, max_objects=1)
    for path in folder.glob("*/circle"): path.rename(path.with_name("<img src=x onerror=alert(1)>"))
    next(iter((folder / "val").glob("square/*"))).write_bytes(b"no image")
    assert (main(["fit", "--data", "hostile", "--out", "runs/hostile", *SMALL,
                  "--data.on_bad_image", "report"]) == 0)
    page = Path("runs/hostile/report.html").read_text()
    assert "<img src=x" not in page and "&lt;img src=x onerror=alert(1)&gt;" in page
    assert "Bad images" in page and str(here) not in page
    assert not re.search(r'(src|href)="(?!data:)', page)


def test_predict(run, here, capsys):
    Path("mixed").mkdir()
    for path in list(Path("photos/test/circle").iterdir())[:2]:
        (Path("mixed") / path.name).write_bytes(path.read_bytes())
    Path("mixed/broken.png").write_bytes(b"no image")
    assert (main(["predict", "mixed", "--model", str(run / "model"), "--csv", "out.csv",
                  "--top-k", "2", "--device", "cpu"]) == 0)
    said = capsys.readouterr()
    assert "broken.png" in said.err and "out.csv: 2 images" in said.out
    rows = list(csv.DictReader(open("out.csv")))
    assert ([o["label"] != "" for o in rows] == [True, True, False]
            and {"name", "label", "score", "label_2", "score_2"} <= set(rows[0]))
    assert main(["predict", "mixed", "--model", str(run), "--on-bad-image", "raise"]) == 1
    assert "broken.png" in capsys.readouterr().err
    checkpoint = str(run / "checkpoints/version_0/last.ckpt")
    assert (main(["predict", "photos/test/circle", "photos/test/square", "--model",
                  checkpoint, "--tta", "flip", "--plot", "out.png"]) == 0)
    assert "circle" in capsys.readouterr().out and Path("out.png").stat().st_size > 1000
    assert main(["predict", "photos/test", "--model", str(run), "--coco", "out.json"]) == 1
    assert "--coco is for detection, instance_segmentation, segmentation" in capsys.readouterr().err
    assert main(["predict", "photos/test", "--model", str(run), "--masks", "out"]) == 1
    assert "--masks is for segmentation" in capsys.readouterr().err and not Path("out").exists()


def test_export_and_predict_from_onnx(run, here, capsys):
    pytest.importorskip("onnxruntime")
    assert main(["export", str(run), "--out", "net.onnx", "--postprocess"]) == 0
    for model, file in ((str(run), "torch.csv"), ("net.onnx", "onnx.csv")):
        assert main(["predict", "photos/test/*/*", "--model", model, "--csv",
                     file]) == 0, capsys.readouterr().err
    rows = [list(csv.DictReader(open(o))) for o in ("torch.csv", "onnx.csv")]
    assert [o["label"] for o in rows[0]] == [o["label"] for o in rows[1]]
    assert main(["export", str(run), "--out", "net.pt", "--postprocess"]) == 0
    assert torch.jit.load("net.pt")(torch.zeros(1, 3, 32, 32)).sum().item() == pytest.approx(1)
    for how in ("static", "dynamic"):
        assert main(["export", str(run), "--out", f"{how}.onnx", "--int8", how, "--data",
                     "photos/test"]) == 0, capsys.readouterr().err
        assert "accuracy" in capsys.readouterr().out and Path(f"{how}.onnx").is_file()
    assert (main(["export", str(run), "--out", "net.bin"]) == 1
            and "--format" in capsys.readouterr().err)
    assert main(["export", str(run), "--out", "net.pt", "--opset", "17"]) == 1
    assert (main(["export", str(run), "--out", "int8.onnx", "--int8", "static"]) == 1
            and "--data" in capsys.readouterr().err)


def test_convert_both_ways(run, here, capsys):
    checkpoint = next((run / "checkpoints/version_0").glob("best-*.ckpt"))
    assert main(["convert", str(checkpoint), "folder"]) == 0
    assert main(["convert", "folder", "back.ckpt"]) == 0, capsys.readouterr().err
    from autotimm import ImageClassifier
    x = torch.rand(2, 3, 32, 32)
    models = [ImageClassifier.load_from_checkpoint(o) for o in (checkpoint, "back.ckpt")]
    assert (torch.equal(models[0](x), models[1](x))
            and models[0].class_names == models[1].class_names)
    assert (main(["convert", str(checkpoint), "folder"]) == 1
            and "not overwritten" in capsys.readouterr().err)
    assert main(["convert", "folder", "other"]) == 1 and ".ckpt" in capsys.readouterr().err


def test_info(run, here, capsys):
    assert main(["info", str(run)]) == 0
    said = capsys.readouterr().out
    assert ("task: classification" in said and "circle, square, triangle" in said
            and "input_size: 3, 32, 32" in said and "test/accuracy" in said)
    assert main(["info", str(run / "checkpoints/version_0/last.ckpt"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["classes"] == 3


def test_push(run, here, capsys):
    from autotimm.hub import load_pretrained
    from autotimm.testing import LocalHub
    with LocalHub(login=True):
        assert main(["push", str(run), "someone/shapes", "--private"]) == 0, capsys.readouterr().err
        assert "someone/shapes" in capsys.readouterr().out
        assert load_pretrained("someone/shapes").class_names == ["circle", "square", "triangle"]
        assert main(["info", "someone/shapes"]) == 0
    assert (main(["push", "photos", "someone/photos"]) == 1
            and "no folder that save_pretrained wrote" in capsys.readouterr().err)


def test_backbones(capsys):
    assert main(["backbones", "resnet18*", "--pretrained"]) == 0
    assert "resnet18" in capsys.readouterr().out
    assert (main(["backbones", "resnet_eighteen"]) == 1
            and "'*resnet_eighteen*'" in capsys.readouterr().err)


def test_serve_hands_the_model_on(run, here, monkeypatch):
    import autotimm.serve.app
    calls = []
    monkeypatch.setattr(autotimm.serve.app, "serve",
                        lambda model, **how: calls.append((model.class_names, how)))
    assert main(["serve", str(run), "--port", "0"]) == 0
    assert calls == [(["circle", "square", "triangle"], {"host": "127.0.0.1", "port": 0})]


WRONG = {
    "no data there": (["fit", "--data", "nowhere", "--backbone", "resnet18"], 1, "no such folder"),
    "no backbone": (["fit", "--data", "photos"], 2, "model.backbone"),
    "unknown option": (["fit", "--data", "photos", "--backbone", "resnet18", "--epoch", "1"],
                       2, "--epoch"),
    "unknown key": (["fit", "--data", "photos", "--config", "key.yaml"], 2,
                    "'data_dirr'. autotimm fit --help"),
    "unknown task": (["fit", "--task", "segmentaton", "--data", "photos", "--backbone", "resnet18"],
                     1, "Did you mean 'segmentation'"),
    "unknown backbone": (["fit", "--data", "photos", "--no-pretrained", "--backbone", "resnet81"],
                         1, "Did you mean 'resnet18'"),
    "bad value": (["fit", "--data", "photos", "--backbone", "test_resnet", "--no-pretrained",
                   "--lr", "-1"], 1, "lr must be"),
    "bad type": (["fit", "--data", "photos", "--backbone", "test_resnet", "--epochs", "many"],
                 2, "max_epochs"),
    "no such file": (["fit", "--config", "none.yaml"], 1, "no such file"),
    "two folders": (["fit", "--out", "a", "--resume", "b"], 1, "give one"),
    "nothing to resume": (["fit", "--resume", "photos"], 1, "config.yaml"),
    "no model": (["info", "photos"], 1, "photos"),
    "no checkpoint": (["predict", "photos", "--model", "none.ckpt"], 1, "no such file"),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_are_one_line(case, here, capsys):
    argv, code, text = WRONG[case]
    Path("key.yaml").write_text("data:\n  data_dirr: photos\nmodel:\n  backbone: test_resnet\n")
    assert main(argv) == code
    said = capsys.readouterr().err.strip()
    assert text in said and len(said.splitlines()) == 1 and said.startswith(f"autotimm {argv[0]}: ")


def test_a_run_that_fails_before_its_first_step_leaves_nothing(here, capsys):
    from autotimm.testing import write_folders
    folder = write_folders("damaged", splits=dict(train=6, val=3), image_size=32, max_objects=1)
    next(iter((folder / "train").glob("square/*"))).write_bytes(b"no image")
    for workers in "02":
        assert (main(["fit", "--data", "damaged", "--out", "runs/failed", *SMALL, "--workers",
                      workers]) == 1)
        said = capsys.readouterr().err.strip()
        assert "--data.on_bad_image=skip" in said and "Traceback" not in said and len(
            said.splitlines()) == 1 and not Path("runs/failed").exists(), said


def test_files_that_are_damaged_are_named(run, here, capsys):
    whole = (run / "checkpoints/version_0/last.ckpt").read_bytes()
    torch.save({"state_dict": {}}, "foreign.ckpt")
    files = {"cut.ckpt": whole[:20_000], "text.ckpt": b"hi\n", "cut.yaml": b"data: {\n",
             "binary.yaml": b"\xff\xfe\0\1"}
    for name, content in files.items(): Path(name).write_bytes(content)
    for name in ("cut.ckpt", "text.ckpt", "foreign.ckpt", "none.ckpt"):
        for argv in (["info", name], ["convert", name, "made"],
                     ["validate", str(run), "--ckpt", name]):
            assert main(argv) == 1
            said = capsys.readouterr().err.strip()
            assert name in said and len(said.splitlines()) == 1 and not Path("made").exists(), said
    for name in ("cut.yaml", "binary.yaml"):
        assert main(["fit", "--config", name]) == 1
        said = capsys.readouterr().err.strip()
        assert f"{name} is not a YAML file" in said and len(said.splitlines()) == 1


def test_nothing_predicted_is_a_failure(run, here, capsys):
    assert main(["predict", "nowhere", "--model", str(run), "--device", "cpu"]) == 1
    assert (
        "None of the images could be read. nowhere: the file does not exist." in capsys.readouterr().err)


def test_the_card_says_each_setting_once_and_names_the_data(run):
    card = (run / "model/README.md").read_text().replace("\\", "")
    assert "Trained on: photos." in card
    names = [o.split("|")[1].strip().replace("_", " ")
             for o in card[card.index("## Training"):card.index("## Classes")].splitlines()
             if o.startswith("|")]
    assert len(names) == len(set(names)) and "weight decay" in names and "epochs" in names


def test_debug_shows_the_traceback(here, capsys):
    assert main(["fit", "--data", "nowhere", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_offline_names_no_pretrained_at_once(here, monkeypatch, capsys):
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    assert main(["fit", "--data", "photos", "--backbone", "resnet10t", *TINY]) == 1
    assert time.monotonic() - start < 12
    said = capsys.readouterr().err
    assert "--no-pretrained" in said and len(said.strip().splitlines()) == 1
    assert not list(Path("runs").glob("resnet10t*"))


def test_print_config_and_help(here, capsys):
    with pytest.raises(SystemExit) as e:
        main(["fit", "--config", str(EXAMPLES / "detection.yaml"), "--print_config"])
    assert e.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["model"]["image_size"] == 640 and printed["data"]["on_problem"] == "report"
            and printed["trainer"]["max_epochs"] == 24)
    with pytest.raises(SystemExit): main(["fit", "--task", "yolox", "--help"])
    said = capsys.readouterr().out
    for option in ("--no-pretrained", "--trainer.precision", "--model.no_aug_epochs",
                   "--data.multi_scale", "--data.train_ann_file", "published size"):
        assert option in said


# Processes

def start(*argv: str, **how):
    "The command in a process of its own."
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    code = (["-c", "import sys; from autotimm.cli import main; sys.exit(main())"]
            if argv[0] != "-c" else [])
    # A shell that runs these tests in the background has them ignore Ctrl-C, and what they start
    # would too.
    return subprocess.Popen([sys.executable, *code, *argv], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, env=environment,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **how)


@pytest.mark.parametrize("argv", [["--help"], ["predict", "--help"], ["serve", "--help"]])
def test_help_answers_within_a_second_without_torch(argv):
    code = f"""
import sys
from autotimm.cli import main
try: main({argv!r})
except SystemExit as e: assert e.code == 0
heavy = sorted({{o.partition('.')[0] for o in sys.modules}} & {{'torch', 'numpy', 'timm', 'transformers', 'pytorch_lightning', 'jsonargparse', 'matplotlib'}})
assert not heavy, heavy
"""
    took = []
    for _ in range(2):
        began = time.monotonic()
        done = start("-c", code)
        out, err = done.communicate(timeout=60)
        took.append(time.monotonic() - began)
        assert done.returncode == 0 and "usage: autotimm" in out, err
    assert min(took) < 1


def test_ctrl_c_keeps_the_last_epoch(here):
    process = start("fit", "--data", "photos", "--out", "runs/stopped", *SMALL, "--epochs",
                    "10000", cwd=here)
    last = here / "runs/stopped/checkpoints/version_0/last.ckpt"
    deadline = time.monotonic() + 90
    try:
        while not last.exists() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally: process.kill()
    assert process.returncode == 130, err
    assert "autotimm fit --resume runs/stopped" in err and "Traceback" not in err
    epochs = torch.load(last, weights_only=True)["epoch"] + 1
    assert main(["fit", "--resume", "runs/stopped", "--epochs", str(epochs + 1)]) == 0
    assert ([o["epoch"] for o in json.loads((here / "runs/stopped/history.json").read_text())][-1]
            >= epochs - 1)


def test_the_entry_point_and_its_exit_codes(here):
    done = start("nonsense")
    out, err = done.communicate(timeout=60)
    assert done.returncode == 2 and "invalid choice: 'nonsense'" in err
    done = start("--version")
    assert re.match(r"\d+\.\d+", done.communicate(timeout=60)[0])
