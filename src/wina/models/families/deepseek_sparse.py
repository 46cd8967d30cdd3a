"""DeepSeek-V3.2 and GLM-5: an indexer chooses what attention looks at, and stays dense."""

from wina.models.families.base import Family, register

DEEPSEEK_SPARSE = register(
    Family(
        name="deepseek_sparse",
        model_types=("deepseek_v32", "glm_moe_dsa"),
        dense=("indexer.*",),
    )
)
