"""OPT, XGLM, Phi, NanoChat, GPT-J and CodeGen: plain MLPs of two numbered linears."""

from wina.models.families.base import Family, register

OPT = register(
    Family(
        name="opt",
        model_types=("opt", "xglm", "phi", "nanochat", "gptj", "codegen"),
        kinds={
            "self_attn.out_proj": "o_proj",
            "self_attn.dense": "o_proj",
            "attn.out_proj": "o_proj",
            "fc1": "up_proj",
            "fc2": "down_proj",
            "fc_in": "up_proj",
            "fc_out": "down_proj",
        },
    )
)
