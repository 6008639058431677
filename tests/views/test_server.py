from __future__ import annotations

import socket

import optuna
import pytest
from optuna_dashboard import get_note

from rankadaptor_optuna import publish_dashboard
from rankadaptor_optuna.attributes import PRIOR_ATTR
from rankadaptor_optuna.views.server import serve


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
