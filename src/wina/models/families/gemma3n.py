"""Gemma 3n: what mixes its residual streams is a few numbers a token, and stays dense."""

from wina.models.families.base import Family, register

GEMMA3N = register(
    Family(
        name="gemma3n",
        model_types=("gemma3n_text",),
        dense=("altup.correction_coefs", "altup.prediction_coefs", "altup.modality_router"),
    )
)
