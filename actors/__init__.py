"""The policy acting: models, KV-cached decoding, and the sampler role."""
