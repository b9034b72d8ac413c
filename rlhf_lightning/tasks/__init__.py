"""Small tasks whose answers can be checked: records, tokenizers and, where the general ones do not do, rewards."""
