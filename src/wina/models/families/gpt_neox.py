"""GPT-NeoX (Pythia), BLOOM and Persimmon: one fused query_key_value."""

from wina.models.families.base import Family, register

GPT_NEOX = register(
    Family(
        name="gpt_neox",
        model_types=("gpt_neox", "gpt_neox_japanese", "bloom", "persimmon"),
        kinds={
            "query_key_value": "qkv_proj",
            "attention.dense": "o_proj",
            "self_attention.dense": "o_proj",
            "self_attn.dense": "o_proj",
            "dense_h_to_4h": "up_proj",
            "dense_4h_to_h": "down_proj",
        },
    )
)
