"""lm-evaluation-harness: its HFLM around a dense or sparse model.

Log likelihoods are scored with every position sparse, the question's too: questions are short, and
a dense prefix would hide what sparsity does to them. Generation runs as it would be served, the
prompt as the plan says (dense) and what follows sparse.

Importing this module makes ``--model wina`` known to the harness; ``wina-lm-eval`` is the harness's
own command line after that import.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from wina.errors import UsageError
from wina.layers import SparsityCounter, phase_of, sparsify
from wina.models import identify, load_model, start_ids
from wina.plan import Plan
from wina.progress import bar

PIECE = 32  # requests between two saves
SCORING = "log likelihoods: every position sparse; generation: prompt as the plan says, then sparse"


class Answers:
    """The harness's answers by request, kept in a file of JSON lines as they come.

    Attributes:
        path: the file; None keeps them in memory only.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._values: dict[str, Any] = {}
        self._weights: dict[str, tuple[int, int]] = {}  # by key; the same object for a piece
        self._used: dict[str, tuple[int, int]] = {}
        if path is not None and path.exists():
            content = path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            if len(whole) < len(content):  # the last line was being written when it was killed
                path.write_bytes(whole)
            for line in whole.splitlines():
                record = json.loads(line)
                self._keep(record["answers"], record["saved"], record["spent"])

    def add(self, answers: Mapping[str, Any], saved: int, spent: int) -> None:
        """Keep a piece's answers, and how many weights of all were not touched for them."""
        self._keep(answers, saved, spent)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            record = {"answers": answers, "saved": saved, "spent": spent}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def take(self, key: str) -> Any:
        """Return the answer, and count what its piece touched."""
        self._used[key] = self._weights[key]
        return self._values[key]

    def restart(self) -> None:
        """Count what is touched from here on."""
        self._used = {}

    @property
    def sparsity(self) -> float | None:
        """Share of weights not touched for the answers taken; None if none were counted."""
        pieces = {id(weights): weights for weights in self._used.values()}.values()
        spent = sum(piece[1] for piece in pieces)
        return sum(piece[0] for piece in pieces) / spent if spent else None

    def _keep(self, answers: Mapping[str, Any], saved: int, spent: int) -> None:
        weights = (saved, spent)
        self._values.update(answers)
        self._weights.update(dict.fromkeys(answers, weights))


@register_model("wina")
class WinaLM(HFLM):  # type: ignore[misc]
    """A model for the harness.

    Args:
        pretrained: hub id, folder, GGUF file or ``demo``; or a loaded model, with ``tokenizer``.
        plan: a plan, or its folder or hub id; None leaves the model dense. The model stays sparse
            afterwards.
        tokenizer: of a loaded model.
        answers: where to keep answers and to find those of an interrupted run.
        device: as in ``wina eval``.
        dtype: as in ``wina eval``.
        batch_size: requests of equal length that share a forward pass; nothing is ever padded
            for log likelihoods.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        plan: str | Plan | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        answers: Answers | None = None,
        device: str | None = "auto",
        dtype: str = "auto",
        revision: str | None = None,
        trust_remote_code: bool = False,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        **options: Any,
    ) -> None:
        del max_batch_size
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise UsageError(f"batch_size must be a whole number; got {batch_size!r}")
        found = Plan.load(plan) if isinstance(plan, str) else plan
        if isinstance(pretrained, str):
            if device is None or (device.startswith("cuda") and not torch.cuda.is_available()):
                device = "auto"  # the harness asks for cuda:0 unless told otherwise
            loaded = load_model(
                pretrained,
                dtype=dtype,
                device=device,
                revision=revision,
                trust_remote_code=trust_remote_code,
            )
            model, tokenizer, name = loaded.model, loaded.tokenizer, loaded.name
            if found is not None:
                found.document.model.check(identify(model, name))
        else:
            model = pretrained
        if tokenizer is None:
            raise UsageError("a loaded model needs its tokenizer: tokenizer=...")
        super().__init__(
            model,
            backend="causal",
            tokenizer=_starting_alike(model, tokenizer),
            batch_size=int(batch_size),
            softmax_dtype="float32",
            **options,
        )
        self.answers = answers or Answers()
        self._counts = (0, 0)
        if found is not None:
            sparsify(model, found)

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Answer the harness's requests for log likelihoods, with wina's progress bar alone."""
        del disable_tqdm
        return super().loglikelihood(requests, disable_tqdm=True)  # type: ignore[no-any-return]

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        del disable_tqdm, override_bs
        keys = [_key("loglikelihood", context, following) for _, context, following in requests]
        # Equal lengths only, so that nothing is padded; equal contexts side by side, since the
        # harness answers continuations of one token from one pass.
        order = sorted(
            range(len(keys)),
            key=lambda i: (-len(requests[i][1]) - len(requests[i][2]), requests[i][1]),
        )
        waiting: dict[int, list[tuple[str, Any]]] = {}
        for i in order:
            length = len(requests[i][1]) + len(requests[i][2])
            waiting.setdefault(length, []).append((keys[i], requests[i]))
        compute = super()._loglikelihood_tokens
        self._complete(
            [list(dict(group).items()) for group in waiting.values()],
            lambda piece: compute(piece, disable_tqdm=True),
        )
        return [(float(x), bool(greedy)) for x, greedy in map(self.answers.take, keys)]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Answer the harness's requests for text; one asked twice is answered twice."""
        del disable_tqdm
        seen: Counter[str] = Counter()
        keys = []
        for request in requests:
            key = _key("generate", *request.args)
            keys.append(f"{key}-{seen[key]}")
            seen[key] += 1
        compute = super().generate_until
        self._complete(
            [list(zip(keys, requests, strict=True))],
            lambda piece: compute(piece, disable_tqdm=True),
        )
        return [str(self.answers.take(key)) for key in keys]

    def _complete(
        self,
        groups: Sequence[Sequence[tuple[str, Any]]],
        compute: Callable[[list[Any]], Sequence[Any]],
    ) -> None:
        """Compute the answers that are missing, a piece of one group at a time."""
        total = sum(map(len, groups))
        missing = [[pair for pair in group if pair[0] not in self.answers] for group in groups]
        with bar("requests", total, total - sum(map(len, missing))) as advance:
            for piece in _pieces(missing):
                self._counts = (0, 0)
                found = compute([request for _, request in piece])
                keys = [key for key, _ in piece]
                self.answers.add(dict(zip(keys, found, strict=True)), *self._counts)
                advance(len(piece))

    def _model_call(self, inps: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        phase = phase_of(self.model)
        with nullcontext() if phase is None else phase.force("sparse"), self._counted():
            logits: Tensor = super()._model_call(inps, *args, **kwargs)
            return logits

    def _model_generate(self, *args: Any, **kwargs: Any) -> Tensor:
        with self._counted():
            ids: Tensor = super()._model_generate(*args, **kwargs)
            return ids

    @contextmanager
    def _counted(self) -> Iterator[None]:
        with SparsityCounter(self.model) as counter:
            yield
        saved, spent = counter.weights
        self._counts = (self._counts[0] + saved, self._counts[1] + spent)


def main() -> None:
    """Run the harness's own command line, which then knows ``--model wina``."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


def _starting_alike(model: PreTrainedModel, tokenizer: Tokenizer) -> Tokenizer:
    """Return a copy of the tokenizer that starts texts as the model was trained to see them."""
    own = copy.deepcopy(tokenizer)
    start = start_ids(model, tokenizer)
    if start and own("x")["input_ids"][: len(start)] != start:
        own.add_bos_token = True
        if own("x")["input_ids"][: len(start)] != start:
            raise UsageError(
                "the model was trained with BOS before each text, and its tokenizer cannot be told "
                "to add it; save the tokenizer with a post-processor that does"
            )
    return own


def _pieces(groups: Sequence[Sequence[Any]]) -> Iterator[Sequence[Any]]:
    for group in groups:
        for first in range(0, len(group), PIECE):
            yield group[first : first + PIECE]


def _key(kind: str, *content: Any) -> str:
    text = json.dumps([kind, *content], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


if __name__ == "__main__":
    main()
