"""lm-eval's Hugging Face model (HFLM), which computes a context shared by several continuations only once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from lm_eval.models.huggingface import HFLM

Request = tuple[Any, list[int], list[int]]  # lm-eval's texts, tokens of the context, tokens of the continuation
Answer = tuple[float, bool]  # log-likelihood of the continuation, whether it is the greedy one


class _Group(NamedTuple):
    """Requests with one context, which form one sequence: the context, then the continuations one after the other."""

    where: list[int]  # indices of the requests
    context: list[int]
    continuations: list[list[int]]

    @property
    def length(self) -> int:
        # the last token of a continuation is no input
        return len(self.context) + sum(len(tokens) - 1 for tokens in self.continuations)

    @property
    def longest(self) -> int:
        """Length of the longest request as a sequence of its own."""
        return len(self.context) + max(map(len, self.continuations)) - 1


class SharedContextLM(HFLM):  # type: ignore[misc]
    """HFLM that answers consecutive requests with one context, such as the choices of an item, in one sequence.

    A mask shows each continuation the context and itself, and its positions follow those of the context, so the answers
    equal HFLM's up to rounding. HFLM answers all other requests: a context with a single continuation, a context that
    must be cut to fit the model or its sliding window, and all requests if the model's attention takes no such mask or
    its answers differ from HFLM's in one trial.

    Attributes:
        on_requests: Called with the number of requests of each forward pass.
        agreeing: Whether the answers agreed with HFLM's, by (config class, attention, dtype). Several instances may
            share it to save the trial.
    """

    on_requests: Callable[[int], None] | None = None
    agreeing: dict[Any, bool]

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:  # noqa: ANN401
        if self.on_requests is not None:
            self.on_requests(len(inps))
        return super()._model_call(inps, *args, **kwargs)

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        groups = [] if override_bs else self._groups(requests)  # rolling windows share one token at most
        if not groups or not self._agree(groups, requests):
            return list(super()._loglikelihood_tokens(requests, disable_tqdm, override_bs))
        answers: dict[int, Answer] = {}
        for batch in self._batches(groups):
            answers |= self._shared(batch)
            if self.on_requests is not None:
                self.on_requests(sum(len(group.where) for group in batch))
        alone = [i for i in range(len(requests)) if i not in answers]
        answers |= zip(alone, super()._loglikelihood_tokens([requests[i] for i in alone], disable_tqdm), strict=True)
        return [answers[i] for i in range(len(requests))]

    def _groups(self, requests: Sequence[Request]) -> list[_Group]:
        """Returns the groups of two requests up to a batch of them, the longest sequence first."""
        if self.backend != "causal" or self.config._attn_implementation not in ("eager", "sdpa"):
            return []
        text = self.config.get_text_config()
        windows = (getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size"))
        limit = min([self.max_length, *(window for window in windows if window)])
        found = []
        for context, run in groupby(range(len(requests)), key=lambda i: requests[i][1]):
            indices = list(run)
            for start in range(0, len(indices), self.batch_size):
                where = indices[start : start + self.batch_size]
                found.append(_Group(where, context, [requests[i][2] for i in where]))
        shared = [group for group in found if len(group.where) > 1 and group.longest <= limit]
        return sorted(shared, key=lambda group: -group.length)

    def _batches(self, groups: list[_Group]) -> Iterator[list[_Group]]:
        """Yields groups of similar length, with no more tokens in a batch than HFLM would have."""
        while groups:
            n = max(1, self.batch_size * groups[0].longest // groups[0].length)
            yield groups[:n]
            groups = groups[n:]

    def _agree(self, groups: list[_Group], requests: Sequence[Request]) -> bool:
        """Returns whether the answers equal HFLM's on the group with the most tokens of continuations."""
        dtype = next(self.model.parameters()).dtype
        key = (type(self.config), self.config._attn_implementation, dtype)
        if key not in self.agreeing:
            group = max(groups, key=lambda group: group.length - len(group.context))
            report, self.on_requests = self.on_requests, None
            try:
                expected = super()._loglikelihood_tokens([requests[i] for i in group.where], disable_tqdm=True)
                found = self._shared([group]).values()
                self.agreeing[key] = all(
                    abs(ours - theirs) <= torch.finfo(dtype).eps ** 0.5 * (1 + abs(theirs))  # set by hand
                    for (ours, _), (theirs, _) in zip(found, expected, strict=True)
                )
            except (TypeError, ValueError, RuntimeError):  # the model takes no mask or no positions
                self.agreeing[key] = False
            finally:
                self.on_requests = report
        return self.agreeing[key]

    def _shared(self, batch: list[_Group]) -> dict[int, Answer]:
        """Returns the answers of one forward pass, by index of the request."""
        length = max(group.length for group in batch)
        ids, positions = torch.zeros(2, len(batch), length, dtype=torch.long)
        part = torch.full((len(batch), length), -1)  # 0: context, 1, 2, ...: continuations; -1: padding, on the left
        rows, columns, targets = [], [], []  # of the logits to read
        for row, group in enumerate(batch):
            end = length - group.length + len(group.context)
            last, start = end - 1, length - group.length
            ids[row, start:end], part[row, start:end] = torch.tensor(group.context), 0
            positions[row, start:end] = torch.arange(len(group.context))
            for number, tokens in enumerate(group.continuations, start=1):
                start, end = end, end + len(tokens) - 1
                ids[row, start:end], part[row, start:end] = torch.tensor(tokens[:-1], dtype=torch.long), number
                positions[row, start:end] = len(group.context) + torch.arange(end - start)
                rows += [row] * len(tokens)
                columns += [last, *range(start, end)]
                targets += tokens
        seen = (part[:, None] == 0) | (part[:, None] == part[:, :, None])  # (batch, query, key)
        hidden = ~seen.tril()[:, None].to(self.device)
        dtype = next(self.model.parameters()).dtype
        mask = torch.zeros(hidden.shape, dtype=dtype, device=self.device).masked_fill(hidden, torch.finfo(dtype).min)
        kept = length - min(columns)
        with torch.no_grad():
            logits = self.model(
                input_ids=ids.to(self.device),
                attention_mask=mask,
                position_ids=positions.to(self.device),
                use_cache=False,
                logits_to_keep=kept,
            ).logits[:, -kept:]
            wanted = torch.tensor(targets, device=self.device)
            chosen = logits[rows, [column - length for column in columns]]  # (tokens, vocabulary)
            scores = chosen.log_softmax(-1, dtype=self.softmax_dtype).gather(1, wanted[:, None])[:, 0].tolist()
            greedy = (chosen.argmax(-1) == wanted).tolist()
        answers, start = {}, 0
        for group in batch:
            for i, tokens in zip(group.where, group.continuations, strict=True):
                end = start + len(tokens)
                answers[i] = (sum(scores[start:end]), all(greedy[start:end]))
                start = end
        return answers
