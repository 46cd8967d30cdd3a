"""LFM2: Llama's original names for the MLP."""

from wina.models.families.base import Family, register

LFM2 = register(
    Family(
        name="lfm2",
        model_types=("lfm2", "lfm2_moe"),
        kinds={
            "self_attn.out_proj": "o_proj",
            "feed_forward.w1": "gate_proj",
            "feed_forward.w3": "up_proj",
            "feed_forward.w2": "down_proj",
        },
    )
)
