"""Models: policies, scalar heads, the frozen reference; loading them and writing them as Hugging Face folders."""
