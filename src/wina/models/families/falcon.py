"""Falcon: its linears are a subclass that rounds between the product and the bias."""

from wina.models.families.base import Family, register

FALCON = register(
    Family(
        name="falcon",
        model_types=("falcon",),
        linears=("transformers.models.falcon.modeling_falcon.FalconLinear",),
        kinds={
            "query_key_value": "qkv_proj",
            "self_attention.dense": "o_proj",
            "dense_h_to_4h": "up_proj",
            "dense_4h_to_h": "down_proj",
        },
    )
)
