"""Loads causal language models."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any

from rankadaptor_optuna.llm.adaptable import features, n_positions
from rankadaptor_optuna.recovery.data import Examples
from rankadaptor_optuna.recovery.embedded import model_dir


def load_model(
    path: str | os.PathLike[str] | None = None,
    dtype: Any = None,  # noqa: ANN401
    device: str | None = None,
) -> tuple[Any, Any]:
    """Loads a causal language model and its tokenizer.

    Args:
        path: Model folder or Hub name. Default: the embedded model.
        dtype: A torch dtype, its name, or "auto", the checkpoint's dtype. Default: ``search_dtype(device)``.
        device: A torch device. Default: the GPU if there is one.

    Returns:
        (model, tokenizer).

    Raises:
        ValueError: There is no such model or device.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = os.fspath(model_dir() if path is None else path)
    if (not source or source.startswith((".", "~", "/")) or os.path.isabs(source)) and not os.path.isdir(source):
        raise ValueError(f"there is no model folder {source!r}.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype or search_dtype(device), trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        # transformers lists some 200 classes that it can load
        reason = " ".join(str(error).split()).partition(" Model type should be one of")[0]
        raise ValueError(f"cannot load a causal language model from {source!r}: {reason}") from error
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"cannot load a causal language model from {source!r}: it lacks {', '.join(missing[:3])}; "
            "a model with another head has no loss on text."
        )
    try:
        model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except ValueError:  # transformers refuses to move some quantised models: they stay where they were loaded
        if getattr(model, "hf_quantizer", None) is None:
            raise
    except (RuntimeError, AssertionError) as error:  # an AssertionError where torch was built without CUDA
        raise ValueError(f"cannot put the model on device {device!r}: {str(error).splitlines()[0]}") from error
    return model, tokenizer


def check_inputs(model: Any, examples: Examples) -> None:  # noqa: ANN401
    """Checks that a model knows the tokens of examples, and as many positions.

    Raises:
        ValueError: A token id is outside its vocabulary, or an example is longer than its table of positions.
    """
    largest, n_tokens = max(int(ids.max()) for ids in examples.ids), model.get_input_embeddings().weight.shape[0]
    if largest >= n_tokens:
        raise ValueError(
            f"the tokenizer gave token id {largest}, but the model knows {n_tokens} tokens: "
            "pass the model's own tokenizer."
        )
    longest, limit = max(map(len, examples.ids)), n_positions(model)
    if limit is not None and longest > limit:
        raise ValueError(
            f"an example has {longest} tokens, but {type(model).__name__} knows {limit} positions; lower block_length."
        )


def n_parameters(model: Any) -> int:  # noqa: ANN401
    """Number of parameters of a model; tied ones count once, quantised ones by their features."""
    packed = {}
    for module in model.modules():
        weight, size = getattr(module, "weight", None), features(module)
        if size is not None and weight is not None and not weight.is_floating_point():
            packed[id(weight)] = size[0] * size[1]
    return sum(packed.get(id(parameter), parameter.numel()) for parameter in model.parameters())


def quiet() -> None:
    """Hides progress bars and messages of model libraries, but errors, so that those of this package stay readable.

    Call it before any of them is imported: outside of a terminal it turns off the bars of downloads, too.
    """
    if not sys.stderr.isatty():
        for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
            os.environ.setdefault(name, "1")
    import transformers

    logging = transformers.utils.logging
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    warnings.filterwarnings("ignore", category=FutureWarning)  # of one library about another


def search_dtype(device: str | None = None) -> Any:  # noqa: ANN401
    """Returns the default dtype of a search: bfloat16 on a GPU that computes it natively, else float32.

    On a CPU bfloat16 is faster by a third, but its rounding moves a trial's loss by about 0.002 nats, as much as the
    differences between rank configurations.

    Args:
        device: A torch device. Default: the GPU if there is one.
    """
    import torch

    on_gpu = (device or "cuda").startswith("cuda") and torch.cuda.is_available()
    return torch.bfloat16 if on_gpu and torch.cuda.is_bf16_supported() else torch.float32
