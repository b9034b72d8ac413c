"""Models: policies, scalar heads, the frozen reference; loading them and writing them as Hugging Face folders."""

import logging

# peft imports bitsandbytes where that is installed, which on some CPUs then advises to install a package that fetches
# kernels from a hub; nothing here calls what they would replace
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
