"""What all tests share: a tiny real model and tokenizer, one thread, and no network."""

from __future__ import annotations

import json
import os
import random
import socket
import sqlite3
import sys

import pytest
import sqlalchemy
from threadpoolctl import threadpool_limits

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, so before any test
# matrices of the performance model are small: two BLAS threads make a test ten times slower on a busy machine
os.environ["OPENBLAS_NUM_THREADS"] = "1"  # of subprocesses
threadpool_limits(1, user_api="blas")  # of this process, whose NumPy a plugin may have loaded already
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # of torch, here and in subprocesses: the workers share the cores

FAMILIES = {
    "llama": ("Llama", {}),
    "llama-biased": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {"sliding_window": 8}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
}


def _make_model(family="llama", **settings):
    """A tiny random model whose biases and norms are random too."""
    import torch
    import transformers

    stem, extra = FAMILIES[family]
    sizes = {
        "vocab_size": 256,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    torch.manual_seed(0)
    config = getattr(transformers, f"{stem}Config")(**(sizes | extra | settings))
    model = getattr(transformers, f"{stem}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def pytest_addoption(parser):
    parser.addoption("--fuzz-seeds", type=int, default=40, metavar="N", help="seeds of each fuzz test (default: 40)")


def pytest_generate_tests(metafunc):
    """Runs a test that takes ``fuzz_seed`` once per seed."""
    if "fuzz_seed" in metafunc.fixturenames:
        metafunc.parametrize("fuzz_seed", range(metafunc.config.getoption("fuzz_seeds")))


@sqlalchemy.event.listens_for(sqlalchemy.Engine, "connect")
def _without_waiting_for_the_disk(connection, _):
    if isinstance(connection, sqlite3.Connection):
        connection.execute("PRAGMA synchronous=OFF")


@pytest.fixture(autouse=True)
def one_thread(request):
    """Tiny matrices are slower on many threads, on a busy machine by far."""
    torch = sys.modules.get("torch")
    if torch is None or request.node.get_closest_marker("e2e"):
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def foreign_torch():
    """Call it to set torch up as another part of a user's program may have; undone after the test."""
    import torch

    dtype = torch.get_default_dtype()

    def set_up():
        torch.set_default_device("meta")
        torch.set_default_dtype(torch.float16)

    yield set_up
    torch.set_default_device(None)
    torch.set_default_dtype(dtype)


@pytest.fixture(params=list(FAMILIES))
def any_model(request):
    return _make_model(request.param)


@pytest.fixture
def model():
    return _make_model()


@pytest.fixture
def ids():
    import torch

    return torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def make_model():
    return _make_model


@pytest.fixture(scope="session")
def tokenizer():
    """One token per byte; byte 0 ends a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="Ā")


@pytest.fixture
def storage(request, tmp_path):
    """A fresh storage of the kind that a test asks for (indirectly): memory, sqlite, journal or grpc."""
    import optuna

    if request.param == "memory":
        yield optuna.storages.InMemoryStorage()
    elif request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'study.db'}"
    elif request.param == "journal":
        backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / "study.log"))
        yield optuna.storages.JournalStorage(backend)
    else:
        from optuna.storages._grpc.server import make_server

        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        server = make_server(optuna.storages.InMemoryStorage(), "localhost", port)
        server.start()
        proxy = optuna.storages.GrpcStorageProxy(host="localhost", port=port)
        proxy.wait_server_ready(timeout=60)
        yield proxy
        proxy.close()
        server.stop(None).wait()


@pytest.fixture
def local_task(tmp_path):
    """Folder of an lm-eval task, "facts": four choices of words, of which some model knows better."""
    draw = random.Random(1)
    words = ["rank", "layer", "prune", "head", "of", "the", "a", "model"]
    rows = [
        {"q": f"{i}: " + " ".join(draw.choices(words, k=3)), "o": draw.sample(words, 4), "gold": i % 4}
        for i in range(24)
    ]
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "facts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "facts.yaml").write_text(
        f"task: facts\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/facts.jsonl}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: '{{o}}'\n"
        "doc_to_target: '{{gold}}'\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n"
    )
    return folder


@pytest.fixture(scope="session")
def texts():
    draw = random.Random(0)
    words = ["rank", "layer", "prune", "head", "of", "the", "a", "model"]
    return [" ".join(draw.choices(words, k=30)) for _ in range(12)]


def pytest_collection_modifyitems(config, items):
    """Fast tests first; among parallel workers long ones first, so that the last worker does not end late."""
    is_parallel = hasattr(config, "workerinput")
    items.sort(key=lambda item: item.get_closest_marker("e2e") is not None, reverse=is_parallel)
