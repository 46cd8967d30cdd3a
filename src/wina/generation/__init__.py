"""Generate text: prefill dense, decode sparse, tokens as they come."""

from wina.generation.loop import Generation, Sampling, generate
from wina.generation.prompt import encode_chat, encode_prompt

__all__ = ["Generation", "Sampling", "encode_chat", "encode_prompt", "generate"]
