"""StarCoder2: attention by the common names, an MLP by GPT-2's."""

from wina.models.families.base import Family, register

STARCODER2 = register(
    Family(
        name="starcoder2",
        model_types=("starcoder2",),
        kinds={"mlp.c_fc": "up_proj", "mlp.c_proj": "down_proj"},
    )
)
