import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from wina.errors import UsageError
from wina.layers import Phase, SparseConv1D, SparseLinear
from wina.layers.linear import (
    SparseLayer,
    align,
    features,
    is_linear,
    make_dense,
    make_sparse,
    matrix,
    refresh,
)


def sparse(
    module: nn.Module, vector: torch.Tensor, keep: int | None = None, rows: object = True
) -> SparseLayer:
    phase = Phase()
    phase.rows = rows  # type: ignore[assignment]
    make_sparse(module, vector, "threshold" if keep is None else "topk", keep, phase)
    assert isinstance(module, SparseLayer)
    return module


@pytest.fixture(params=["linear", "linear without bias", "conv1d"])
def dense(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    if request.param == "conv1d":
        made = Conv1D(5, 8)
        nn.init.normal_(made.bias)
        return made
    return nn.Linear(8, 5, bias=request.param == "linear")


def expected(module: nn.Module, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return functional.linear(x * mask, matrix(module), module._parameters["bias"])


def test_every_kind_computes_the_masked_product(dense: nn.Module) -> None:
    x = torch.randn(2, 3, 8)
    thresholds = torch.linspace(0, 1.5, 8)
    want = expected(dense, x, x.abs() >= thresholds)
    torch.testing.assert_close(sparse(dense, thresholds)(x), want)


def test_topk_keeps_the_highest_scores(dense: nn.Module) -> None:
    x = torch.randn(2, 3, 8)
    scales = torch.rand(8) + 0.5
    kept = (x.abs() * scales).topk(3, -1).indices
    mask = torch.zeros_like(x).scatter(-1, kept, 1.0)
    want = expected(dense, x, mask)
    torch.testing.assert_close(sparse(dense, scales, keep=3)(x), want)


@pytest.mark.parametrize("keep", [None, 3])
def test_dense_positions_are_as_they_were(dense: nn.Module, keep: int | None) -> None:
    x = torch.randn(2, 3, 8)
    before = dense(x)
    layer = sparse(dense, torch.ones(8), keep, rows=torch.tensor([False, True, False]))
    after = layer(x)
    torch.testing.assert_close(after[:, ::2], before[:, ::2])
    torch.testing.assert_close(after[:, 1], expected(layer, x, layer.mask(x))[:, 1])
    assert not torch.allclose(after[:, 1], before[:, 1])
    layer.phase.rows = False
    assert torch.equal(layer(x), before)


def test_nothing_to_drop_is_bit_equal_and_not_active(dense: nn.Module) -> None:
    x = torch.randn(2, 3, 8)
    before = dense(x)
    layer = sparse(dense, torch.zeros(8))
    assert not layer.active
    assert torch.equal(layer(x), before)
    make_dense(layer)
    layer = sparse(dense, torch.ones(8), keep=8)
    assert not layer.active
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("keep", [None, 3])
def test_an_added_bias_counts_on_sparse_positions_only(dense: nn.Module, keep: int | None) -> None:
    x, added = torch.randn(2, 3, 8), torch.linspace(1, 2, 5)
    phase = Phase()
    before = dense(x)
    make_sparse(dense, torch.ones(8), "threshold" if keep is None else "topk", keep, phase)
    assert isinstance(dense, SparseLayer)
    phase.rows = True
    without = dense(x)
    make_dense(dense)
    make_sparse(dense, torch.ones(8), "threshold" if keep is None else "topk", keep, phase, added)
    torch.testing.assert_close(dense(x), without + added)
    phase.rows = torch.tensor([False, True, False])
    torch.testing.assert_close(dense(x)[:, 1], (without + added)[:, 1])
    torch.testing.assert_close(dense(x)[:, ::2], before[:, ::2])
    phase.rows = False
    assert torch.equal(dense(x), before)
    make_dense(dense)
    assert "sparse_bias" not in vars(dense)["_buffers"]


def test_a_narrower_module_keeps_its_vector_in_float32() -> None:
    layer = sparse(nn.Linear(4, 4), torch.full((4,), 0.1))
    layer.to(torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16
    assert layer.vector.dtype == torch.float32
    assert (layer.vector == 0.1).all()


def test_nan_reaches_the_output() -> None:
    layer = sparse(nn.Linear(2, 2), torch.full((2,), torch.inf))
    assert layer(torch.tensor([[float("nan"), 1.0]])).isnan().all()


def test_a_layer_goes_back_to_the_same_object_and_state(dense: nn.Module) -> None:
    kind, names = type(dense), set(vars(dense))
    parameters = dict(dense.named_parameters())
    handle = dense.register_forward_hook(lambda *_: None)
    layer = sparse(dense, torch.ones(8))
    assert layer is dense
    assert isinstance(layer, kind)
    assert "thresholds" in layer.state_dict()
    make_dense(layer)
    assert type(dense) is kind
    assert set(vars(dense)) == names
    assert all(value is parameters[name] for name, value in dense.named_parameters())
    assert handle.id in dense._forward_hooks
    assert "thresholds" not in dense.state_dict()


def test_the_vector_is_named_for_what_it_holds() -> None:
    assert sparse(nn.Linear(2, 2), torch.ones(2)).vector_name == "thresholds"
    assert sparse(nn.Linear(2, 2), torch.ones(2), keep=1).vector_name == "scales"


def test_refresh_sees_a_changed_vector() -> None:
    layer = sparse(nn.Linear(2, 2), torch.zeros(2))
    layer.vector.fill_(1.0)
    refresh(layer)
    assert layer.active


def test_subclasses_and_other_modules_are_refused() -> None:
    class Own(nn.Linear):
        pass

    assert not is_linear(Own(2, 2))
    for module in (Own(2, 2), nn.Embedding(2, 2)):
        with pytest.raises(UsageError, match=type(module).__name__):
            make_sparse(module, torch.ones(2), "threshold", None, Phase())


def test_features_and_matrix_do_not_depend_on_storage() -> None:
    for module, kind in ((nn.Linear(8, 5), SparseLinear), (Conv1D(5, 8), SparseConv1D)):
        assert is_linear(module)
        assert features(module) == (8, 5)
        assert matrix(module).shape == (5, 8)
        assert isinstance(sparse(module, torch.ones(8)), kind)
        assert is_linear(module)
        assert features(module) == (8, 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_give_narrow_outputs(dtype: torch.dtype) -> None:
    module = nn.Linear(8, 5).to(dtype)
    x = torch.randn(1, 8).to(dtype)
    want = functional.linear(torch.where(x.abs() >= 0.5, x, 0), module.weight, module.bias)
    got = sparse(module, torch.full((8,), 0.5))(x)
    assert got.dtype == dtype
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("shape", "expected_rows"),
    [
        ((2, 3, 8), [False, True, True]),
        ((6, 8), [False, True, True, False, True, True]),
        ((2, 2, 8), [True, True]),
        ((1, 1, 8), [True]),
    ],
)
def test_align_follows_flattened_and_cut_inputs(
    shape: tuple[int, ...], expected_rows: list[bool]
) -> None:
    rows = torch.tensor([False, True, True])
    assert align(rows, torch.zeros(shape))[:, 0].tolist() == expected_rows
