"""What several test modules share: the tiny repositories, a tiny folder of images, the routes."""
import os
import signal
import sys

import pytest

# Processes that share the machine share its processors; what they start inherits this.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

# A shell that starts a job in the background has it ignore Ctrl-C, which what is tested must hear.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Lightning reads it when it is imported; runs of tests go to stores of their own.
os.environ.pop("MLFLOW_TRACKING_URI", None)

pytest.register_assert_rewrite("hf_routes")


@pytest.fixture(autouse=True)
def loggers_leave_nothing():
    """A W&B run belongs to the process, and MLflow names its store in the environment: the next
    test would go on there."""
    yield
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    if (wandb := sys.modules.get("wandb")) and wandb.run is not None: wandb.finish()


@pytest.fixture(scope="session")
def tiny_repositories():
    "A closed LocalHub that holds the tiny models of all routes; they are made once."
    from hf_routes import fill

    from autotimm.testing import LocalHub
    return fill(LocalHub())


@pytest.fixture(scope="module")
def tiny_hub(tiny_repositories):
    "The same, open for the tests of one module: other modules find the clients as they were."
    with tiny_repositories as hub: yield hub


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    "Images of three shapes in train, val and test folders."
    from autotimm.testing import write_folders
    return write_folders(tmp_path_factory.mktemp("shapes"), splits=dict(train=18, val=6, test=9),
                         image_size=32, max_objects=1)
