"""Signal to noise of leave-one-out FID rewards, by arithmetic and by simulation."""
