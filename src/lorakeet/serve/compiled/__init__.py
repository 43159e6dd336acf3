"""Forward pass in compiled loops, for 8-bit models of the Llama family on a CPU."""

from lorakeet.serve.compiled.forward import CompiledForward as CompiledForward
from lorakeet.serve.compiled.forward import compiled_forward as compiled_forward
