"""What the policy is asked for and compared with: classes, captions, real images."""
