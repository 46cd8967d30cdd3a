"""Generate text: prefill dense, decode sparse, tokens as they come."""

from wina.generation.decoder import Decoder, Mode
from wina.generation.loop import Generation, generate
from wina.generation.prompt import encode_chat, encode_prompt
from wina.generation.sampling import Sampling

__all__ = [
    "Decoder",
    "Generation",
    "Mode",
    "Sampling",
    "encode_chat",
    "encode_prompt",
    "generate",
]
