"""Projections with a norm before and a residual after, on the CPU, against the reference."""

import pytest
import torch

from wina.kernels import available_backends, cpu, reference

if "cpu" not in available_backends():
    pytest.skip("the compiled CPU kernels were not built", allow_module_level=True)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}
OPS = torch.ops.wina


def values(*shape: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    allowed = TOLERANCE[wanted.dtype]
    torch.testing.assert_close(found, wanted, rtol=allowed, atol=allowed)


def far_from(x: torch.Tensor, share: float) -> torch.Tensor:
    """Return thresholds of which no value of x is near, so that rounding drops nothing else."""
    sizes = x.float().abs().flatten().sort().values
    gaps = sizes[1:] - sizes[:-1]
    middle = int(share * len(gaps))
    window = slice(max(middle - 20, 0), middle + 20)
    place = int(gaps[window].argmax()) + max(middle - 20, 0)
    return torch.full((x.shape[-1],), float(sizes[place] + gaps[place] / 2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("residual", [True, False])
def test_fused_linears(dtype: torch.dtype, rows: int, norm: bool, residual: bool) -> None:
    inside, out = 70, 45
    x = values(rows, inside, seed=0, dtype=dtype)
    scale = [values(inside, seed=1, dtype=dtype)] if norm else []
    seen = reference.rms_norm(x, scale[0], 1e-5) if norm else x
    weights = [
        cpu.input_major(values(out, inside, seed=2 + i, dtype=dtype) / inside**0.5)
        for i in range(2)
    ]
    thresholds = [far_from(seen, 0.5), far_from(seen, 0.2)]
    other = [values(rows, out, seed=5, dtype=dtype)] if residual else []
    found = OPS.fused_linears(x, scale, 1e-5, weights, thresholds, [], other)
    wanted = reference.fused_linears(
        x,
        scale[0] if norm else None,
        1e-5,
        weights,
        thresholds,
        residual=other[0] if residual else None,
    )
    for one, two in zip(found, wanted, strict=True):
        close(one, two)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5])
def test_fused_gated_mlp(dtype: torch.dtype, rows: int) -> None:
    inside, hidden = 64, 96
    x = values(1, rows, inside, seed=0, dtype=dtype)
    norm = values(inside, seed=1, dtype=dtype)
    shapes = [(hidden, inside), (hidden, inside), (inside, hidden)]
    weights = [
        cpu.input_major(values(*shape, seed=2 + i, dtype=dtype) / shape[1] ** 0.5)
        for i, shape in enumerate(shapes)
    ]
    seen = far_from(reference.rms_norm(x, norm, 1e-5), 0.5)
    thresholds = [seen, seen, torch.zeros(hidden)]
    other = values(1, rows, inside, seed=6, dtype=dtype)
    found = OPS.fused_gated_mlp(x, [norm], 1e-5, weights, thresholds, "silu", [], [other])
    close(
        found,
        reference.fused_gated_mlp(x, norm, 1e-5, weights, thresholds, "silu", residual=other),
    )


def test_what_does_not_fit_is_refused() -> None:
    x, weight = torch.randn(1, 8), cpu.input_major(torch.randn(4, 8))
    none = torch.zeros(8)
    with pytest.raises(RuntimeError, match="norm's weight"):
        OPS.fused_linears(x, [torch.ones(7)], 1e-5, [weight], [none], [], [])
    with pytest.raises(RuntimeError, match="residual"):
        OPS.fused_linears(x, [], 0.0, [weight], [none], [], [torch.randn(1, 5)])
