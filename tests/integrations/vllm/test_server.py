"""vLLM's OpenAI server, started by ``wina serve``, under a bounded load from this process."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integrations.vllm.conftest import QUESTIONS, Served, needs_vllm
from tests.integrations.vllm.engine import environment

pytestmark = needs_vllm
REQUESTS, AT_ONCE = 200, 8
WRITTEN = 24
CONTEXT = 512
PATIENCE = 600
OPTIONS = {"dtype": "float32", "block_size": 32, "max_num_seqs": 8}


def post(url: str, body: bytes) -> tuple[int, dict[str, Any]]:
    """Return the status and the JSON that the server answers."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, body, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


@pytest.fixture(scope="module")
def server(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a server of the sparse model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items()]
    arguments.append("--enforce-eager")  # starts in a third of the time
    command = [str(Path(sys.executable).with_name("wina")), "serve", "demo"]
    command += ["--plan", str(served.plan), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--served-model-name", "smol", "--max-model-len", str(CONTEXT), *arguments]
    cache = str(tmp_path_factory.getbasetemp() / "cache")
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=file,
            env=environment(VLLM_ENABLE_V1_MULTIPROCESSING="1", WINA_CACHE=cache),
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        _wait(process, address, log)
        yield address
        assert process.poll() is None, log.read_text()[-4000:]
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def _wait(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return
        except OSError:
            time.sleep(1)
    raise RuntimeError(f"the server did not start:\n{log.read_text()[-6000:]}")


@pytest.fixture(scope="module")
def offline(served: Served, prompts: list[list[int]], half: dict[str, Any]) -> dict[str, str]:
    """What the engine writes without a server: by prompt, as text."""
    decode = served.loaded.tokenizer.decode
    texts = [decode(ids[:WRITTEN], skip_special_tokens=True) for ids in half["tokens"]]
    return dict(zip([*map(str, prompts), *QUESTIONS], texts, strict=True))


async def _load(address: str, prompts: list[list[int]], offline: dict[str, str]) -> Counter[str]:
    from openai import AsyncOpenAI

    client = AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=300)
    seen: Counter[str] = Counter()
    gate = asyncio.Semaphore(AT_ONCE)
    common: dict[str, Any] = {
        "model": "smol",
        "temperature": 0,
        "max_tokens": WRITTEN,
        "extra_body": {"ignore_eos": True},
    }

    async def one(number: int) -> None:
        chat, stream, cancel = number % 2 == 0, number % 3 == 0, number % 10 == 9
        question = QUESTIONS[number % len(QUESTIONS)]
        prompt = prompts[number % 24]
        wanted = offline[question if chat else str(prompt)]
        async with gate:
            if chat:
                answer = await client.chat.completions.create(
                    messages=[{"role": "user", "content": question}],
                    stream=stream or cancel,
                    **common,
                )
            else:
                answer = await client.completions.create(
                    prompt=prompt, stream=stream or cancel, **common
                )
            text = ""
            if stream or cancel:
                async for piece in answer:
                    if not piece.choices:
                        continue
                    choice = piece.choices[0]
                    text += (choice.delta.content if chat else choice.text) or ""
                    if cancel and text:
                        await answer.close()
                        break
            else:
                choice = answer.choices[0]
                text = choice.message.content if chat else choice.text
        if cancel:
            seen["cancelled"] += 1
            assert wanted.startswith(text)
        else:
            seen["right" if text == wanted else "wrong"] += 1

    await asyncio.gather(*(one(number) for number in range(REQUESTS)))
    await client.close()
    return seen


def test_under_load(server: str, prompts: list[list[int]], offline: dict[str, str]) -> None:
    seen = asyncio.run(_load(server, prompts, offline))
    print(f"\n{REQUESTS} requests, {AT_ONCE} at once: {dict(seen)}")
    assert seen == {"right": REQUESTS - REQUESTS // 10, "cancelled": REQUESTS // 10}


def test_errors_are_clear(server: str) -> None:
    completions = f"{server}/v1/completions"
    status, found = post(completions, b"{this is not JSON")
    assert status in (400, 422)
    status, found = post(completions, b'{"model": "smol", "max_tokens": -1, "prompt": "a"}')
    assert status in (400, 422)
    long = json.dumps({"model": "smol", "prompt": [5] * (CONTEXT + 1), "max_tokens": 4})
    status, found = post(completions, long.encode())
    assert status == 400
    assert str(CONTEXT) in json.dumps(found)
    status, found = post(completions, b'{"model": "another", "prompt": "a"}')
    assert status == 404
    status, found = post(completions, b'{"model": "smol", "prompt": "The sea", "max_tokens": 4}')
    assert status == 200
    assert found["usage"]["completion_tokens"] == 4
