"""examples/cluster: what can be run here is run, the rest is held against its schema."""
import ast
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pytorch_lightning.plugins.environments import SLURMEnvironment
from two_hosts import Host, two_hosts, why_not

HERE = Path(__file__).parent
CLUSTER = HERE.parent / "examples" / "cluster"
NO_HOSTS = why_not()
on_hosts = pytest.mark.skipif(NO_HOSTS is not None, reason=str(NO_HOSTS))
TINY = ["--backbone", "test_resnet", "--no-pretrained", "--image-size", "32", "--epochs",
        "2", "--batch-size", "8", "--workers", "0",
        "--accelerator", "cpu"]


def load(name: str) -> Any:
    "A script of examples/cluster as a module."
    spec = importlib.util.spec_from_file_location(f"cluster_{name}", CLUSTER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def train(): return load("train")


# ---- the files ----

@pytest.mark.parametrize("name", ["torchrun.sh", "slurm.sbatch"])
def test_the_shell_can_read_it(name):
    assert not subprocess.run(["bash", "-n", str(CLUSTER / name)], capture_output=True,
                              text=True).stderr


def usage(name: str) -> list[list[str]]:
    """The command lines in the comment at the top of a file, from their first option that is
    train.py's."""
    top = (CLUSTER / name).read_text().split("set -euo")[0].split("name:")[0]
    lines = re.findall(r"^#\s{3,}(\S.*?)(?:\s+#.*)?$", top, re.M)
    return [shlex.split(line[line.index("--data"):]) for line in lines if "--data" in line]


@pytest.mark.parametrize("name", ["torchrun.sh", "slurm.sbatch"])
def test_its_example_is_understood_by_the_script(train, name):
    lines = usage(name)
    assert lines
    for line in lines: assert train.parse(line).data == "/shared/flowers"


def test_the_launcher_says_how_many_there_are(train):
    assert train.layout({}) == {}
    assert (train.layout({"TORCHELASTIC_RUN_ID": "job", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"})
            == {"num_nodes": 2, "devices": 4})
    assert (train.layout({"SLURM_NNODES": "3", "SLURM_NTASKS_PER_NODE": "2", "WORLD_SIZE": "1"})
            == {"num_nodes": 3, "devices": 2})


def test_a_batch_that_cannot_be_shared_out_is_refused(train, tmp_path, tiny_folder):
    args = train.parse(["--data", str(tiny_folder), "--output", str(tmp_path), *TINY,
                        "--batch-size", "9"])
    with pytest.raises(ValueError, match="--batch-size 9 cannot be shared out among 2 processes"):
        train.build(args, devices=2, strategy="ddp", enable_progress_bar=False)


SBATCH = {"job-name": r"\w+", "nodes": r"\d+", "ntasks-per-node": r"\d+", "gpus-per-node": r"\d+",
          "cpus-per-task": r"\d+",
          "time": r"\d+:\d\d:\d\d", "requeue": "", "open-mode": "append|truncate",
          "output": r"\S+", "signal": r"(B:)?SIG\w+@\d+"}


def test_the_directives_are_slurms():
    lines = re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", (CLUSTER / "slurm.sbatch").read_text(),
                       re.M)
    assert len(lines) == (CLUSTER / "slurm.sbatch").read_text().count("#SBATCH")
    for name, value in lines: assert re.fullmatch(SBATCH[name], value), (name, value)
    said = dict(lines)
    assert said["ntasks-per-node"] == said["gpus-per-node"]
    # To the processes and not to the shell alone, which B: would mean; and the signal that
    # Lightning listens to.
    name, seconds = said["signal"].split("@")
    assert signal.Signals[name] == SLURMEnvironment().requeue_signal and int(seconds) >= 60


def keys(value: Any, at: str = "") -> set[str]:
    "The paths of all keys; lists count as their items."
    if isinstance(value, list): return set().union(*(keys(o, f"{at}[]") for o in value))
    if not isinstance(value, dict): return set()
    return set().union(*({f"{at}.{k}"} | keys(v, f"{at}.{k}") for k, v in value.items()))


POD = ".spec.runtimePatches[].trainingRuntimeSpec.template.spec.replicatedJobs[].template.spec.template.spec"
# The part of trainer.kubeflow.org/v1alpha1 that is used, of Kubeflow Trainer 2.3.
TRAIN_JOB = {".apiVersion", ".kind", ".metadata", ".metadata.name", ".spec", ".spec.runtimeRef",
             ".spec.runtimeRef.kind", ".spec.runtimeRef.name",
             ".spec.trainer", *(f".spec.trainer.{o}"
                                for o in ("image", "numNodes", "numProcPerNode", "command", "args",
                                          "env", "env[].name", "env[].value", "resourcesPerNode")),
             *(f".spec.trainer.resourcesPerNode.{o}"
               for o in ("requests", "limits", "requests.cpu", "requests.memory",
                         "limits.nvidia.com/gpu")),
             ".spec.runtimePatches", ".spec.runtimePatches[].manager",
             *(POD[:i] for i, c in enumerate(POD) if c in ".["), POD,
             ".spec.runtimePatches[].trainingRuntimeSpec.template.spec.replicatedJobs[].name",
             *(f"{POD}.{o}" for o in ("terminationGracePeriodSeconds", "volumes",
                                      "volumes[].name", "volumes[].persistentVolumeClaim",
                                      "volumes[].persistentVolumeClaim.claimName",
                                      "volumes[].emptyDir", "volumes[].emptyDir.medium",
                                      "containers",
                                      "containers[].name", "containers[].volumeMounts",
                                      "containers[].volumeMounts[].name",
                                      "containers[].volumeMounts[].mountPath"))}


@pytest.fixture(scope="module")
def train_job(): return yaml.safe_load((CLUSTER / "trainjob.yaml").read_text())


def test_the_train_job_is_kubeflows(train, train_job):
    assert (train_job["apiVersion"], train_job["kind"]) == ("trainer.kubeflow.org/v1alpha1",
                                                            "TrainJob")
    assert keys(train_job) <= TRAIN_JOB
    spec = train_job["spec"]["trainer"]
    assert str(spec["numProcPerNode"]) == spec["resourcesPerNode"]["limits"]["nvidia.com/gpu"]
    assert spec["command"][0] == "torchrun" and spec["command"][-1].endswith("/train.py")
    assert train.parse(spec["args"]).output.startswith("/shared/")
    (job,) = train_job["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    assert {o["name"] for o in pod["volumes"]} == {o["name"]
                                                   for o in pod["containers"][0]["volumeMounts"]}


def test_the_train_job_goes_through_kubeflows_own_model(train_job):
    models = pytest.importorskip("kubeflow_trainer_api.models",
                                 reason="kubeflow-trainer-api is not installed")
    again = models.TrainerV1alpha1TrainJob.from_dict(train_job)
    assert keys(json.loads(json.dumps(again.to_dict(), default=str))) >= keys(train_job)


def test_the_task_is_skypilots():
    task = yaml.safe_load((CLUSTER / "skypilot.yaml").read_text())
    assert task.keys() <= {"name", "workdir", "num_nodes", "resources", "file_mounts",
                           "setup", "run", "envs", "secrets", "volumes", "config", "service"}
    assert task["resources"].keys() <= {"accelerators", "use_spot", "job_recovery", "infra",
                                        "cpus", "memory", "disk_size", "image_id"}
    assert task["resources"]["job_recovery"].keys() <= {"strategy", "max_restarts_on_errors",
                                                        "recover_on_exit_codes"}
    for mount in task["file_mounts"].values():
        assert mount.keys() <= {"name", "source", "store", "persistent",
                                "mode"} and mount["mode"] in ("MOUNT", "COPY", "MOUNT_CACHED")
        assert re.fullmatch(r"\$\{(\w+)\}", mount["source"])[1] in task["envs"]
    known = {"SKYPILOT_NODE_IPS", "SKYPILOT_NODE_RANK", "SKYPILOT_NUM_NODES",
             "SKYPILOT_NUM_GPUS_PER_NODE"}
    assert set(re.findall(r"SKYPILOT_\w+", task["run"])) == known
    assert (CLUSTER / re.search(r"bash (\S+)", task["run"])[1]).exists()


def test_the_commands_of_skypilot_reach_torchrun(train, tmp_path):
    "The part that the machines run, with a torchrun that writes down what it is given."
    fake = tmp_path / "torchrun"
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    sky = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NODE_RANK": "1",
           "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "4"}
    done = subprocess.run(["bash", "-c",
                           yaml.safe_load((CLUSTER / "skypilot.yaml").read_text())["run"]],
                          capture_output=True, text=True, cwd=CLUSTER,
                          env={**os.environ, **sky, "PATH": f"{tmp_path}:{os.environ['PATH']}"})
    given = done.stdout.split()
    said = dict(zip(given[::2], given[1::2]))
    assert {k: said[k] for k in ("--nnodes", "--nproc-per-node", "--rdzv-endpoint",
                                 "--rdzv-conf")} == {
        "--nnodes": "2", "--nproc-per-node": "4", "--rdzv-endpoint": "10.0.0.1:29500",
        "--rdzv-conf": "is_host=0"}, done.stderr
    assert train.parse(given[given.index("./train.py") + 1:]).data == "/data"


def test_ray_starts_what_train_builds():
    """Names of ray_train.py, without Ray: what it takes of train.py is there, and what it hands on
    too."""
    tree = ast.parse((CLUSTER / "ray_train.py").read_text())
    taken = {o.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
             and node.module == "train" for o in node.names}
    assert taken == {"build", "parse"} and all(hasattr(load("train"), o) for o in taken)


# ---- jobs ----

def settings(folder: Path, **kwargs: Any) -> str:
    "A file of settings for cluster_run.py."
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "settings.json"
    path.write_text(json.dumps({"folder": str(folder), **kwargs}))
    return str(path)


def environment(**kwargs: str) -> dict[str, str]:
    "The environment of a job: one thread a process, and this package."
    return {**os.environ, "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{HERE.parent}:{os.environ.get('PYTHONPATH', '')}",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "TRAIN": str(HERE / "cluster_run.py"), **kwargs}


def in_one_process(folder: Path, data: Path, *more: str, **kwargs: Any) -> dict[str, Any]:
    "What one process comes to."
    command = [sys.executable, str(HERE / "cluster_run.py"), settings(folder, **kwargs),
               "--data", str(data), "--output", str(folder), *TINY, *more]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "result.pt", weights_only=True)


def start(hosts: tuple[Host, Host], folder: Path, data: Path, *more: str, restarts: int = 0,
          **kwargs: Any) -> list[subprocess.Popen]:
    "torchrun.sh on two hosts."
    path = settings(folder, **kwargs)
    command = [path, "--data", str(data), "--output", str(folder), *TINY, *more]
    return [host.start(["bash", str(CLUSTER / "torchrun.sh"), str(i), hosts[0].address, *command],
                       folder / f"log-{i}",
                       env=environment(PROCESSES="1", RESTARTS=str(restarts),
                                       PET_MONITOR_INTERVAL="0.5")) for i, host in enumerate(hosts)]


def ends(jobs: list[subprocess.Popen], folder: Path, seconds: float = 200) -> list[int]:
    "The exit statuses; whoever is still there when the time is over is ended."
    limit = time.monotonic() + seconds
    try: return [job.wait(timeout=max(0.1, limit - time.monotonic())) for job in jobs]
    except subprocess.TimeoutExpired:
        logs = "\n".join((folder / f"log-{i}").read_text()[-2000:] for i in range(len(jobs)))
        raise AssertionError(f"still running after {seconds} s: "
                             f"{[job.poll() for job in jobs]}\n{logs}") from None
    finally:
        for job in jobs: end(job)


def end(job: subprocess.Popen) -> None:
    "End a job with what it started."
    try: os.killpg(job.pid, signal.SIGKILL)
    except ProcessLookupError: pass
    job.wait()


def close(one: dict[str, Any], two: dict[str, Any]) -> None:
    "The curves are the same to 1e-5, and so are the weights they led to."
    assert one["losses"].keys() == two["losses"].keys()
    for step, loss in one["losses"].items(): assert abs(loss - two["losses"][step]) < 1e-5, step
    for name, weight in one["weights"].items():
        torch.testing.assert_close(weight, two["weights"][name], atol=1e-4, rtol=1e-4)


@on_hosts
@pytest.mark.timeout(400)
def test_two_hosts_train_a_users_own_loader_as_one_process(tmp_path, tiny_folder):
    "The norm of test_convnext knows nothing of the other images of a batch."
    same = ("--backbone", "test_convnext")
    one = in_one_process(tmp_path / "one", tiny_folder, *same, plain=True)
    with two_hosts() as hosts:
        assert ends(start(hosts, tmp_path / "two", tiny_folder, *same, plain=True),
                    tmp_path / "two") == [0, 0]
    two = torch.load(tmp_path / "two" / "result.pt", weights_only=True)
    assert (one["processes"], two["processes"], len(two["losses"])) == (1, 2, 12)
    close(one, two)


# ---- a process that is lost ----

def wait_for(path: Path, jobs: list[subprocess.Popen], seconds: float = 100) -> None:
    "Wait until a file is there."
    limit = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < limit and all(o.poll() is None
                                                for o in jobs), f"{path.name} never came: {[o.poll() for o in jobs]}"
        time.sleep(0.1)


def of_job(word: str) -> list[int]:
    "The processes with a word in their command line."
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        # Empty for a process that has ended and waits for its parent
        try: command = (entry / "cmdline").read_bytes()
        except OSError: continue
        if word.encode() in command: found.append(int(entry.name))
    return found


KILLED = {"send": {"rank": 1, "step": 3, "name": "SIGKILL"}}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.timeout(300)
@pytest.mark.parametrize("rank", [0, 1])
def test_with_lightnings_own_launcher_the_others_end_soon_after_a_killed_process(
    tmp_path, tiny_folder, rank):
    path = settings(tmp_path, send={"rank": rank, "step": 3, "name": "SIGKILL"},
                    trainer={"strategy": "ddp"})
    with (tmp_path / "log-0").open("w") as log:
        job = subprocess.Popen([sys.executable, str(HERE / "cluster_run.py"), path,
                                "--data", str(tiny_folder), "--output", str(tmp_path), *TINY,
                                "--epochs", "50", "--devices", "2"], env=environment(),
                               stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(tmp_path / f"sent-{rank}", [])
        started = time.monotonic()
        assert job.wait(timeout=60) != 0
        while (left := of_job(path)) and time.monotonic() - started < 60: time.sleep(0.2)
        assert not left, "a process of the job is still waiting"
    finally: end(job)
    assert re.search(r"Connection (reset|closed) by peer|terminated with code",
                     (tmp_path / "log-0").read_text())


@on_hosts
@pytest.mark.timeout(300)
def test_on_two_hosts_the_job_ends_soon_after_a_killed_process(tmp_path, tiny_folder):
    with two_hosts() as hosts:
        jobs = start(hosts, tmp_path, tiny_folder, "--epochs", "500", **KILLED)
        wait_for(tmp_path / "sent-1", jobs)
        assert all(ends(jobs, tmp_path, seconds=60))
    assert re.search(r"exitcode\s+: -9 .*SIGKILL", (tmp_path / "log-1").read_text())


# ---- what needs trainer and data to be exact from any step ----

@on_hosts
@pytest.mark.timeout(500)
def test_two_hosts_train_images_from_a_folder_as_one_process(tmp_path, tiny_folder):
    "Order and augmentation are those of one process, for each image."
    same = ("--backbone", "test_convnext", "--batch-size", "6")
    one = in_one_process(tmp_path / "one", tiny_folder, *same)
    with two_hosts() as hosts:
        assert ends(start(hosts, tmp_path / "two", tiny_folder, *same), tmp_path / "two") == [0, 0]
    two = torch.load(tmp_path / "two" / "result.pt", weights_only=True)
    assert (one["processes"], two["processes"], len(two["losses"])) == (1, 2, 6)
    close(one, two)


@on_hosts
@pytest.mark.timeout(600)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_job_that_torchrun_starts_again_ends_in_the_weights_of_an_unbroken_one(
    tmp_path, tiny_folder, rank):
    "Killed inside the second epoch, at step 5 of 6."
    same, often = ("--backbone", "test_resnet", "--batch-size",
                   "6"), {"trainer": {"checkpoint_interval": 1}}
    with two_hosts() as hosts:
        assert ends(start(hosts, tmp_path / "whole", tiny_folder, *same, **often),
                    tmp_path / "whole") == [0, 0]
        broken = start(hosts, tmp_path / "broken", tiny_folder, *same, restarts=1,
                       send={"rank": rank, "step": 5, "name": "SIGKILL"}, **often)
        assert ends(broken, tmp_path / "broken") == [0, 0]
    whole, broken = (torch.load(tmp_path / o / "result.pt", weights_only=True)
                     for o in ("whole", "broken"))
    assert min(broken["losses"]) >= 4, "it began anew"
    assert all(torch.equal(o, broken["weights"][name]) for name, o in whole["weights"].items())


@pytest.mark.timeout(900)
def test_ray_trains_with_two_processes(tmp_path, tiny_folder):
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'autotimm[ray]'")
    command = [sys.executable, str(CLUSTER / "ray_train.py"), "--processes", "2", "--data",
               str(tiny_folder), "--output", str(tmp_path), *TINY]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    (metrics,) = re.findall(r"^\{.*'step'.*\}$", done.stdout, re.M)
    assert ({"train/loss", "val/loss", "val/accuracy"} <= ast.literal_eval(metrics).keys()
            and ast.literal_eval(metrics)["epoch"] == 1)
    (last,) = tmp_path.glob("checkpoints/version_*/last.ckpt")
    assert torch.load(last, weights_only=True)["epoch"] in (1, 2)
