"""Where calibration text comes from: files, a dataset, the model itself, Python's docstrings.

Each source yields token ids in pieces, so that neither text nor tokens need fit in memory.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import random
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Protocol

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from wina.errors import UsageError, WinaError
from wina.files import digest

DOCSTRING = 200  # characters, at least
PIECE = 1 << 18  # characters tokenized at once, cut at a line's end
MARK = "\u2063"  # stands for a message when a chat template is taken apart


class TextSource(Protocol):
    """A stream of token ids."""

    def describe(self) -> str:
        """Return what identifies the text, for records and for resuming."""
        ...

    def pieces(
        self, model: PreTrainedModel, tokenizer: Tokenizer, start: list[int], first: int
    ) -> Iterator[Sequence[int]]:
        """Yield token ids.

        ``start`` is how a fresh text starts; it is not yielded. A resumable source begins with
        its piece number ``first``.
        """
        ...

    @property
    def resumable(self) -> bool:
        """Whether ``pieces`` heeds ``first``."""
        ...


@dataclass(frozen=True)
class FileText:
    """UTF-8 text files, one after the other."""

    paths: tuple[Path, ...]
    resumable = False

    def __post_init__(self) -> None:
        for path in self.paths:
            check_text(path)

    def describe(self) -> str:
        """Return the files' names and contents' hashes."""
        return "files: " + ", ".join(f"{path.name} {digest(path)}" for path in self.paths)

    def pieces(
        self, model: PreTrainedModel, tokenizer: Tokenizer, start: list[int], first: int
    ) -> Iterator[Sequence[int]]:
        """Yield the ids of pieces that end at a line's end."""
        del model, start, first
        for path in self.paths:
            for text in _read_pieces(path):
                yield tokenizer(text, add_special_tokens=False)["input_ids"]


@dataclass(frozen=True)
class DatasetText:
    """The ``text`` column of a dataset on the Hugging Face hub, streamed."""

    name: str
    split: str = "train"
    column: str = "text"
    resumable = False

    def __post_init__(self) -> None:
        if importlib.util.find_spec("datasets") is None:
            raise WinaError("reading a dataset needs: pip install 'wina[datasets]'")

    def describe(self) -> str:
        """Return the dataset's name and split."""
        return f"dataset: {self.name} {self.split}"

    def pieces(
        self, model: PreTrainedModel, tokenizer: Tokenizer, start: list[int], first: int
    ) -> Iterator[Sequence[int]]:
        """Yield the ids of each row."""
        del model, start, first
        from datasets import load_dataset

        try:
            rows = load_dataset(self.name, split=self.split, streaming=True)
        except (OSError, ValueError) as error:
            raise WinaError(f"cannot read the dataset {self.name!r}: {error}") from error
        for row in rows:
            if self.column not in row:
                raise WinaError(f"dataset {self.name!r} has no column {self.column!r}")
            yield tokenizer(row[self.column] + "\n", add_special_tokens=False)["input_ids"]


# How texts of many kinds begin. What a model writes of its own accord is of one kind.
OPENERS = (
    "The history of ", "In 1987, ", "The city of ", "She was born in ", "The album ", "The film ",
    "The species ", "The battle of ", "He played ", "A tropical storm ", "Abstract\n\n",
    "Theorem 1. ", "The patient ", "Breaking news: ", "Chapter 1\n\n", "Once upon a time ",
    "\"I don't know,\" ", "Dear ", "Review: ", "Question: ", "How to ", "What is the best way to ",
    "You can use a ", "Ingredients:\n", "Step 1: ", "1. ", "- ", "| ", "Article 5. ",
    "The function ", "In this chapter, ", "Note: ", "Returns the ", "For example, if ", "Usage: ",
    "Syntax:\n\n", "Parameters\n----------\n", ">>> ", "import os\n\ndef ",
    "```python\nclass ", "#include <stdio.h>\n", "SELECT ", "{\n  \"", "<html>\n<body>\n", "$ ",
    "The following table ", "Solve the equation ", "The river ",
)  # fmt: skip


@dataclass(frozen=True)
class SelfText:
    """Text that the model writes itself, sampled: nothing but the model is needed.

    A quarter goes on from one random token of the vocabulary (as in LLM-QAT, arXiv 2305.17888),
    a quarter are chats, beginning with the user's turn, if the model has a template, and the rest
    goes on from the beginnings of texts of many kinds.
    """

    seed: int = 0
    batch: int = 16
    length: int = 256
    temperature: float = 0.8
    resumable = True

    def describe(self) -> str:
        """Return the settings."""
        return (
            f"self: seed {self.seed}, batches of {self.batch} x {self.length}, "
            f"temperature {self.temperature}, {len(OPENERS)} openers"
        )

    def pieces(
        self, model: PreTrainedModel, tokenizer: Tokenizer, start: list[int], first: int
    ) -> Iterator[Sequence[int]]:
        """Yield batch * length ids at a time, batch number ``first`` first, without end."""
        chat = _user_turn(tokenizer)
        while True:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + first)
            quarter = max(1, self.batch // 4)
            free = torch.randint(len(tokenizer), (quarter, 1), generator=generator).tolist()
            prompts = [[*start, *token] for token in free]
            prompts += [chat] * quarter if chat else []
            chosen = torch.randint(len(OPENERS), (self.batch - len(prompts),), generator=generator)
            for index in chosen.tolist():
                opener = tokenizer(OPENERS[index], add_special_tokens=False)["input_ids"]
                prompts.append([*start, *opener] or free[0])
            seed = int(torch.randint(0, 2**31, (1,), generator=generator))
            yield self._sample(model, [prompt[: self.length] for prompt in prompts], seed)
            first += 1

    @torch.no_grad()
    def _sample(
        self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], seed: int
    ) -> list[int]:
        """Return ``length`` ids for each prompt, its own first, one row after the other.

        The rows advance together, and one whose prompt is longer is given it token by token:
        there is no padding to get wrong. A text may end before its row does; what the model
        writes next is text too.
        """
        given = torch.full((len(prompts), self.length), -1)
        for row, prompt in zip(given, prompts, strict=True):
            row[: len(prompt)] = torch.tensor(prompt)
        given = given.to(model.device)
        generator = torch.Generator(model.device).manual_seed(seed)
        cache = DynamicCache(config=model.config)
        ids = given.clone()
        for position in range(1, self.length):
            last = ids[:, position - 1 : position]
            logits = model(last, past_key_values=cache, use_cache=True).logits[:, -1]
            probabilities = (logits.float() / self.temperature).softmax(-1)
            drawn = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
            ids[:, position] = torch.where(given[:, position] < 0, drawn, given[:, position])
        return [int(token) for token in ids.flatten().tolist()]


@dataclass(frozen=True)
class DocsText:
    """Docstrings of Python's standard library: text of another kind, at hand wherever wina runs.

    Beside what a model writes itself they make tuned plans better, also on texts that are like
    neither (docs/research.md). Past the last one it begins again.
    """

    size: int = 4_096
    resumable = True

    def describe(self) -> str:
        """Return which Python's they are."""
        return f"docstrings of Python {sys.version_info.major}.{sys.version_info.minor}"

    def pieces(
        self, model: PreTrainedModel, tokenizer: Tokenizer, start: list[int], first: int
    ) -> Iterator[Sequence[int]]:
        """Yield ``size`` ids at a time, piece number ``first`` first, without end."""
        del model, start
        texts = chain.from_iterable(_docstrings() for _ in repeat(None))
        stream = chain.from_iterable(
            tokenizer(text + "\n\n", add_special_tokens=False)["input_ids"] for text in texts
        )
        for _ in range(first * self.size):
            next(stream)
        while True:
            yield list(islice(stream, self.size))


def _library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _docstrings() -> Iterator[str]:
    """Yield long docstrings of the standard library, its files in a fixed random order."""
    left_out = {"site-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data"}
    paths = []
    for folder, folders, names in os.walk(_library()):
        folders[:] = [name for name in folders if name not in left_out]  # not walked at all
        paths += [Path(folder, name) for name in names if name.endswith(".py")]
    paths.sort()
    random.Random(0).shuffle(paths)
    for path in paths:
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (OSError, SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node) or ""
                if len(text) >= DOCSTRING:
                    yield text


@dataclass(frozen=True)
class DefaultText:
    """What is read where no text is given: the model's own and docstrings, in equal parts."""

    written: SelfText
    resumable = True

    def describe(self) -> str:
        """Return both."""
        return f"{self.written.describe()}; {self._docs().describe()}"

    def _docs(self) -> DocsText:
        return DocsText(self.written.batch * self.written.length)

    def pieces(
        self, model: PreTrainedModel, tokenizer: Tokenizer, start: list[int], first: int
    ) -> Iterator[Sequence[int]]:
        """Yield what is written row by row, and after each row as many ids of docstrings."""
        sources: tuple[TextSource, ...] = (self.written, self._docs())
        streams = [source.pieces(model, tokenizer, start, first) for source in sources]
        for both in zip(*streams, strict=True):
            yield [
                token
                for place in range(0, len(both[0]), self.written.length)
                for ids in both
                for token in ids[place : place + self.written.length]
            ]


def default_text(seed: int = 0, *, batch: int = 8, length: int = 256) -> TextSource:
    """Return what is read where no text is given.

    Args:
        seed: of the model's own text.
        batch: rows that the model writes at a time.
        length: ids of a row.
    """
    if not (_library() / "ast.py").is_file():  # an installation without sources
        return SelfText(seed, 2 * batch, length)
    return DefaultText(SelfText(seed, batch, length))


@dataclass(frozen=True)
class MixedText:
    """Several sources in turn, ``turn`` tokens of each, until all have ended.

    A plan that is tuned on one kind of text fits that kind; a model's own text beside it keeps
    the plan good elsewhere.
    """

    sources: tuple[TextSource, ...]
    turn: int = 2_048
    resumable = False

    def describe(self) -> str:
        """Return what identifies the sources."""
        return "; ".join(source.describe() for source in self.sources)

    def pieces(
        self, model: PreTrainedModel, tokenizer: Tokenizer, start: list[int], first: int
    ) -> Iterator[Sequence[int]]:
        """Yield ``turn`` ids of one source, then of the next."""
        del first
        streams = [
            chain.from_iterable(source.pieces(model, tokenizer, start, 0))
            for source in self.sources
        ]
        while streams:
            for stream in list(streams):
                ids = list(islice(stream, self.turn))
                if len(ids) < self.turn:
                    streams.remove(stream)
                yield ids


def _user_turn(tokenizer: Tokenizer) -> list[int]:
    """Return the ids up to where a user's first message would stand; none without a template."""
    if not getattr(tokenizer, "chat_template", None):
        return []
    try:
        text = tokenizer.apply_chat_template([{"role": "user", "content": MARK}], tokenize=False)
    except Exception:  # templates are programs of the model's author and may refuse anything
        return []
    head = str(text).partition(MARK)[0]
    return list(tokenizer(head, add_special_tokens=False)["input_ids"])


def check_text(path: Path) -> None:
    """Raise UsageError unless a file exists, is UTF-8 and holds some text; reads all of it."""
    if not path.is_file():
        raise UsageError(f"there is no text file {str(path)!r}")
    try:
        with path.open(encoding="utf-8") as file:
            blank = True
            while chunk := file.read(PIECE):
                blank = blank and not chunk.strip()
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text ({error.reason}); convert it first") from error
    if blank:
        raise UsageError(f"the text file {str(path)!r} is empty")


def read_text(path: Path) -> str:
    """Return a text file's content; raise UsageError as ``check_text`` does."""
    check_text(path)
    return path.read_text(encoding="utf-8")


def _read_pieces(path: Path) -> Iterator[str]:
    rest = ""
    with path.open(encoding="utf-8") as file:
        while chunk := file.read(PIECE):
            head, newline, tail = (rest + chunk).rpartition("\n")
            if newline:
                yield head + newline
            rest = tail
            if len(rest) > 4 * PIECE:  # a text without lines
                yield rest
                rest = ""
    if rest:
        yield rest
