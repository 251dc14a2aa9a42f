"""What the package promises as a package: layout, lazy names, wheel, settings, the order of the
notebooks."""
import ast
import configparser
import importlib
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import autotimm

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "autotimm"


def python(code: str, **env: str) -> str:
    "What a fresh interpreter prints."
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env={**os.environ, **env}, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_is_light():
    "`import autotimm` pulls in no heavy library and takes under 0.15 s."
    heavy = ["torch", "timm", "transformers", "pytorch_lightning", "matplotlib", "numpy"]
    assert python(f"import sys, autotimm; print([m for m in {heavy} if m in sys.modules])") == "[]"
    timed = "import time; t=time.perf_counter(); import autotimm; print(time.perf_counter()-t)"
    assert min(float(python(timed)) for _ in range(3)) < 0.15


def stub(path: Path) -> dict[str, str]:
    "Public name -> the module that it comes from, as the stub of a package says."
    return {a.asname or a.name: f"{'.'.join(path.relative_to(ROOT).parent.parts)}.{n.module}"
            for n in ast.parse(path.read_text()).body
            if isinstance(n, ast.ImportFrom) and n.module for a in n.names}


STUBS = sorted(PACKAGE.rglob("__init__.pyi"))


@pytest.mark.parametrize("path", STUBS, ids=lambda o: o.parent.name)
def test_the_stub_of_a_package_is_what_it_holds(path):
    """Type checkers, `__all__`, `dir` and what is imported at use agree, and each name comes from
    where it is defined."""
    package = importlib.import_module(".".join(path.relative_to(ROOT).parent.parts))
    names = stub(path)
    assert names and sorted(names) == sorted(package.__all__)
    for name, place in names.items():
        assert getattr(package, name) is getattr(importlib.import_module(place),
                                                 name) and name in dir(package)
        assert getattr(getattr(package, name), "__module__",
                       place) == place, f"{name} is defined elsewhere"


NAMES = """
    ASPP AnnotationError AutoTimmCLI AutoTrainer Backbone BackboneConfig BadImageError
    CSPDarknet CSVDetectionDataset CSVImageDataset CSVInstanceDataset Calibration
    CenternessLoss ClassificationHead ClassificationResult CombinedSegmentationLoss
    DeepLabV3PlusHead DetectionDataModule DetectionHead DetectionResult DiceLoss ExportError
    FCNHead FCOSLoss FPN FPNHead FeatureBackboneConfig FocalLoss FocalLossPixelwise GIoULoss
    HubError ImageClassifier ImageDataModule InstanceSegmentationDataModule
    InstanceSegmentor LoggerConfig LoggerManager LoggingConfig MaskHead MaskLoss
    MetricConfig MetricManager MissingExtraError ModelSource MultiLabelImageDataModule
    MultiLabelImageDataset ObjectDetector OnnxModel PAFPN Result Results
    SegmentationDataModule SegmentationResult SemanticSegmentor TransformConfig TunerConfig
    TverskyLoss UPerNetHead VisionTask YOLOX YOLOXDetector YOLOXHead YOLOXLoss build_yolox
    count_parameters create_app create_backbone create_feature_backbone
    create_inference_transform export_checkpoint_to_onnx export_checkpoint_to_torchscript
    export_program export_to_onnx export_to_torchscript get_feature_channels
    get_feature_info get_feature_strides get_model_source get_transforms_from_backbone
    get_yolox_model_info list_backbones list_hf_hub_backbones list_losses list_optimizers
    list_schedulers list_transform_presets list_yolox_backbones list_yolox_heads
    list_yolox_models list_yolox_necks load_official_yolox load_onnx load_pretrained
    load_program load_torchscript push_to_hub quantize_onnx resolve_backbone_data_config
    save_pretrained seed_everything validate_onnx_export validate_torchscript_export
""".split()


def test_no_public_name_is_lost():
    "What users import from `autotimm`; a name may be added here, and none goes."
    assert sorted(autotimm.__all__) == NAMES


def test_each_package_has_a_stub():
    assert [o.parent for o in STUBS] == sorted(o.parent for o in PACKAGE.rglob("__init__.py"))


MODULES = """backbones boxes core data export head heads hub loggers loss losses metric metrics metrics_module optim
             prediction report results serve task tasks testing trainer viz yolox""".split()


@pytest.mark.parametrize("name", sorted(stub(PACKAGE / "__init__.pyi")) + MODULES)
def test_every_public_name_resolves(name):
    assert getattr(autotimm, name) is not None
    if name not in ("head", "loss", "metric", "metrics_module", "task"):
        assert name in dir(autotimm)


def test_aliases_are_the_same_module():
    assert autotimm.loss is autotimm.losses and autotimm.metric is autotimm.metrics_module
    assert autotimm.head is autotimm.heads and autotimm.task is autotimm.tasks
    with pytest.raises(AttributeError, match="no_such_name"): autotimm.no_such_name  # noqa: B018


def test_testing_exports_the_names_of_its_modules():
    "`from autotimm.testing import ...` worked for all of these when it was one module."
    names = """BUILTIN_FORMATS FAULTS HubContent HubFault HubRepo LocalHub SHAPE_NAMES ShapeScene accept_builtin blob_id
               make_shapes mask_to_polygons mask_to_rle write_boxes_csv write_builtin write_cifar10 write_coco write_csv
               write_folders write_masks write_multilabel_csv write_voc write_yolo"""
    assert sorted(autotimm.testing.__all__) == sorted(names.split())
    for name in names.split(): assert getattr(autotimm.testing, name) is not None


def test_settings_are_the_one_source():
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini")
    settings, project = parser["DEFAULT"], tomllib.loads((ROOT / "pyproject.toml").read_text())
    nbdev = project["tool"]["nbdev"]
    for key in ("lib_path", "nbs_path", "doc_path", "readme_nb", "title", "branch"):
        assert settings[key] == nbdev[key]
    for key in ("put_version_in_init", "custom_sidebar", "recursive", "clean_ids",
                "clear_all", "jupyter_hooks"):
        assert settings.getboolean(key) == nbdev[key]
    assert settings["tst_flags"].split() == nbdev["tst_flags"]
    assert project["project"]["name"] == settings["lib_name"]
    assert project["project"]["requires-python"] == f">={settings['min_python']}"
    urls = {"Repository": settings["git_url"],
            "Documentation": settings["doc_host"] + settings["doc_baseurl"]}
    assert project["project"]["urls"] == urls
    assert autotimm.__version__ == settings["version"]


def numbers() -> dict[str, int]:
    "Module -> number of its notebook."
    found = {}
    for notebook in sorted((ROOT / "nbs").glob("[0-9][0-9][0-9]_*.ipynb")):
        exported = re.search(r"#\| default_exp ([\w.]+)", notebook.read_text())
        assert exported, f"{notebook.name} exports no module"
        found[f"autotimm.{exported[1]}"] = int(notebook.name[:3])
    return found


def imported(module: str) -> list[str]:
    """Modules of this package that a module imports, inside functions too; nbdev writes them as
    relative imports."""
    found = []
    for node in ast.walk(ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text())):
        if isinstance(node, ast.Import): found += [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not any(a.name == "*" for a in node.names), f"{module}: star import"
            package = module.split(".")[:-node.level] if node.level else []
            found.append(".".join([*package, *([node.module] if node.module else [])]))
    return [name for name in found if name.split(".")[0] == "autotimm"]


def test_a_module_imports_only_lower_numbers():
    order = numbers()
    for module, number in order.items():
        for name in imported(module):
            assert name in order, f"{module} imports {name}, which no numbered notebook exports"
            assert order[name] < number, f"{module} ({number}) imports {name} ({order[name]})"


def private_imports(path: Path) -> list[str]:
    """Names with an underscore that a file takes from another module of this package, by import or
    as an attribute of a module."""
    tree, modules, found = ast.parse(path.read_text()), set(), []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.level
                                                 or str(node.module).split(".")[0] == "autotimm"):
            found += [f"{path.name}:{node.lineno} {a.name}" for a in node.names
                      if a.name.startswith("_")]
            modules |= {a.asname or a.name for a in node.names}
        elif isinstance(node, ast.Import):
            modules |= {a.asname or a.name for a in node.names
                        if a.name.split(".")[0] == "autotimm"}
    for node in ast.walk(tree):
        if (not isinstance(node, ast.Attribute) or not node.attr.startswith("_")
            or node.attr.startswith("__")):
            continue
        if ast.unparse(node.value) in modules:
            found.append(f"{path.name}:{node.lineno} {ast.unparse(node)}")
    return found


def test_no_module_takes_private_names_of_another(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("from .hub import _fetch\nfrom autotimm import hub, _x\nimport autotimm.core as "
                   "core\nhub._find, core._y, core.__name__\n")
    assert [o.split()[1] for o in private_imports(bad)] == ["_fetch", "_x", "hub._find", "core._y"]
    assert [o for path in PACKAGE.rglob("*.py") for o in private_imports(path)] == []


def test_every_module_comes_from_a_notebook():
    known = set(numbers())
    for path in PACKAGE.rglob("*.py"):
        if path.name in ("__init__.py", "_modidx.py"): continue
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        assert module in known, f"{module} has no notebook"


def test_nothing_catches_everything():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler):
                names = [n.id for n in ast.walk(node.type)
                         if isinstance(n, ast.Name)] if node.type else [""]
                assert not {"", "Exception",
                            "BaseException"} & set(names), f"{path.name}:{node.lineno}"


def test_the_wheel_holds_every_module(tmp_path):
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation",
                    "-q", "-w", tmp_path, ROOT],
                   check=True, capture_output=True)
    wheel, = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = ({str(p.relative_to(ROOT)) for p in PACKAGE.rglob("*.py")}
              | {str(p.relative_to(ROOT)) for p in STUBS} | {"autotimm/py.typed"})
    assert wanted <= held


@pytest.mark.parametrize("extra", ["transformers", "datasets", "tensorboard", "wandb",
                                   "mlflow", "detection",
                                   "albumentations", "onnx", "pandas", "cli", "serve",
                                   "demo", "dev", "all"])
def test_extras_are_declared(extra):
    from importlib.metadata import metadata
    assert extra in metadata("autotimm").get_all("Provides-Extra")
