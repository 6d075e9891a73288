"""Promises where the hub cannot be reached: said in seconds and without noise; where it can, nothing is otherwise."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from loraloom.files import network


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Sets where the hub is, as HF_ENDPOINT does for a new process."""
    from huggingface_hub import close_session, constants

    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setattr(network, "BETWEEN", 0.01)

    def at(url: str) -> None:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", url)
        network._asked.cache_clear()
        close_session()

    return at


def closed() -> str:
    """A port of this machine at which nobody listens."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{one.getsockname()[1]}"


class Hub(http.server.BaseHTTPRequestHandler):
    """A hub with the files of one model, ``somebody/tiny``; all else is not there."""

    folder: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self.asked.append(f"{self.command} {self.path}")
        name = self.path.removeprefix("/somebody/tiny/resolve/main/")
        file = self.folder / name if name != self.path else None
        content = file.read_bytes() if file and file.is_file() else b""
        if "/tree/" in self.path:
            content = b"[]"
        self.send_response(200 if content else 404)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{len(content)}"')
        self.send_header("X-Repo-Commit", "a" * 40)
        if not content:
            self.send_header("X-Error-Code", "EntryNotFound" if name != self.path else "RepoNotFound")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_GET = do_HEAD

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, type[Hub]]]:
    served = type("Served", (Hub,), {"folder": tmp_path / "served", "asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), served)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", served
    server.shutdown()
    server.server_close()


def test_a_host_that_refuses_is_named_with_the_reason_and_asked_once(
    endpoint: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = closed()
    endpoint(url)
    asked = []
    once = network._ask
    monkeypatch.setattr(network, "_ask", lambda where: (asked.append(where), once(where))[1])
    for _ in range(3):
        assert network.unreachable() == f"{url} cannot be reached: [Errno 111] Connection refused"
    assert asked == [url]
    monkeypatch.setattr(network, "KNOWN", 1e-9)  # a minute later
    assert network.unreachable()
    assert asked == [url] * 2


def test_one_try_that_misses_is_not_the_last(endpoint: Callable[[str], None], hub: Any, monkeypatch: Any) -> None:
    endpoint(hub[0])
    tries: list[int] = []
    connect = socket.create_connection

    def flaky(*arguments: Any, **options: Any) -> socket.socket:
        tries.append(1)
        if len(tries) == 1:
            raise OSError(101, "Network is unreachable")
        return connect(*arguments, **options)

    monkeypatch.setattr(socket, "create_connection", flaky)
    assert network.unreachable() == ""
    assert len(tries) == 2


def test_a_name_whose_look_up_hangs_takes_no_longer_than_the_patience(
    endpoint: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint("https://hub.invalid")
    wake = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: wake.wait(60) and [])
    monkeypatch.setattr(network, "PATIENCE", 0.3)
    started = time.monotonic()
    assert network.unreachable() == "https://hub.invalid cannot be reached: no answer within 0.3 seconds"
    assert time.monotonic() - started < 5
    wake.set()


@pytest.mark.skipif(sys.platform != "linux", reason="how a full queue behaves is the system's own")
def test_a_host_that_swallows_what_it_is_sent_takes_no_longer_than_the_patience(
    endpoint: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as server, contextlib.ExitStack() as stack:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        for _ in range(4):  # its queue is full, and further ones hang
            one = stack.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex(server.getsockname())
        endpoint(f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(network, "CONNECT", 0.2)
        started = time.monotonic()
        assert "cannot be reached: " in network.unreachable()
        assert time.monotonic() - started < network.PATIENCE + 1


def test_whoever_answers_is_there_whatever_the_answer(endpoint: Callable[[str], None], hub: Any) -> None:
    url, served = hub
    endpoint(f"{url}/below")
    assert network.unreachable() == ""
    assert served.asked == ["HEAD /below"]


def test_whoever_is_slow_to_answer_is_there(endpoint: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "READ", 0.2)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        endpoint(f"http://127.0.0.1:{server.getsockname()[1]}")
        assert network.unreachable() == ""


def test_the_way_there_is_that_of_the_hubs_library_with_its_proxy(
    endpoint: Callable[[str], None], hub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", hub[0])
    monkeypatch.setenv("NO_PROXY", "")
    endpoint("http://hub.invalid")
    assert network.unreachable() == ""
    assert hub[1].asked == ["HEAD http://hub.invalid/"]


def test_who_works_offline_is_not_asked_for(endpoint: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    endpoint(closed())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(network, "_ask", lambda where: pytest.fail(where))
    assert network.unreachable() == ""


def test_whatever_is_looked_for_the_switches_of_the_hubs_libraries_are_left_alone(
    endpoint: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets.config
    from huggingface_hub import constants

    from loraloom.data.read.sources import resolve
    from loraloom.errors import DataError, ModelError
    from loraloom.models.load import load_config

    class Watched:
        def __set__(self, instance: Any, value: Any) -> None:
            pytest.fail(f"set to {value}")

    endpoint(closed())
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    for module in (constants, datasets.config):
        monkeypatch.setattr(module, "__class__", type("Module", (type(module),), {"HF_HUB_OFFLINE": Watched()}))
    with pytest.raises(ModelError, match="nor is it in the hub's cache"):
        load_config("nobody/tinny")
    with pytest.raises(DataError, match="there is no network"):
        list(resolve("nobody/reviws")[0])


def python(code: str, url: str, home: Path) -> subprocess.CompletedProcess[str]:
    """``code`` in a process of its own, with the hub at ``url``; it prints how long that took, apart from imports."""
    kept = {name: value for name, value in os.environ.items() if not name.upper().startswith(("HF_", "TRANSFORMERS_"))}
    kept = {name: value for name, value in kept.items() if not name.upper().endswith("_PROXY")}
    head = (
        "import time, datasets, transformers, transformers.models.bert.modeling_bert\n"
        "from loraloom.data.read.sources import resolve\nfrom loraloom.tasks import TASKS\n"
        "from loraloom.errors import LoraloomError\nfrom loraloom.models.load import load_base, load_tokenizer\n"
        "started = time.monotonic()\n"
    )
    return subprocess.run(
        [sys.executable, "-c", f"{head}{code}\nprint(time.monotonic() - started)"],
        capture_output=True,
        text=True,
        check=False,
        env=kept | {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"},
    )


def test_a_name_of_a_model_or_a_dataset_that_is_wrong_is_refused_in_seconds_and_without_noise(tmp_path: Path) -> None:
    url = closed()
    code = """
for ask in (lambda: load_tokenizer("nobody/tinny"), lambda: list(resolve("nobody/reviws")[0])):
    try: ask()
    except LoraloomError as error: print(error)
"""
    done = python(code, url, tmp_path)
    assert (done.returncode, done.stderr) == (0, ""), done
    model, data, seconds = done.stdout.splitlines()
    away = f"{url} cannot be reached: [Errno 111] Connection refused"
    assert model.startswith(
        f"nobody/tinny (no folder of this name is here, so it was looked for on the hub, but {away}): its tokenizer "
        "cannot be loaded ("
    )
    assert data == (
        "nobody/reviws: no such file or folder here; as the name of a dataset on the hub it would have to be fetched, "
        f"and there is no network ({away})"
    )
    assert float(seconds) < 15  # of a machine that is busy; the libraries alone wait for 23 seconds for each


def test_a_model_of_a_mirror_is_fetched_and_afterwards_found_without_it(
    encoder_folder: Path, hub: Any, tmp_path: Path
) -> None:
    url, served = hub
    shutil.copytree(encoder_folder, tmp_path / "served")
    code = (
        'model, new = load_base("somebody/tiny", TASKS["seq-cls"], "float32", ["a", "b"])\n'
        'print(new, len(load_tokenizer("somebody/tiny")), float(model.bert.embeddings.word_embeddings.weight.sum()))'
    )
    first = python(code, url, tmp_path / "home")
    assert first.returncode == 0, (first, served.asked)
    assert "GET /somebody/tiny/resolve/main/model.safetensors" in served.asked
    assert "Retrying" not in first.stderr
    again = python(code, closed(), tmp_path / "home")
    assert again.returncode == 0, again
    assert again.stdout.splitlines()[0] == first.stdout.splitlines()[0]
    assert "Retrying" not in again.stderr
    assert float(again.stdout.splitlines()[1]) < 15


def test_a_dataset_that_was_fetched_once_is_found_without_a_network(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetInfo

    place = tmp_path / "datasets" / "somebody___reviews" / "default" / "0.0.0" / "abc"
    rows = Dataset.from_dict({"text": ["good", "bad"]})
    rows.save_to_disk(tmp_path / "saved")
    place.mkdir(parents=True)
    shutil.copy(next((tmp_path / "saved").glob("*.arrow")), place / "reviews-train.arrow")
    info = DatasetInfo(features=rows.features, builder_name="json", dataset_name="reviews", config_name="default")
    info.version = "0.0.0"
    info.splits = {"train": {"name": "train", "num_bytes": 10, "num_examples": 2, "dataset_name": "reviews"}}
    (place / "dataset_info.json").write_text(json.dumps({**info._to_yaml_dict(), "features": rows.features.to_dict()}))
    done = python('print([row.fields["text"] for row in resolve("somebody/reviews")[0]])', closed(), tmp_path)
    assert done.returncode == 0, done
    assert done.stdout.splitlines()[0] == "['good', 'bad']"
    assert "Retrying" not in done.stderr
