from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from rankadaptor_optuna.recovery.memory import peak_memory


def reported():
    found = {}
    with peak_memory(torch.device("cpu"), found.__setitem__):
        pass
    return found


@pytest.mark.parametrize(("platform", "unit"), [("linux", 1024), ("darwin", 1)])
def test_on_a_cpu_it_is_the_largest_resident_set_of_the_process(monkeypatch, platform, unit):
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=300 * 2**20 // unit))
    monkeypatch.setattr("rankadaptor_optuna.recovery.memory.sys", SimpleNamespace(platform=platform))
    assert reported() == {"peak_rss_mib": 300}


def test_it_is_not_reported_where_the_system_does_not_provide_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)
    assert reported() == {}


def test_it_is_reported_of_a_context_that_failed():
    pytest.importorskip("resource")
    found = {}
    with pytest.raises(MemoryError), peak_memory(torch.device("cpu"), found.__setitem__):
        raise MemoryError
    assert list(found) == ["peak_rss_mib"]
