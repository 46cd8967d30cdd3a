"""Compile the masked product for Hopper without a device, in a process that does not interpret."""

from __future__ import annotations

import re

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from wina.kernels.triton.product import _product

CONSTANTS = {"ELEMENT": tl.bfloat16, "CHANNELS": 64, "FLAGGED": True}
POINTERS = {"x": "*bf16", "flags": "*u8", "sums": "*fp32", "tickets": "*i32"}
ADDRESSES = ("weight", "limits", "out")  # where there is no bias, 0, an integer of 32 bits


def build(rows: int, columns: int, split: int, even: bool, turned: bool = False) -> str:
    """Return the PTX."""
    chosen = {"ROWS": rows, "COLUMNS": columns, "SPLIT": split, "SHARE": 4096 // split}
    constants = {**CONSTANTS, **chosen, "EVEN": even, "TURNED": turned}
    signature, hints = {}, {}
    for place, name in enumerate(_product.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        is_address = name.rstrip("012") in ADDRESSES
        signature[name] = POINTERS.get(name, "i64" if is_address else "i32")
        if name in POINTERS or name.startswith(("stride", "pitch", "outputs", "inputs")):
            hints[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(_product, signature, constants, hints)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_stages": 3})
    return str(made.asm["ptx"])


few = build(16, 64, 2, True)
assert "mma.sync" in few
copies = re.findall(r"cp\.async\.\w+\.shared\.global.*?, (0x\w+), ", few)
assert len(copies) > 16  # three stages of a weight's tile, and of x
assert set(copies) == {"0x10"}  # bytes: a lost alignment shows here, as 4 or none
assert not re.search(r"ld\.global\S*evict_first", few)
assert "wgmma" in build(64, 64, 1, False)
turned = build(32, 128, 1, True, turned=True)
assert re.search(r"wgmma\S*m64n32", turned)
copies = re.findall(r"cp\.async\.\w+\.shared\.global.*?, (0x\w+), ", turned)
assert len(copies) > 16
assert set(copies) == {"0x10"}
