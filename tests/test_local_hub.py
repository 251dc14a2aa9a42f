"""`LocalHub` against the real clients over HTTP, and the made-up data against readers that are not
ours."""
import contextlib
import csv
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
import torchvision
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    HfFileSystem,
    hf_hub_download,
    list_models,
    list_repo_commits,
    list_repo_files,
    model_info,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from PIL import Image
from safetensors import SafetensorError
from timm.models import push_to_hf_hub
from torchvision.ops import box_convert, masks_to_boxes

from autotimm import testing
from autotimm.testing import LocalHub, accept_builtin, make_shapes, write_builtin

# The clients speak through httpx or its successor, whichever they came with.
HTTP = sys.modules[HfHubHTTPError.__mro__[1].__module__.partition(".")[0]]
CLIENTS = ("huggingface_hub", "transformers", "timm", "datasets")


def settings() -> dict[str, object]:
    "Every plain value that the imported clients hold, and the endpoint of their ready-made client."
    found: dict[str, object] = {"api": huggingface_hub.hf_api.api.endpoint}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] not in CLIENTS: continue
        found.update({f"{name}.{k}": v for k, v in list(vars(module).items())
                      if isinstance(v, (str, Path, bool, int, type(None)))
                      and not k.startswith("__")})
    return found


def equal_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    mine, theirs = a.state_dict(), b.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


def run(code: str, **environment: str) -> str:
    "What a new Python process prints."
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          timeout=60, check=False,
                          cwd=Path(__file__).parents[1], env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


@pytest.fixture
def hub():
    with LocalHub() as hub: yield hub


@pytest.fixture
def tiny():
    transformers = pytest.importorskip("transformers")
    return transformers.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                  intermediate_size=16,
                                  image_size=32, patch_size=16)


# ---- download

def test_files_arrive_as_they_were_stored(hub):
    content = bytes(range(256)) * 40
    commit = hub.add_files("me/net", {"config.json": "{}", "a folder/ü.bin": content})
    path = Path(hf_hub_download("me/net", "a folder/ü.bin"))
    assert path.read_bytes() == content and commit in path.parts and path.is_relative_to(hub.cache)
    folder = Path(snapshot_download("me/net"))
    assert sorted(o.relative_to(folder).as_posix() for o in folder.rglob("*")
                  if o.is_file()) == ["a folder/ü.bin", "config.json"]
    asked = len(hub.requests)
    assert Path(hf_hub_download("me/net", "config.json", revision=commit)).read_text() == "{}"
    assert len(hub.requests) == asked  # a commit cannot change, so the cache answers


def test_timm_loads_the_weights_that_were_stored(hub):
    hub.add_timm("me/net", "test_resnet", num_classes=4, in_chans=1, seed=3)
    a, b = (timm.create_model("hf-hub:me/net", pretrained=True) for _ in range(2))
    assert equal_weights(a, b) and a.num_classes == 4 and a.conv1[0].in_channels == 1
    other = timm.create_model("test_resnet", num_classes=4, in_chans=1)
    assert not equal_weights(a, other)


def test_seed_of_the_weights_leaves_torchs_state_alone(hub):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    hub.add_timm("me/a", seed=1)
    assert torch.equal(torch.rand(3), expected)
    hub.add_timm("me/b", seed=1)
    hub.add_timm("me/c", seed=2)
    weights = [next(iter(o.commits.values()))["model.safetensors"] for o in hub.repos.values()]
    assert weights[0] == weights[1] != weights[2]


def test_transformers_loads_model_processor_and_timm_models(hub, tiny):
    import transformers
    hub.add_transformers("org/vit", tiny)
    hub.add_timm("org/net", "test_vit", num_classes=2)
    model = transformers.AutoModel.from_pretrained("org/vit")
    processor = transformers.AutoImageProcessor.from_pretrained("org/vit")
    pixels = processor(Image.new("RGB", (50, 40)), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 32, 32) and model(pixels).last_hidden_state.shape == (1, 5, 16)
    wrapped = transformers.AutoModelForImageClassification.from_pretrained("org/net").eval()
    net, x = timm.create_model("hf-hub:org/net", pretrained=True).eval(), torch.rand(1, 3, 160, 160)
    torch.testing.assert_close(wrapped(x).logits, net(x))


def test_an_own_processor_is_served(hub, tiny):
    hub.add_transformers("org/vit", tiny, processor={"image_processor_type": "ViTImageProcessor",
                                                     "image_mean": [0.1, 0.2, 0.3]})
    saved = json.loads(Path(hf_hub_download("org/vit", "preprocessor_config.json")).read_text())
    assert saved["image_mean"] == [0.1, 0.2, 0.3]


def test_data_sets_and_models_of_one_name_are_two(hub):
    hub.add_files("me/same", {"a.txt": "model"})
    hub.add_files("datasets/me/same", {"a.txt": "data set"})
    assert Path(hf_hub_download("me/same", "a.txt")).read_text() == "model"
    assert Path(hf_hub_download("me/same", "a.txt", repo_type="dataset")).read_text() == "data set"
    assert [o.id for o in HfApi().list_datasets()] == [o.id for o in list_models()] == ["me/same"]


def test_the_datasets_library_loads_from_it():
    datasets = pytest.importorskip("datasets")
    with LocalHub(): pass  # what it imports late is imported now
    before = settings()
    with LocalHub() as hub:
        hub.add_files("datasets/me/table", {"train.csv": "a,b\n1,x\n2,y\n",
                                            "test.csv": "a,b\n3,z\n"})
        data = datasets.load_dataset("me/table")
        assert {k: v["a"][:] for k, v in data.items()} == {"train": [1, 2], "test": [3]}
        cache, url = hub.cache, hub.url
        assert Path(data["train"].cache_files[0]["filename"]).is_relative_to(cache)
    after = settings()
    constants = {k: v for k, v in before.items() if k.rpartition(".")[2].isupper()}
    assert {k: (v, after.get(k)) for k, v in constants.items() if after.get(k) != v} == {}
    assert not [k for k, v in after.items() if url in str(v) or cache in str(v)]


def test_file_system_client(hub):
    hub.add_files("me/net", {"a.txt": "one", "b/c.txt": "two"})
    files = HfFileSystem(skip_instance_cache=True)
    assert sorted(files.ls("me/net", detail=False)) == ["me/net/a.txt", "me/net/b"]
    assert files.cat("me/net/b/c.txt") == b"two"


# ---- list and search

def test_listings_search_filter_sort_and_page():
    with LocalHub(page_size=3) as hub:
        for k in range(8):
            hub.add_files(f"{'timm' if k % 2 else 'me'}/net{k}",
                          {"README.md": "---\nlibrary_name: timm\ntags: [small]\n---\n"})
            hub.repos[f"{'timm' if k % 2 else 'me'}/net{k}"].downloads = k
        hub.add_files("me/notes", {"README.md": "no head"})
        assert len(list(list_models())) == 9
        assert sum(path.startswith("/api/models") for _, path in hub.requests) == 3
        assert ([o.id for o in list_models(author="timm", sort="downloads")]
                == ["timm/net7", "timm/net5", "timm/net3", "timm/net1"])
        assert [o.id for o in list_models(search="NET4")] == ["me/net4"]
        assert len(list(list_models(filter=["timm", "small"]))) == 8
        assert len(list(list_models(filter="timm", limit=5))) == 5
        assert list(list_models(search="nothing like it")) == []


def test_info_tells_files_sizes_and_configuration(hub, tiny):
    commit = hub.add_transformers("org/vit", tiny)
    info = model_info("org/vit", files_metadata=True)
    assert (info.sha == commit and info.library_name == "transformers"
            and info.config["model_type"] == "vit")
    stored = hub.repos["org/vit"].commits[commit]
    assert {o.rfilename: o.size for o in info.siblings} == {k: len(v) for k, v in stored.items()}
    api = HfApi()
    assert api.file_exists("org/vit", "config.json") and not api.file_exists("org/vit", "nope")
    assert ([o.path for o in api.get_paths_info("org/vit", ["config.json", "nope"])]
            == ["config.json"])
    assert api.repo_exists("org/vit") and not api.repo_exists("org/nope")


# ---- revisions

def test_branch_tag_and_commit(hub):
    first = hub.add_files("me/net", {"a.txt": "1"}, tag="v1")
    second = hub.add_files("me/net", {"a.txt": "2"})
    hub.add_files("me/net", {"a.txt": "3"}, revision="next")
    read = {k: Path(hf_hub_download("me/net", "a.txt", revision=k)).read_text()
            for k in (None, "main", "v1", "next", first, second)}
    assert list(read.values()) == ["2", "2", "1", "3", "1", "2"]
    assert [o.commit_id for o in list_repo_commits("me/net")] == [second, first]
    with pytest.raises(RevisionNotFoundError): hf_hub_download("me/net", "a.txt", revision="v2")
    with pytest.raises(EntryNotFoundError): hf_hub_download("me/net", "b.txt", revision="v1")


def test_branches_and_tags_are_made_over_http(hub):
    api = HfApi(token=hub.token)
    first = hub.add_files("me/net", {"a.txt": "1"})
    api.create_branch("me/net", branch="next")
    api.create_tag("me/net", tag="v1")
    api.upload_file(path_or_fileobj=b"2", path_in_repo="a.txt", repo_id="me/net", revision="next")
    refs = api.list_repo_refs("me/net")
    assert ({o.name: o.target_commit for o in (*refs.branches, *refs.tags)} | {"next": ""}
            == {"main": first, "v1": first, "next": ""})
    assert Path(hf_hub_download("me/net", "a.txt")).read_text() == "1"
    assert Path(hf_hub_download("me/net", "a.txt", revision="next")).read_text() == "2"


# ---- access

@pytest.mark.parametrize("kind, error", [("private", RepositoryNotFoundError),
                                         ("gated", GatedRepoError)])
def test_closed_repositories_open_with_the_token(hub, kind, error):
    hub.add_timm("me/closed", num_classes=2, **{kind: True})
    with pytest.raises(error): hf_hub_download("me/closed", "config.json")
    with pytest.raises(error): timm.create_model("hf-hub:me/closed", pretrained=True)
    with pytest.raises(HfHubHTTPError) as e:
        hf_hub_download("me/closed", "config.json", token="a guess")
    assert e.value.response.status_code == 401
    assert [o.id for o in list_models()] == (["me/closed"] if kind == "gated" else [])
    assert [o.id for o in list_models(token=hub.token)] == ["me/closed"]
    assert (json.loads(Path(hf_hub_download("me/closed", "config.json",
                                            token=hub.token)).read_text())["num_classes"] == 2)


def test_login_sends_the_token_by_itself():
    with LocalHub(token="mine", login=True, user="anna") as hub:
        hub.add_timm("me/closed", num_classes=2, private=True)
        assert timm.create_model("hf-hub:me/closed", pretrained=True).num_classes == 2
        assert huggingface_hub.get_token() == "mine" and huggingface_hub.whoami()["name"] == "anna"


def test_the_users_own_token_stays_out(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "a-real-one")
    with LocalHub() as hub:
        hub.add_files("me/closed", {"a.txt": ""}, private=True)
        assert huggingface_hub.get_token() is None
        with pytest.raises(RepositoryNotFoundError): hf_hub_download("me/closed", "a.txt")
    assert os.environ["HF_TOKEN"] == huggingface_hub.get_token() == "a-real-one"


def test_the_token_is_nowhere_to_be_read(capfd, caplog):
    with LocalHub(token="do-not-show", login=True) as hub, caplog.at_level("DEBUG"):
        hub.add_files("me/net", {"a.txt": ""}, private=True)
        hub.fault("500", repo_id="me/other")
        model_info("me/net"); hf_hub_download("me/net", "a.txt")
        with pytest.raises(HfHubHTTPError) as e: model_info("me/other")
        shown = [repr(hub), str(hub), repr(hub.requests), repr(hub.faults),
                 repr(hub.repos["me/net"]), str(e.value), caplog.text]
    assert hub.requests and not [o for o in (*shown, *capfd.readouterr()) if "do-not-show" in o]


# ---- push

def test_upload_folder_and_load_back(hub, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "sub/weights.bin").write_bytes(bytes(3000))
    api = HfApi(token=hub.token)
    assert str(api.create_repo("me/up", private=True)).endswith("me/up")
    api.create_repo("me/up", exist_ok=True)
    with pytest.raises(HfHubHTTPError): api.create_repo("me/up")
    done = api.upload_folder(repo_id="me/up", folder_path=tmp_path)
    assert done.oid == hub.repos["me/up"].branches["main"]
    with pytest.raises(RepositoryNotFoundError): snapshot_download("me/up")
    folder = Path(snapshot_download("me/up", token=hub.token))
    assert ((folder / "a.txt").read_text() == "one"
            and (folder / "sub/weights.bin").read_bytes() == bytes(3000))
    api.delete_repo("me/up")
    assert hub.repos == {}


def test_commits_add_delete_and_mind_their_parent(hub):
    api = HfApi(token=hub.token)
    first = hub.add_files("me/net", {"a.txt": "1", "old/b.txt": "2", "old/c.txt": "3"})
    changes = [CommitOperationAdd("new.txt", b"4"), CommitOperationDelete("a.txt"),
               CommitOperationDelete("old/", is_folder=True)]
    api.create_commit("me/net", changes, commit_message="change", parent_commit=first)
    assert list_repo_files("me/net") == ["new.txt"]
    assert sorted(list_repo_files("me/net", revision=first)) == ["a.txt", "old/b.txt", "old/c.txt"]
    with pytest.raises(HfHubHTTPError, match="commit has happened since"):
        api.create_commit("me/net", [CommitOperationAdd("x", b"")], commit_message="late",
                          parent_commit=first)


def test_pushing_needs_the_token(hub):
    hub.add_files("me/net", {"a.txt": "1"})
    for token in (None, "a guess"):
        with pytest.raises(HfHubHTTPError): HfApi(token=token).create_repo("me/new")
        with pytest.raises(HfHubHTTPError):
            HfApi(token=token).upload_file(path_or_fileobj=b"2", path_in_repo="a.txt",
                                           repo_id="me/net")
    assert list(hub.repos) == ["me/net"] and len(hub.repos["me/net"].commits) == 1


def test_timm_pushes_and_loads_back(hub):
    net = timm.create_model("test_resnet", num_classes=5)
    push_to_hf_hub(net, "me/pushed", token=hub.token, private=True)
    same = timm.create_model("test_resnet", num_classes=5)
    assert not equal_weights(net, same) and hub.repos["me/pushed"].private
    folder = snapshot_download("me/pushed", token=hub.token)
    assert equal_weights(net, timm.create_model(f"local-dir:{folder}", pretrained=True))


def test_transformers_pushes_and_loads_back(hub, tiny, tmp_path):
    import transformers
    model = transformers.ViTModel(tiny)
    model.save_pretrained(tmp_path / "saved")
    model.push_to_hub("me/vit", token=hub.token)
    assert equal_weights(model, transformers.AutoModel.from_pretrained("me/vit"))
    hub.add_folder("me/copy", tmp_path / "saved")
    assert equal_weights(model, transformers.AutoModel.from_pretrained("me/copy"))


def test_a_client_made_in_one_block_asks_the_hub_of_the_next(tiny):
    "transformers makes its client when it is first needed, and keeps it."
    import transformers
    from transformers.utils.hub import hf_api
    model, outside = transformers.ViTModel(tiny), huggingface_hub.constants.ENDPOINT
    for _ in range(2):
        with LocalHub() as hub:
            model.push_to_hub("me/vit", token=hub.token)
            assert hf_api().endpoint == hub.url
        assert hf_api().endpoint == outside


# ---- faults

@pytest.mark.parametrize("kind, error, status", [
    ("401", HfHubHTTPError, 401), ("403", GatedRepoError, 403),
    ("404", RepositoryNotFoundError, 404), ("500", HfHubHTTPError, 500)])
def test_refusals(hub, kind, error, status):
    hub.add_files("me/net", {"a.txt": "1"})
    hub.add_files("me/other", {"a.txt": "1"})
    hub.fault(kind, repo_id="me/net")
    with pytest.raises(error) as e: model_info("me/net")
    assert e.value.response.status_code == status
    model_info("me/other")
    hub.clear_faults()
    model_info("me/net")


def test_a_fault_of_one_file_and_of_so_many_times(hub):
    hub.add_files("me/net", {"a.txt": "1", "b.txt": "2"})
    fault = hub.fault("404", file="a.txt", times=1)
    hf_hub_download("me/net", "b.txt")
    assert fault.times == 1
    with pytest.raises(EntryNotFoundError): hf_hub_download("me/net", "a.txt")
    assert fault.times == 0
    hf_hub_download("me/net", "a.txt")


def test_a_server_that_fails_once_is_asked_again(hub):
    hub.add_files("me/net", {"a.txt": "1"})
    hub.fault("500", times=1)
    hf_hub_download("me/net", "a.txt")
    assert [method for method, _ in hub.requests] == ["HEAD", "HEAD", "GET"]


def test_cut_once_is_resumed(hub):
    content = np.random.default_rng(0).bytes(100_000)
    hub.add_files("me/net", {"a.bin": content})
    hub.fault("cut", times=1)
    assert Path(hf_hub_download("me/net", "a.bin")).read_bytes() == content
    assert [method for method, _ in hub.requests] == ["HEAD", "GET", "GET"]


def test_parts_of_a_file(hub):
    hub.add_files("me/net", {"a.txt": "0123456789"})
    address = f"{hub.url}/me/net/resolve/main/a.txt"
    for asked, part, said in (("bytes=4-", b"456789", "bytes 4-9/10"),
                              ("bytes=2-3", b"23", "bytes 2-3/10")):
        with urllib.request.urlopen(urllib.request.Request(address,
                                                           headers={"Range": asked})) as answer:
            assert (answer.status, answer.headers["Content-Range"],
                    answer.read()) == (206, said, part)
    with pytest.raises(urllib.error.HTTPError, match="416"):
        urllib.request.urlopen(urllib.request.Request(address, headers={"Range": "bytes=10-"}))


def test_cut_always_gives_an_error_and_no_file(hub):
    hub.add_files("me/net", {"a.bin": bytes(100_000)})
    hub.fault("cut")
    with pytest.raises((OSError, HTTP.TransportError)): hf_hub_download("me/net", "a.bin")
    assert not list(Path(hub.cache).rglob("snapshots/*/a.bin"))


def test_short_weights_do_not_load(hub):
    hub.add_timm("me/net")
    hub.fault("short", file="model.safetensors")
    with pytest.raises(SafetensorError): timm.create_model("hf-hub:me/net", pretrained=True)


def test_slow_is_as_slow_as_said(hub):
    hub.add_files("me/net", {"a.txt": "1"})
    hub.fault("slow", seconds=0.5)
    start = time.monotonic()
    model_info("me/net")
    assert time.monotonic() - start >= 0.5
    with pytest.raises(HTTP.TimeoutException): model_info("me/net", timeout=0.1)


def test_a_slow_answer_does_not_hold_up_the_end():
    start = time.monotonic()
    with LocalHub() as hub:
        hub.add_files("me/net", {})
        hub.fault("slow", seconds=30)
        with pytest.raises(HTTP.TimeoutException): model_info("me/net", timeout=0.1)
    assert time.monotonic() - start < 5


def test_down_and_up_again(hub):
    hub.add_files("me/net", {"a.txt": "1"})
    model_info("me/net")
    url = hub.url
    hub.fault("down")
    with pytest.raises(HTTP.ConnectError): model_info("me/net")
    hub.clear_faults()
    assert hub.url == url and model_info("me/net").id == "me/net"


def test_down_for_one_request(hub):
    hub.add_files("me/net", {"a.txt": "1"})
    hub.fault("down", times=1)
    with pytest.raises(HTTP.TransportError): model_info("me/net")
    model_info("me/net")


def test_an_unknown_fault_is_named(hub):
    with pytest.raises(ValueError, match="Fault 'slo' not found.*slow"): hub.fault("slo")


# ---- everything is put back

@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_everything_is_as_before(error, tiny):
    import transformers
    with LocalHub(): pass  # what the clients import late is imported now
    environment, before = dict(os.environ), settings()
    with contextlib.suppress(*[error] if error else []), LocalHub(login=True) as hub:
        cache, url = Path(hub.cache), hub.url
        hub.add_transformers("org/vit", tiny)
        transformers.AutoModel.from_pretrained("org/vit")
        assert (huggingface_hub.constants.ENDPOINT == os.environ["HF_ENDPOINT"] == url
                and cache.is_dir())
        assert settings() != before
        if error: raise error
    assert dict(os.environ) == environment
    after = settings()
    assert {k: (v, after.get(k)) for k, v in before.items() if after.get(k) != v} == {}
    assert not [k for k, v in after.items() if url in str(v) or str(cache) in str(v)]
    assert not cache.exists()
    with pytest.raises(ConnectionError), socket.socket() as client:
        client.connect(("127.0.0.1", int(url.rpartition(":")[2])))


def test_an_error_while_entering_leaves_nothing(monkeypatch):
    environment, before = dict(os.environ), settings()
    def fail(*args): raise RuntimeError("no")
    monkeypatch.setattr("autotimm.testing.hub._with_endpoint", fail)
    with pytest.raises(RuntimeError, match="no"): LocalHub().__enter__()
    monkeypatch.undo()
    assert dict(os.environ) == environment and settings() == before


def test_offline_switch_holds_outside_only(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with LocalHub() as hub:
        hub.add_files("me/net", {"a.txt": "1"})
        assert Path(hf_hub_download("me/net", "a.txt")).read_text() == "1"
    assert huggingface_hub.constants.HF_HUB_OFFLINE is True and os.environ["HF_HUB_OFFLINE"] == "1"


def test_hubs_in_one_another():
    with LocalHub() as outer:
        outer.add_files("me/net", {"a.txt": "outer"})
        with LocalHub() as inner:
            inner.add_files("me/net", {"a.txt": "inner"})
            assert inner.url != outer.url and inner.cache != outer.cache
            assert Path(hf_hub_download("me/net", "a.txt")).read_text() == "inner"
            asked = len(outer.requests)
        assert Path(hf_hub_download("me/net", "a.txt")).read_text() == "outer"
        assert len(outer.requests) > asked == 0
        with pytest.raises(RuntimeError, match="open already"): outer.__enter__()


def test_a_hub_opens_again_with_its_content():
    hub = LocalHub()
    for _ in range(2):
        with hub:
            hub.add_files("me/net", {"a.txt": "1"})
            assert Path(hf_hub_download("me/net", "a.txt")).read_text() == "1"
        assert hub.url == ""


# ---- other processes

def test_a_new_process_needs_the_environment_only(hub):
    hub.add_timm("me/net", num_classes=3)
    code = ("import timm, huggingface_hub as h; m = timm.create_model('hf-hub:me/net', "
            "pretrained=True);"
            "print(m.num_classes, h.constants.ENDPOINT, h.constants.HF_HUB_CACHE)")
    assert run(code).split() == ["3", hub.url, os.path.join(hub.cache, "hub")]


BLOCK = """
from pathlib import Path
with LocalHub() as hub:
    url, cache = hub.url, hub.cache
    hub.add_files("me/net", {"a.txt": "one"})
    import huggingface_hub
    from huggingface_hub import hf_hub_download, file_download, constants, list_models
    assert Path(hf_hub_download("me/net", "a.txt")).is_relative_to(cache)
    assert [o.id for o in list_models()] == ["me/net"]
import sys
for name, module in list(sys.modules.items()):
    if name.split(".")[0] not in ("huggingface_hub", "transformers", "timm", "datasets"): continue
    for k, v in list(vars(module).items()):
        assert not isinstance(v, (str, Path)) or (url not in str(v) and cache not in str(v)), (name, k)
assert huggingface_hub.hf_api.api.endpoint == constants.ENDPOINT
print(constants.ENDPOINT, constants.HF_HUB_CACHE)
"""


@pytest.mark.parametrize("first", ["import huggingface_hub",
                                   "from huggingface_hub import constants, snapshot_download",
                                   "import sys; assert 'huggingface_hub' not in sys.modules"])
def test_it_does_not_matter_when_the_client_is_imported(first, tmp_path):
    home = str(tmp_path / "home")
    code = f"from autotimm.testing import LocalHub\n{first}\n{BLOCK}"
    printed = run(code, HF_ENDPOINT="http://hub.invalid", HF_HOME=home,
                  HF_HUB_CACHE=os.path.join(home, "hub"))
    assert printed.split() == ["http://hub.invalid", os.path.join(home, "hub")]


# ---- made-up data

def test_same_seed_same_scenes():
    a, b, c = (make_shapes(6, 48, 10, 4, seed=s) for s in (5, 5, 6))
    for x, y in zip(a, b):
        for part in ("image", "labels", "masks", "boxes", "mask", "multi_hot"):
            assert getattr(x, part).tobytes() == getattr(y, part).tobytes()
    assert [o.image.tobytes() for o in a] != [o.image.tobytes() for o in c]


def test_boxes_are_those_of_the_masks():
    for scene in make_shapes(40, 56, 10, 6, seed=2):
        first_to_last = masks_to_boxes(torch.from_numpy(scene.masks))
        assert torch.equal(torch.from_numpy(scene.boxes),
                           first_to_last + torch.tensor([0, 0, 1, 1]))
        assert (len(scene.labels) == len(scene.boxes) == len(scene.masks)
                and scene.image.dtype == np.uint8)
        assert set(np.unique(scene.mask)) - {0} == set(scene.labels + 1)


@pytest.mark.parametrize("options, said", [
    (dict(n=0), "n must be at least 1, got 0"),
    (dict(image_size=8), "image_size must be at least 24, got 8"),
    (dict(max_objects=0), "max_objects must be at least 1, got 0"),
    (dict(num_classes=99), "num_classes must be from 1 to 10, got 99")])
def test_bad_sizes_are_named(options, said):
    with pytest.raises(ValueError, match=said): make_shapes(**options)


WRITERS = ("write_folders", "write_csv", "write_multilabel_csv", "write_boxes_csv",
           "write_coco", "write_voc", "write_yolo", "write_masks")


@pytest.mark.parametrize("name", WRITERS)
def test_same_seed_same_files(name, tmp_path):
    def written(folder: str, seed: int) -> dict[str, bytes]:
        root = getattr(testing, name)(tmp_path / folder, splits=dict(train=3, val=2),
                                      image_size=32, seed=seed)
        return {o.relative_to(root).as_posix(): o.read_bytes() for o in root.rglob("*")
                if o.is_file()}
    a, b, c = written("a", 1), written("b", 1), written("c", 2)
    assert a == b and a != c
    images = [v for k, v in a.items() if k.endswith((".png", ".jpg")) and "ask" not in k
              and "Class" not in k]
    assert len(set(images)) == 5  # no image stands in two splits


def expected(n: int = 4, split: int = 0, **options) -> list[testing.ShapeScene]:
    return make_shapes(n, seed=(0, split), **options)


def test_folders(tmp_path):
    testing.write_folders(tmp_path, splits=dict(train=6, val=4), num_classes=2)
    for split, (name, n) in enumerate((("train", 6), ("val", 4))):
        data = torchvision.datasets.ImageFolder(tmp_path / name)
        assert data.classes == ["circle", "square"] and len(data) == n
        by_name = sorted((Path(path).name, np.array(data.loader(path)).tobytes(), k)
                         for path, k in data.samples)
        assert [o[1:] for o in by_name] == [(o.image.tobytes(), o.label)
                                            for o in expected(n, split, num_classes=2)]


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as f: return list(csv.DictReader(f))


def test_tables(tmp_path):
    splits = dict(train=4, val=2)
    rows = read_csv(testing.write_csv(tmp_path / "a", splits) / "train.csv")
    assert [o["label"] for o in rows] == [testing.SHAPE_NAMES[o.label] for o in expected()]
    rows = read_csv(testing.write_multilabel_csv(tmp_path / "b", splits) / "val.csv")
    assert [[float(o[k]) for k in testing.SHAPE_NAMES[:3]]
            for o in rows] == [o.multi_hot.tolist() for o in expected(2, 1)]
    rows = read_csv(testing.write_multilabel_csv(tmp_path / "c", splits, separator=";")
                    / "train.csv")
    assert ([set(o["labels"].split(";")) for o in rows]
            == [{testing.SHAPE_NAMES[k] for k in o.labels} for o in expected()])
    assert all(np.array_equal(Image.open(tmp_path / "c/images" / r["image"]), o.image)
               for r, o in zip(rows, expected()))


def test_table_of_boxes_and_masks(tmp_path):
    rows = read_csv(testing.write_boxes_csv(tmp_path, dict(train=4), masks=True) / "train.csv")
    shapes = [(box, label, mask) for o in expected() for box, label,
              mask in zip(o.boxes, o.labels, o.masks)]
    assert len(rows) == len(shapes)
    for row, (box, label, mask) in zip(rows, shapes):
        assert [float(row[k]) for k in ("x_min", "y_min", "x_max", "y_max")] == box.tolist()
        assert (row["label"] == testing.SHAPE_NAMES[label]
                and np.array_equal(np.array(Image.open(tmp_path / row["mask_path"])) > 0, mask))


@pytest.mark.parametrize("kind", ["polygon", "rle"])
def test_coco(tmp_path, kind):
    coco = pytest.importorskip("pycocotools.coco")
    coco_mask = pytest.importorskip("pycocotools.mask")
    testing.write_coco(tmp_path, dict(train2017=12, val2017=2), masks=kind, num_classes=10,
                       max_objects=5)
    with contextlib.redirect_stdout(None):
        data = coco.COCO(tmp_path / "annotations/instances_train2017.json")
    assert (len(data.imgs) == 12 and [o["name"] for o in data.loadCats(data.getCatIds())]
            == list(testing.SHAPE_NAMES))
    for (number, image), scene in zip(sorted(data.imgs.items()),
                                      expected(12, num_classes=10, max_objects=5)):
        assert np.array_equal(Image.open(tmp_path / "train2017" / image["file_name"]), scene.image)
        found = data.imgToAnns[number]
        assert [o["category_id"] - 1 for o in found] == scene.labels.tolist()
        boxes = box_convert(torch.tensor([o["bbox"] for o in found]), "xywh", "xyxy")
        assert torch.equal(boxes, torch.from_numpy(scene.boxes))
        theirs = [data.annToRLE(o) for o in found]
        ours = coco_mask.encode(np.asfortranarray(scene.masks.transpose(1, 2, 0), dtype=np.uint8))
        assert np.diag(coco_mask.iou(theirs, ours, [0] * len(ours))).tolist() == [1.0] * len(ours)
        assert [o["area"] for o in found] == coco_mask.area(ours).tolist()


def test_coco_of_boxes_alone_and_of_an_unknown_kind(tmp_path):
    testing.write_coco(tmp_path, dict(train2017=2, val2017=0), masks=None)
    table = json.loads((tmp_path / "annotations/instances_train2017.json").read_text())
    assert table["annotations"] and not any(o["segmentation"] for o in table["annotations"])
    assert json.loads((tmp_path / "annotations/instances_val2017.json").read_text())["images"] == []
    with pytest.raises(ValueError, match="Kind of masks 'polygons' not found.*polygon"):
        testing.write_coco(tmp_path, masks="polygons")


def test_voc(tmp_path):
    testing.write_voc(tmp_path / "VOCdevkit/VOC2012", dict(train=4, val=2))
    data = torchvision.datasets.VOCDetection(tmp_path, image_set="train")
    masks = torchvision.datasets.VOCSegmentation(tmp_path, image_set="train")
    assert (len(data) == len(masks) == 4
            and len(torchvision.datasets.VOCDetection(tmp_path, image_set="val")) == 2)
    for (image, target), (_, mask), scene in zip(data, masks, expected()):
        found = target["annotation"]["object"]
        boxes = np.array([[int(o["bndbox"][k]) for k in ("xmin", "ymin", "xmax", "ymax")]
                          for o in found])
        # VOC counts pixels from 1 and includes the last one.
        assert np.array_equal(boxes - [1, 1, 0, 0], scene.boxes)
        assert [o["name"] for o in found] == [testing.SHAPE_NAMES[k] for k in scene.labels]
        assert np.array_equal(mask, scene.mask) and image.size == (64, 64)
        # JPEG loses a little of the noise
        assert abs(np.array(image).astype(int) - scene.image).mean() < 12


def test_yolo(tmp_path):
    testing.write_yolo(tmp_path, dict(train=4, val=2), image_size=48)
    for number, scene in enumerate(expected(image_size=48), 1):
        rows = np.loadtxt(tmp_path / f"labels/train/{number:04}.txt", ndmin=2)
        boxes = box_convert(torch.from_numpy(rows[:, 1:]) * 48, "cxcywh", "xyxy")
        torch.testing.assert_close(boxes.float(), torch.from_numpy(scene.boxes), atol=1e-3, rtol=0)
        assert rows[:, 0].tolist() == scene.labels.tolist()
        assert np.array_equal(Image.open(tmp_path / f"images/train/{number:04}.png"), scene.image)
    assert len(list((tmp_path / "labels/val").iterdir())) == 2


def test_semantic_masks(tmp_path):
    testing.write_masks(tmp_path, dict(train=4))
    assert (tmp_path / "classes.txt").read_text().split() == ["background", "circle",
                                                              "square", "triangle"]
    for number, scene in enumerate(expected(), 1):
        assert np.array_equal(Image.open(tmp_path / f"masks/train/{number:04}.png"), scene.mask)


def test_cifar10_is_taken_in_the_block_only(tmp_path):
    write_builtin(tmp_path, "CIFAR10", n=11, n_test=4, seed=3)
    kept = {k: vars(torchvision.datasets.CIFAR10)[k] for k in ("train_list", "test_list", "meta")}
    with pytest.raises(KeyboardInterrupt), accept_builtin(tmp_path, "CIFAR10"):
        train, test = (torchvision.datasets.CIFAR10(tmp_path, train=o) for o in (True, False))
        raise KeyboardInterrupt
    assert {k: vars(torchvision.datasets.CIFAR10)[k] for k in kept} == kept
    with pytest.raises(RuntimeError, match="not found or corrupted"):
        torchvision.datasets.CIFAR10(tmp_path)
    for data, n, split in ((train, 11, 0), (test, 4, 1)):
        scenes = make_shapes(n, 32, 10, max_objects=1, seed=(3, split))
        assert data.targets == [o.label for o in scenes]
        assert all(np.array_equal(a, b.image) for a, b in zip(data.data, scenes, strict=True))
    assert train.classes[0] == "airplane" and len(train.classes) == 10


@pytest.mark.parametrize("name", ["CIFAR100", "MNIST", "FashionMNIST"])
def test_other_builtin_data_sets(name, tmp_path):
    with accept_builtin(write_builtin(tmp_path, name, n=6, n_test=3), name):
        kind = getattr(torchvision.datasets, name)
        assert (len(kind(tmp_path, train=True)), len(kind(tmp_path, train=False))) == (6, 3)


def test_cifar10_of_less_than_its_five_parts(tmp_path):
    with pytest.raises(ValueError, match="n must be at least 5.*got 4"):
        write_builtin(tmp_path, "CIFAR10", n=4)
