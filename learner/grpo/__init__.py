"""The mathematics of GRPO: advantages, loss, KL, off-policy corrections, entropy bonus."""
