"""Models by hub name: one brief question, against servers of this machine and a port where nobody listens."""

import http.server
import socket
import threading
import time

import pytest
from huggingface_hub import constants

from rlhf_core import hub
from rlhf_core.policy import require_model_source


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers every question with the server's status, and with what the hub says beside it."""

    def do_HEAD(self):
        status, headers = self.server.answer
        self.server.asked.append(self.path)
        self.send_response(status)
        for name, value in {"ETag": "abc", "Content-Length": "2", **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with http.server.HTTPServer(("127.0.0.1", 0), Hub) as serving:
        serving.asked = []
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()
        point_to(serving.server_port, monkeypatch)
        yield serving
        serving.shutdown()
        thread.join()


def point_to(port, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(hub, "hf_hub_url", lambda name, file: f"http://127.0.0.1:{port}/{name}/resolve/main/{file}")


@pytest.fixture
def nobody_listens(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        point_to(taken.getsockname()[1], monkeypatch)
        yield


@pytest.fixture
def silent(monkeypatch):
    """A server that takes connections and never answers."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        point_to(listening.getsockname()[1], monkeypatch)
        yield


def cached(monkeypatch):
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda name, file: "/cache/config.json")


def test_a_model_that_the_hub_has_is_asked_for_once(server):
    server.answer = (200, {})
    require_model_source("somebody/something")
    assert server.asked == ["/somebody/something/resolve/main/config.json"]


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (404, "RepoNotFound", r"no model folder 'some/thing' in '.*', and no model 'some/thing' on the hub; correct"),
        (401, "RepoNotFound", "no model 'some/thing' on the hub; correct the name, or set HF_TOKEN if"),
        (403, "GatedRepo", "for those alone whom its authors let in: ask there, then set HF_TOKEN"),
    ],
)
def test_what_the_hub_refuses_is_named(server, status, code, message):
    server.answer = (status, {"X-Error-Code": code})
    with pytest.raises(FileNotFoundError, match=message):
        require_model_source("some/thing")


def test_a_model_without_a_configuration_is_for_transformers_to_name(server):
    server.answer = (404, {"X-Error-Code": "EntryNotFound"})
    require_model_source("some/thing")


def test_a_hub_out_of_order_is_no_missing_model(server):
    server.answer = (503, {})
    with pytest.raises(FileNotFoundError, match=r"the hub cannot be reached at http://127.*\(.*503"):
        require_model_source("some/thing")


def test_without_a_network_it_fails_at_once_and_says_what_was_tried(nobody_listens):
    begin = time.perf_counter()
    with pytest.raises(FileNotFoundError) as raised:
        require_model_source("nobody/nothing")
    assert time.perf_counter() - begin < 5
    text = str(raised.value)
    for words in ("no model folder 'nobody/nothing' in", "none in the hub's cache", "http://127", "HF_HUB_OFFLINE=1"):
        assert words in text
    assert "\n" not in text


def test_a_network_that_swallows_everything_is_not_waited_for(silent, monkeypatch):
    monkeypatch.setattr(hub, "PATIENCE_S", 0.2)
    monkeypatch.delenv("HF_HUB_ETAG_TIMEOUT", raising=False)
    with pytest.raises(FileNotFoundError, match="cannot be reached"):
        require_model_source("nobody/nothing")


def test_the_users_own_patience_counts(monkeypatch):
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "40")
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 40)
    assert hub._patience() == 40


def test_a_cached_model_needs_no_network_and_no_second_question(nobody_listens, monkeypatch):
    cached(monkeypatch)
    require_model_source("somebody/something")
    assert constants.HF_HUB_OFFLINE


def test_offline_the_hub_is_not_asked(server, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="HF_HUB_OFFLINE is set, so the hub was not asked"):
        require_model_source("some/thing")
    cached(monkeypatch)
    require_model_source("some/thing")
    assert server.asked == []


def test_what_can_be_no_hub_name_is_no_folder(monkeypatch):
    with pytest.raises(FileNotFoundError, match="no model folder 'two words' in .*; give a folder written by"):
        require_model_source("two words")
