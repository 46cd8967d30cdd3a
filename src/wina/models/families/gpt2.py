"""GPT-2 and what took over its names: two linears of a block are called c_proj."""

from wina.models.families.base import Family, register

GPT2 = register(
    Family(
        name="gpt2",
        model_types=("gpt2", "gpt_bigcode"),
        kinds={
            "attn.c_attn": "qkv_proj",
            "attn.c_proj": "o_proj",
            "mlp.c_fc": "up_proj",
            "mlp.c_proj": "down_proj",
        },
    )
)
