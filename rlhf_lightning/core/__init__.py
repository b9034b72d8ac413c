"""Pure ground floor: batches, interfaces, reductions, token log-probabilities, KL estimates."""
