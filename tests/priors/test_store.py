from __future__ import annotations

import dataclasses
import threading
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy

from rankadaptor_optuna.priors.store import PriorStore, Use, Version, parse_reference
from rankadaptor_optuna.surrogate.features import MLP
from rankadaptor_optuna.surrogate.prior import Prior


def prior(seed=0):
    rng = np.random.default_rng(seed)
    sizes = ((3, 5), (5, 4), (4, 2))
    mlp = MLP([rng.standard_normal(s) for s in sizes], [rng.standard_normal(s[1]) for s in sizes])
    return Prior(mlp, rng.standard_normal(2), rng.random(2), {"tasks": ["a", "b"], "gain": seed / 4})


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path / 'studies.db'}"


@pytest.fixture
def store(url):
    Path(url.removeprefix("sqlite:///")).touch()  # to SQLite, a database without tables
    return PriorStore(url)


def execute(url, statement, **values):
    engine = sqlalchemy.create_engine(url)
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text(statement), values)
    engine.dispose()


def versions(store):
    return [str(stored.version) for stored in store.versions()]


def test_a_version_is_read_back_to_the_bit_with_its_card(store, url):
    assert store.add("mine", prior(1)) == Version("mine", 1)
    found = PriorStore(url).load("mine")
    assert found.checksum == prior(1).checksum
    assert found.card == {"tasks": ["a", "b"], "gain": 0.25}


def test_versions_count_up_by_name_and_the_newest_is_the_default(store):
    for i, name in enumerate(["mine", "other", "mine", "Mine"]):
        store.add(name, prior(i))
    assert versions(store) == ["db:Mine@1", "db:mine@1", "db:mine@2", "db:other@1"]
    assert store.resolve("mine") == Version("mine", 2)
    assert store.load("mine").checksum == prior(2).checksum
    assert store.load("mine", 1).checksum == prior(0).checksum


def test_a_version_is_listed_with_its_size_time_and_studies(store):
    version = store.add("mine", prior())
    for study in ("b", "a", "a"):
        store.use(study, version, elsewhere=False)
    (stored,) = store.versions()
    assert stored.studies == ("a", "b")
    assert stored.n_bytes == len(prior().dumps())
    assert abs(datetime.now(timezone.utc).replace(tzinfo=None) - stored.made) < timedelta(minutes=1)


@pytest.mark.parametrize("text", ["db:", "db:a b", "db:mine@0", "db:mine@x", "mine", "db:-a", f"db:{'a' * 65}", "db:ä"])
def test_an_invalid_reference_is_refused(text):
    with pytest.raises(ValueError, match="expected a prior like db:NAME or db:NAME@3"):
        parse_reference(text)


@pytest.mark.parametrize("name", ["", "a b", "mine@1", "db:mine", "a" * 65])
def test_an_invalid_name_is_refused(name, store):
    with pytest.raises(ValueError, match="expected a prior like db:NAME"):
        store.add(name, prior())


def test_references_name_the_newest_or_one_version():
    assert parse_reference("db:a.B-c_1") == ("a.B-c_1", None)
    assert parse_reference("db:mine@12") == ("mine", 12)


def test_a_missing_version_is_named_with_the_existing_ones(store, url):
    assert store.versions() == []
    assert sqlalchemy.inspect(sqlalchemy.create_engine(url)).get_table_names() == []  # reading makes no tables
    with pytest.raises(ValueError, match=r"there is no prior db:mine in sqlite:.*; there is none at all"):
        store.load("mine")
    store.add("mine", prior())
    with pytest.raises(ValueError, match=r"there is no prior db:mine@2 in .*; there is db:mine@1\."):
        store.load("mine", 2)


def test_a_corrupt_version_is_named_and_the_others_are_read(store, url):
    for i in range(2):
        store.add("mine", prior(i))
    broken = bytearray(prior(1).dumps())
    broken[-1] ^= 1
    execute(url, "UPDATE rankadaptor_priors SET weights = :w WHERE version = 2", w=bytes(broken))
    with pytest.raises(ValueError, match=r"the prior db:mine@2 in sqlite.* is corrupt: its checksum is"):
        store.load("mine")
    assert store.load("mine", 1).checksum == prior(0).checksum


def test_a_version_of_a_newer_format_is_named(store, monkeypatch):
    with monkeypatch.context() as newer:
        newer.setattr("rankadaptor_optuna.surrogate.prior.FORMAT", "3")
        store.add("mine", prior())
    with pytest.raises(ValueError, match=r"prior db:mine@1 in sqlite.* has format '3'; this version reads '1' and '2'"):
        store.load("mine")


def test_pruning_keeps_the_newest_and_what_studies_use(store):
    for name in ["mine"] * 5 + ["other"] * 2:
        store.add(name, prior())
    store.use("a study", Version("mine", 1), elsewhere=True)
    assert store.prune(2, "mine", used=[Use("s", Version("mine", 2))]) == [Version("mine", 3)]
    assert versions(store) == ["db:mine@1", "db:mine@2", "db:mine@4", "db:mine@5", "db:other@1", "db:other@2"]
    assert store.prune(1) == [Version("mine", 2), Version("mine", 4), Version("other", 1)]
    assert store.add("mine", prior()) == Version("mine", 6)
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        store.prune(0)


def test_uses_and_versions_of_deleted_studies_are_collected(store):
    assert store.collect([]) == ([], [])
    for _ in range(5):
        store.add("mine", prior())
    alive, elsewhere = Use("alive", Version("mine", 1)), Use("elsewhere", Version("mine", 3))
    gone = [Use("gone", Version("mine", number)) for number in (1, 2, 3, 5)]
    for use in (alive, *gone):
        store.use(*use, elsewhere=False)
    store.use(*elsewhere, elsewhere=True)
    assert store.collect([alive]) == (gone, [Version("mine", 2)])  # 4 was never used, 5 is the newest
    assert {s.version.version: s.studies for s in store.versions()} == {1: ("alive",), 3: ("elsewhere",), 4: (), 5: ()}


def test_writers_at_the_same_moment_make_one_chain(url):
    stores, barrier = [PriorStore(url) for _ in range(4)], threading.Barrier(4)
    found = []

    def write(store, seed):
        barrier.wait()
        found.extend((store.add("mine", prior(seed)).version, seed) for _ in range(3))

    threads = [threading.Thread(target=write, args=(store, i)) for i, store in enumerate(stores)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(version for version, _ in found) == list(range(1, 13))
    for version, seed in found:
        assert stores[0].load("mine", version).checksum == prior(seed).checksum


@pytest.mark.parametrize(
    "url",
    [
        "sqlite:////no/such/folder/s.db",
        "postgresql+psycopg://me:s3cret@127.0.0.1:1/x",
        "nodatabase://me:s3cret@h/x",
        "postgresql://me:s3cret@127.0.0.1:port/x",
    ],
)
def test_a_database_that_cannot_be_reached_is_named_without_its_password(url):
    with pytest.raises(ValueError, match=r"the priors in .* cannot be reached") as caught:
        PriorStore(url).versions()
    assert "s3cret" not in str(caught.value)


def test_an_engine_serves_as_well_also_in_memory():
    engine = sqlalchemy.create_engine("sqlite://", poolclass=sqlalchemy.StaticPool)
    PriorStore(engine).add("mine", prior())
    assert PriorStore(engine).load("mine").checksum == prior().checksum


def test_a_large_prior_is_stored_whole(store):
    large = dataclasses.replace(prior(), card={"tasks": ["x" * 100] * 2000})
    store.add("mine", large)
    assert store.load("mine").card == large.card


@pytest.mark.parametrize("use", [(b"\xff", "mine", 1), (5, b"mine", 1), ("s", "mine", "new"), ("s", "mine", 1.5)])
def test_uses_of_other_types_are_no_uses(store, url, use):
    store.add("mine", prior())
    store.use("search", Version("mine", 1), elsewhere=True)
    study, name, version = use
    insertion = "INSERT INTO rankadaptor_prior_uses (study, name, version, elsewhere) VALUES (:s, :n, :v, 0)"
    execute(url, insertion, s=study, n=name, v=version)
    assert [stored.studies for stored in store.versions()] == [("search",)]
    assert store.collect({Use("search", Version("mine", 1))}) == ([], [])


def test_a_version_that_no_reference_names_does_not_count(store, url):
    store.add("mine", prior())
    row = "INSERT INTO rankadaptor_priors VALUES ('mine', 9223372036854775807, '2020-01-01', 'c', x'00')"
    execute(url, row)
    assert store.add("mine", prior(1)) == Version("mine", 2)
