"""The distribution reward: moments, Fréchet distance, leave-one-out FID."""
