import json
import os
import subprocess
import sys
import textwrap
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from tests import families as cases
from tests.conformance import go_through
from tests.families import Case
from tests.helpers import make_model
from wina.errors import UsageError
from wina.models import Family, families, family_of, find_sites


class ScaledLinear(nn.Linear):
    """W x + b by another route, as families of their own have it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T


class ToyConfig(LlamaConfig):
    model_type = "wina_test_toy"


class ToyForCausalLM(LlamaForCausalLM):
    """A family that wina does not know: own linears, one of them never called, own names."""

    config_class = ToyConfig

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp.down_proj = ScaledLinear(48, 32, bias=False)
            layer.self_attn.never_called = nn.Linear(32, 32)
        self.post_init()


TOY = Family(
    name="toy",
    model_types=("wina_test_toy",),
    linears=(f"{__name__}.ScaledLinear",),
    dense=("mlp.up_proj",),
    kinds={"self_attn.o_proj": "out"},
)


@pytest.fixture
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a package with the entry point ``toy`` were installed."""
    if "wina_test_toy" not in CONFIG_MAPPING:
        CONFIG_MAPPING.register("wina_test_toy", ToyConfig)
        AutoModelForCausalLM.register(ToyConfig, ToyForCausalLM)
    point = EntryPoint("toy", f"{__name__}:TOY", "wina.families")

    def points(group: str) -> list[EntryPoint]:
        return [point] if group == "wina.families" else []

    monkeypatch.setattr("wina.registry.entry_points", points)
    monkeypatch.setattr(families, "_entries", dict(families._entries))
    monkeypatch.setattr(families, "_plugins_loaded", False)


@pytest.mark.usefixtures("_installed")
def test_a_family_from_outside_goes_the_whole_way(
    tokenizer: PreTrainedTokenizerFast, text: Path, tmp_path: Path
) -> None:
    outcome = go_through(Case("Toy", "wina_test_toy"), tokenizer, text, tmp_path)
    assert outcome.refusal == ""
    assert set(outcome.kinds) == {"q_proj", "k_proj", "v_proj", "out", "gate_proj", "down_proj"}
    assert outcome.linears == 12


PACKAGE = """
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from wina.models import Family


class Half(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T


class Config(LlamaConfig):
    model_type = "outsider"


class Outsider(LlamaForCausalLM):
    config_class = Config

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp.down_proj = Half(48, 32, bias=False)
        self.post_init()


AutoConfig.register("outsider", Config)
AutoModelForCausalLM.register(Config, Outsider)
FAMILY = Family(
    name="outsider",
    model_types=("outsider",),
    linears=(f"{__name__}.Half",),
    dense=("mlp.up_proj",),
    kinds={"self_attn.o_proj": "out"},
)
"""


def test_an_installed_package_brings_its_family_to_every_command(
    tokenizer: PreTrainedTokenizerFast, text: Path, tmp_path: Path
) -> None:
    site, folder = tmp_path / "site", tmp_path / "model"
    metadata = site / "outsider-1.0.dist-info"
    metadata.mkdir(parents=True)
    (site / "outsider.py").write_text(PACKAGE)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: outsider\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[wina.families]\noutsider = outsider:FAMILY\n")
    make_model("llama").save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "outsider", "architectures": ["Outsider"]}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer.save_pretrained(folder)
    script = """
        import sys
        from wina.cli import main

        folder, text = sys.argv[1:]
        settings = ["--tokens", "768", "--context", "128", "--dense-prefix", "4"]
        for command in (
            ["calibrate", folder, "--text", text, *settings, "-o", "calibration"],
            ["plan", "calibration", "--sparsity", "0.4", "-o", "plan"],
            ["run", folder, "--plan", "plan", "--prompt", "so", "--max-new-tokens", "4", "--json"],
        ):
            try:
                main(command)
            except SystemExit as ending:
                if ending.code:
                    raise
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(folder), str(text)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    plan = json.loads((tmp_path / "plan" / "plan.json").read_text())
    kinds = {linear["kind"] for linear in plan["linears"].values()}
    assert kinds == {"q_proj", "k_proj", "v_proj", "out", "gate_proj", "down_proj"}


@pytest.mark.usefixtures("_installed")
def test_a_family_may_be_refused_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = Family("refused", ("llama",), refusal="its weights are shared over the blocks")
    families.add("refused", refused)
    with pytest.raises(UsageError, match="LlamaForCausalLM: its weights are shared over"):
        find_sites(make_model("llama"))


def test_most_families_need_no_spec() -> None:
    assert family_of(make_model("qwen3")) == Family("", ())
    assert family_of(make_model("gpt2")).name == "gpt2"
    assert family_of(nn.Linear(1, 1)).name == ""


BY_LAYER = {"per_layer_input_gate", "per_layer_projection"}


@pytest.mark.parametrize("case", cases.DENSE, ids=lambda case: case.name)
def test_kinds_are_common_ones(case: Case) -> None:
    if case.refused:
        pytest.skip(case.refused)
    common = {"q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj"}
    common |= {"gate_proj", "up_proj", "gate_up_proj", "down_proj"}
    own = {
        "lfm2": {"in_proj", "out_proj"},
        "qwen3_5_text": {"in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"},
        "gemma3n_text": {"linear_left", "linear_right"} | BY_LAYER,
        "gemma4_text": BY_LAYER,
    }.get(case.model_type, set())
    assert {site.kind for site in find_sites(cases.make(case))} <= common | own


def test_a_subclass_of_linear_is_left_alone_unless_a_family_names_it() -> None:
    class Other(nn.Linear):
        pass

    model = make_model("llama")
    model.model.layers[0].mlp.up_proj.__class__ = Other
    names = [site.name for site in find_sites(model)]
    assert "model.layers.0.mlp.up_proj" not in names
    assert len(names) == 13
