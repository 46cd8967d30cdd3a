"""JetMoE: attention is routed too, and its experts are a class of their own, which stays dense."""

from wina.models.families.base import Family, register

JETMOE = register(Family(name="jetmoe", model_types=("jetmoe",), dense=("router.layer",)))
