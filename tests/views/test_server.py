from __future__ import annotations

import socket

import optuna
import pytest
from optuna_dashboard import get_note

from rankadaptor_optuna import publish_dashboard
from rankadaptor_optuna.database.attributes import PRIOR_ATTR
from rankadaptor_optuna.views.server import same_origin, serve


def test_a_study_whose_prior_is_missing_is_shown(make_study, tmp_path, monkeypatch):
    url = f"sqlite:///{tmp_path / 'study.db'}"
    study = make_study(3, storage=url)
    study.set_user_attr(PRIOR_ATTR, "db:mine@1")
    with pytest.raises(ValueError, match="prior"):
        publish_dashboard(optuna.load_study(study_name=study.study_name, storage=url))
    assert get_note(study) == ""

    def interrupt(server):
        raise KeyboardInterrupt

    monkeypatch.setattr("rankadaptor_optuna.views.server._Server.serve_forever", interrupt)
    serve(url, port=0)
    assert "Recommended ranks" in get_note(study)
    assert study.user_attrs[PRIOR_ATTR] == "db:mine@1"


def test_a_taken_port_is_refused(tmp_path):
    optuna.create_study(storage=f"sqlite:///{tmp_path / 'study.db'}")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"cannot listen on port {port} .* choose another port"):
            serve(f"sqlite:///{tmp_path / 'study.db'}", port=port)


@pytest.mark.parametrize(
    "url", ["sqlite:////no/such/folder/study.db", "no url", "postgresql://me:secret@127.0.0.1:1/study"]
)
def test_a_storage_that_cannot_be_opened_is_refused_without_its_password(url):
    with pytest.raises(ValueError, match="cannot open the storage") as error:
        serve(url, port=0)
    assert "secret" not in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("listens", "host", "origin", "status"),
    [
        ("127.0.0.1", "127.0.0.1:8080", None, "200"),
        ("127.0.0.1", "localhost:8080", "http://localhost:8080", "200"),
        ("::1", "[::1]:8080", "http://[::1]:8080", "200"),
        ("127.0.0.1", "evil.example:8080", None, "403"),
        ("127.0.0.1", "localhost.evil.example", None, "403"),
        ("127.0.0.1", "", None, "403"),
        ("127.0.0.1", "localhost:8080", "http://evil.example", "403"),
        ("127.0.0.1", "localhost:8080", "http://localhost:3000", "403"),
        ("127.0.0.1", "localhost:8080", "null", "403"),
        ("127.0.0.1", "[", None, "403"),
        ("my.lab", "my.lab:8080", "http://my.lab:8080", "200"),
        ("0.0.0.0", "my.lab:8080", "http://my.lab:8080", "200"),
        ("0.0.0.0", "my.lab:8080", "http://evil.example", "403"),
    ],
)
def test_other_names_and_pages_of_other_origins_are_refused(listens, host, origin, status):
    def app(environ, start_response):
        start_response("200 OK", [])
        return [b"deleted"]

    environ = {"REQUEST_METHOD": "DELETE", "HTTP_HOST": host} | ({} if origin is None else {"HTTP_ORIGIN": origin})
    answered = []
    body = b"".join(same_origin(app, listens)(environ, lambda status, headers: answered.append(status)))
    assert answered[0].split()[0] == status
    assert (body == b"deleted") == (status == "200")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"host": ""}, "the host is empty; give an address"),  # to the system, all networks of the machine
        ({"port": -1}, "port must be 0 to 65535, got -1"),
        ({"port": 65536}, "port must be 0 to 65535, got 65536"),
    ],
)
def test_an_empty_host_and_an_impossible_port_are_refused(tmp_path, monkeypatch, options, says):
    monkeypatch.setattr("rankadaptor_optuna.views.server._Server.serve_forever", lambda server: None)
    optuna.create_study(storage=f"sqlite:///{tmp_path / 'study.db'}")
    with pytest.raises(ValueError, match=says):
        serve(f"sqlite:///{tmp_path / 'study.db'}", **({"port": 0} | options))
