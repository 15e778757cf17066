"""What the backend is in a vLLM that blasst does not know: an error, once it is asked for."""

from blasst.integrations.vllm import refusal

raise ImportError(refusal())
