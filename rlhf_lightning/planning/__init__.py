"""How much memory a run will need, before it runs: its own code on tensors that have a shape and no numbers."""
