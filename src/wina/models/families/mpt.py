"""MPT: one fused Wqkv."""

from wina.models.families.base import Family, register

MPT = register(
    Family(
        name="mpt",
        model_types=("mpt",),
        kinds={"attn.Wqkv": "qkv_proj", "attn.out_proj": "o_proj"},
    )
)
