"""What a run would need, from a model's config alone: memory, speed, key-value cache, scales, warnings. No weights."""
