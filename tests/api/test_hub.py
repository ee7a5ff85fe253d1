from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from helpers.hub_server import HubServer
from helpers.model_folder import make_text_model
from tokenplane_api import hub as hub_package
from tokenplane_api.hub import (
    DiskFull,
    HubUnreachable,
    ModelGated,
    ModelNotFound,
    NoSafetensors,
    check_model_folder,
    model_sha,
    resolve_adapter,
    resolve_model,
)
from tokenplane_api.hub.explain import explain
from tokenplane_api.hub.repo import Repo
from tokenplane_core.backend.errors import ConfigError

FILES = {
    "config.json": b"{}",
    "tokenizer.json": b'{"version": "1.0"}',
    "chat_template.jinja": b"{{ messages }}",
    "model.safetensors": bytes(range(256)) * 4000,
    "pytorch_model.bin": b"pickle",
    "modeling_custom.py": b"raise SystemExit",
    "consolidated.safetensors": b"twice the same",
    "onnx/config.json": b"{}",
    "onnx/model.safetensors": b"for another program",
    "README.md": b"# Model",
}
WANTED = {"config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"}


@pytest.fixture
def hub() -> Iterator[HubServer]:
    server = HubServer()
    with server.running():
        yield server


@pytest.fixture(autouse=True)
def no_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))


class Fetch:
    """`resolve_model` with a cache and an endpoint of its own; collects the progress lines."""

    def __init__(self, endpoint: str, cache_dir: Path) -> None:
        self.endpoint, self.cache_dir = endpoint, cache_dir
        self.lines: list[str] = []
        self.line_times_s: list[float] = []

    def __call__(self, model_id: str, revision: str | None = None, **options: Any) -> Path:
        self.lines, self.line_times_s = [], []
        options = {"cache_dir": self.cache_dir, "endpoint": self.endpoint, "retry_delays_s": (0.01,), **options}
        return resolve_model(model_id, revision, progress=self._note, **options)

    def _note(self, line: str) -> None:
        self.lines.append(line)
        self.line_times_s.append(time.monotonic())


@pytest.fixture
def fetch(hub: HubServer, tmp_path: Path) -> Fetch:
    return Fetch(hub.endpoint, tmp_path / "cache")


def names_in(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


# --- Downloads ----------------------------------------------------------------------------------------------


def test_downloads_what_a_model_needs_and_nothing_else(hub: HubServer, fetch: Fetch) -> None:
    repo = hub.add("org/model", FILES)
    folder = fetch("org/model")
    assert names_in(folder) == WANTED
    assert all((folder / name).read_bytes() == FILES[name] for name in WANTED)
    assert model_sha(folder) == repo.branches["main"]
    assert "downloading model 'org/model'" in fetch.lines[0]
    assert "1.0 MB" in fetch.lines[0]
    assert fetch.lines[-1].startswith("downloaded 1.0 MB in ")


def test_second_time_downloads_nothing(hub: HubServer, fetch: Fetch) -> None:
    hub.add("org/model", FILES)
    first = fetch("org/model")
    hub.requests.clear()
    assert fetch("org/model") == first
    assert fetch.lines == []
    assert not [request for request in hub.requests if "/api/" not in request.path]


def test_weights_and_code_come_only_when_needed(hub: HubServer, fetch: Fetch) -> None:
    hub.add("org/model", FILES)
    assert names_in(fetch("org/model", needs_weights=False)) == WANTED - {"model.safetensors"}
    assert not hub.downloads("model.safetensors")
    assert names_in(fetch("org/model", trust_remote_code=True)) == WANTED | {"modeling_custom.py"}
    assert len(hub.downloads("config.json")) == 1, "what the cache has is not downloaded again"


def test_progress_lines_grow_and_are_spaced(hub: HubServer, fetch: Fetch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_package.progress, "PROGRESS_INTERVAL_S", 0.1)
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 2**14)
    hub.add("org/model", FILES, bytes_per_s=len(FILES["model.safetensors"]) / 0.8)
    fetch("org/model")
    growing = [line for line in fetch.lines if line.endswith("%)")]
    percents = [int(line.rpartition("(")[2].split()[0]) for line in growing]
    assert len(percents) >= 3
    assert percents == sorted(set(percents))
    assert percents[0] > 0
    assert percents[-1] <= 100
    assert all(line.startswith("downloaded ") and " of 1.0 MB (" in line for line in growing)
    times_s = fetch.line_times_s[1:-1]
    assert all(later - earlier >= 0.09 for earlier, later in pairwise(times_s))


def test_cut_connection_goes_on_where_it_broke(hub: HubServer, fetch: Fetch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 2**10)
    hub.add("org/model", FILES, cut_after_bytes={"model.safetensors": [600 * 2**10]})
    folder = fetch("org/model")
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    first, second = hub.downloads("model.safetensors")
    assert "range" not in first.headers
    assert second.headers["range"] == f"bytes={600 * 2**10}-"


def test_files_that_are_complete_are_not_downloaded_again(hub: HubServer, fetch: Fetch) -> None:
    files = {"a.safetensors": b"a" * 1000, "b.safetensors": b"b" * 1000, "config.json": b"{}"}
    repo = hub.add("org/model", files, broken_files={"b.safetensors"})
    with pytest.raises(ModelNotFound, match="refuses model 'org/model' with status 410"):
        fetch("org/model")
    assert len(hub.downloads("a.safetensors")) == 1
    repo.broken_files.clear()
    assert (fetch("org/model") / "b.safetensors").read_bytes() == files["b.safetensors"]
    assert len(hub.downloads("a.safetensors")) == 1


def test_failing_hub_is_asked_again(hub: HubServer, fetch: Fetch) -> None:
    hub.add("org/model", FILES, failing_statuses=[503, 429])
    folder = fetch("org/model", retry_delays_s=(0.01, 0.02, 0.04))
    assert names_in(folder) == WANTED
    assert fetch.lines[0] == f"{hub.endpoint} answered with status 503; attempt 2 of 4 in 0.01 s"
    assert fetch.lines[1] == f"{hub.endpoint} answered with status 429; attempt 3 of 4 in 0.02 s"


def test_failing_hub_is_given_up(hub: HubServer, fetch: Fetch) -> None:
    repo = hub.add("org/model", FILES, failing_statuses=[500] * 4)
    with pytest.raises(HubUnreachable, match=r"answered with status 500, and model 'org/model' is not complete"):
        fetch("org/model", retry_delays_s=(0.01, 0.01))
    assert len(repo.failing_statuses) == 1


# --- Revisions ----------------------------------------------------------------------------------------------


def test_revision_is_a_branch_or_a_commit(hub: HubServer, fetch: Fetch) -> None:
    repo = hub.add("org/model", FILES)
    old = "0123456789abcdef0123456789abcdef01234567"
    repo.commits[old] = {**FILES, "config.json": b'{"old": 1}'}
    repo.branches["v1/old"] = old
    assert model_sha(fetch("org/model")) == repo.branches["main"]
    by_branch = fetch("org/model", "v1/old")
    assert model_sha(by_branch) == old
    assert (by_branch / "config.json").read_bytes() == b'{"old": 1}'
    assert fetch("org/model", old) == by_branch


def test_missing_revision_names_the_ones_there_are(hub: HubServer, fetch: Fetch) -> None:
    hub.add("org/model", FILES)
    fetch("org/model")
    with pytest.raises(ModelNotFound, match=r"'org/model' has no revision 'v9'.*/org/model/commits"):
        fetch("org/model", "v9")


def test_deleted_revision_is_not_served_from_the_cache(hub: HubServer, fetch: Fetch) -> None:
    repo = hub.add("org/model", FILES)
    repo.branches["v1"] = repo.branches["main"]
    fetch("org/model", "v1")
    del repo.branches["v1"]
    with pytest.raises(ModelNotFound, match="has no revision 'v1'"):
        fetch("org/model", "v1")


# --- Access -------------------------------------------------------------------------------------------------


def test_token_is_sent_to_the_hub_but_not_beyond(hub: HubServer, fetch: Fetch) -> None:
    hub.add("org/model", FILES)
    fetch("org/model", token="hf_secret")
    to_hub = [request for request in hub.requests if not request.path.startswith("/cdn")]
    beyond = [request for request in hub.requests if request.path.startswith("/cdn")]
    assert {request.headers.get("authorization") for request in to_hub} == {"Bearer hf_secret"}
    assert beyond
    assert all("authorization" not in request.headers for request in beyond)


def test_missing_repository_hints_at_private_ones(hub: HubServer, fetch: Fetch) -> None:
    with pytest.raises(ModelNotFound, match=r"has no model 'org/typo'.*if it is private, set HF_TOKEN"):
        fetch("org/typo")
    with pytest.raises(ModelNotFound, match=r"if it is private, check that the token that was sent"):
        fetch("org/typo", token="hf_secret")
    assert len(hub.requests) == 2, "asking again would not help"


def test_gated_repository_says_how_to_get_in(hub: HubServer, fetch: Fetch) -> None:
    hub.add("org/model", FILES, is_gated=True)
    with pytest.raises(ModelGated, match=r"accept its terms at http://.*/org/model; then set HF_TOKEN"):
        fetch("org/model")
    with pytest.raises(ModelGated, match="the token that was sent has no access yet"):
        fetch("org/model", token="hf_secret")


def test_invalid_token_is_named(hub: HubServer, fetch: Fetch) -> None:
    hub.add("org/model", FILES, failing_statuses=[401])
    hub.repos["org/model"].failing_message = "Invalid credentials in Authorization header"
    with pytest.raises(ModelNotFound, match=r"does not accept the token.*check HF_TOKEN"):
        fetch("org/model", token="hf_old")


@pytest.mark.parametrize("model_id", ["a/b/c", "org/", "org/two words", "nofolder..x"])
def test_what_is_no_model_id_is_refused(model_id: str, fetch: Fetch, hub: HubServer) -> None:
    with pytest.raises(ModelNotFound, match="is neither an existing folder nor a model id"):
        fetch(model_id)
    assert hub.requests == []


# --- What cannot be served ----------------------------------------------------------------------------------


def test_pickle_is_refused_before_it_is_downloaded(hub: HubServer, fetch: Fetch) -> None:
    hub.add("org/model", {"config.json": b"{}", "pytorch_model.bin": b"pickle"})
    with pytest.raises(NoSafetensors, match=r"only as pickle \(pytorch_model\.bin\).*Convert them to safetensors"):
        fetch("org/model")
    assert [request.path for request in hub.requests] == ["/api/models/org/model"]
    assert names_in(fetch("org/model", needs_weights=False)) == {"config.json"}


def test_model_without_config_is_refused_before_it_is_downloaded(hub: HubServer, fetch: Fetch) -> None:
    hub.add("org/model", {"model.safetensors": b"x"})
    with pytest.raises(ModelNotFound, match=r"has no config\.json"):
        fetch("org/model")
    hub.add("org/adapter", {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"})
    with pytest.raises(ModelNotFound, match="is a LoRA adapter"):
        fetch("org/adapter")


def test_an_adapter_is_fetched_with_its_two_files_alone(hub: HubServer, fetch: Fetch) -> None:
    hub.add("org/adapter", {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x", "optimizer.pt": b"no"})
    options: dict[str, Any] = {"cache_dir": fetch.cache_dir, "endpoint": fetch.endpoint, "retry_delays_s": ()}
    folder = resolve_adapter("org/adapter", progress=fetch.lines.append, **options)
    assert names_in(folder) == {"adapter_config.json", "adapter_model.safetensors"}
    assert resolve_adapter(str(folder), "v2", progress=fetch.lines.append) == folder
    assert "revision 'v2' is ignored" in fetch.lines[-1]
    hub.add("org/pickled", {"adapter_config.json": b"{}", "adapter_model.bin": b"x"})
    with pytest.raises(ModelNotFound, match=r"adapter 'org/pickled' has no adapter_model\.safetensors"):
        resolve_adapter("org/pickled", **options)
    with pytest.raises(ModelNotFound, match="has no adapter 'org/nothing'"):
        resolve_adapter("org/nothing", **options)
    with pytest.raises(ModelNotFound, match="adapter folder /no/such does not exist"):
        resolve_adapter("/no/such", **options)


def test_model_larger_than_the_disk_is_refused_at_once(hub: HubServer, fetch: Fetch) -> None:
    hub.add("org/model", FILES, announced_sizes={"model.safetensors": 10**18})
    with pytest.raises(DiskFull, match=r"needs 1000000000\.0 GB, but the disk of .* has only .* GB free.*HF_HOME"):
        fetch("org/model")
    assert not hub.downloads("model.safetensors")


def test_disk_that_fills_up_and_cache_that_is_read_only_are_named(tmp_path: Path) -> None:
    """No test can fill a disk, and root may write everywhere: the operating system's own errors have to do."""
    repo = Repo("org/model", None, None, tmp_path, "http://hub", ("*.json",))
    full = explain(repo, OSError(errno.ENOSPC, "No space left on device"))
    assert isinstance(full, DiskFull)
    assert f"the disk of {tmp_path} became full while downloading model 'org/model'" in str(full)
    denied = explain(repo, PermissionError(errno.EACCES, "Permission denied", str(tmp_path)))
    assert isinstance(denied, ConfigError)
    assert f"cannot write to the model cache {tmp_path}" in str(denied)
    bug = KeyError("bug")
    assert explain(repo, bug) is bug


# --- Without the hub ----------------------------------------------------------------------------------------


def test_unreachable_hub_without_cache(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
        fetch = Fetch(endpoint, tmp_path)
        with pytest.raises(HubUnreachable, match=rf"{endpoint} cannot be reached \(Connect.*HTTPS_PROXY"):
            fetch("org/model")
    assert fetch.lines == [line for line in fetch.lines if "attempt 2 of 2" in line]
    assert len(fetch.lines) == 1


def test_unreachable_hub_with_cache_serves_the_cache(hub: HubServer, fetch: Fetch) -> None:
    hub.add("org/model", FILES)
    folder = fetch("org/model")
    hub.repos["org/model"].failing_statuses += [502]
    assert fetch("org/model") == folder
    assert fetch.lines == [f"{hub.endpoint} answered with status 502; going on with the copy in the cache, {folder}"]


def run_in_fresh_process(model_id: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Everything from the environment, which huggingface_hub reads when it is imported."""
    program = (
        "import sys\n"
        "from tokenplane_api.hub import resolve_model\n"
        "from tokenplane_core.backend.errors import ConfigError\n"
        "try: print(resolve_model(sys.argv[1], progress=lambda line: None, retry_delays_s=()))\n"
        "except ConfigError as error: print(type(error).__name__, error)\n"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    return subprocess.run(
        [sys.executable, "-c", program, model_id], env={**clean, **environment}, capture_output=True, text=True
    )


def test_environment_variables_of_the_hub_count(hub: HubServer, tmp_path: Path) -> None:
    hub.add("org/model", FILES)
    environment = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path), "HF_TOKEN": "hf_from_environment"}
    online = run_in_fresh_process("org/model", **environment)
    folder = Path(online.stdout.strip())
    assert names_in(folder) == WANTED, online
    assert tmp_path in folder.parents
    asked = next(request for request in hub.requests if request.path == "/api/models/org/model")
    assert asked.headers["authorization"] == "Bearer hf_from_environment"
    assert online.stderr == "", "no progress bars"

    hub.requests.clear()
    offline = run_in_fresh_process("org/model", **environment, HF_HUB_OFFLINE="1")
    assert offline.stdout == online.stdout
    missing = run_in_fresh_process("org/other", **environment, HF_HUB_OFFLINE="1")
    assert missing.stdout.startswith("ModelNotFound HF_HUB_OFFLINE is set and model 'org/other' is not complete")
    assert hub.requests == []


# --- Local folders ------------------------------------------------------------------------------------------


def no_hub(line: str) -> None:
    raise AssertionError(f"a complete local folder needs no words: {line}")


def test_local_folder_is_used_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_text_model(tmp_path / "org" / "model")
    (tmp_path / "org" / "model" / "model.safetensors").write_bytes(b"weights")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for model_id in (str(tmp_path / "org" / "model"), "org/model", "./org/model", "~/org/model"):
        folder = resolve_model(model_id, progress=no_hub)
        assert folder.resolve() == (tmp_path / "org" / "model").resolve()
        assert model_sha(folder) is None


def test_revision_of_a_local_folder_is_ignored_aloud(tmp_path: Path) -> None:
    make_text_model(tmp_path)
    lines: list[str] = []
    assert resolve_model(str(tmp_path), "main", needs_weights=False, progress=lines.append) == tmp_path
    assert lines == [f"revision 'main' is ignored: {tmp_path} is a local folder"]


@pytest.mark.parametrize("model_id", ["./missing", "/missing/model", "../missing", "~/missing"])
def test_missing_folder_is_not_looked_for_on_the_hub(model_id: str) -> None:
    with pytest.raises(ModelNotFound, match=r"does not exist; give a folder with config\.json, or a model id"):
        resolve_model(model_id, progress=no_hub)


def test_incomplete_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"has no config\.json"):
        check_model_folder(tmp_path)
    make_text_model(tmp_path)
    with pytest.raises(ModelNotFound, match="is a file, not a folder"):
        check_model_folder(tmp_path / "config.json")
    with pytest.raises(NoSafetensors, match=r"no \*\.safetensors weights, only config\.json, "):
        check_model_folder(tmp_path)
    assert check_model_folder(tmp_path, needs_weights=False) == tmp_path


def test_shards_that_the_index_names_must_be_there(tmp_path: Path) -> None:
    make_text_model(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors", "c": "1.safetensors"}}))
    (tmp_path / "1.safetensors").write_bytes(b"weights")
    with pytest.raises(NoSafetensors, match=r"lacks 1 of the 2 weight files.* 2\.safetensors for one"):
        check_model_folder(tmp_path)
    (tmp_path / "2.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0")
    with pytest.raises(NoSafetensors, match=r"2\.safetensors is only a git-lfs pointer; run 'git lfs pull'"):
        check_model_folder(tmp_path)
    (tmp_path / "2.safetensors").write_bytes(b"weights")
    assert check_model_folder(tmp_path) == tmp_path
    index.write_text("{}")
    with pytest.raises(NoSafetensors, match=r"index\.json cannot be read"):
        check_model_folder(tmp_path)
