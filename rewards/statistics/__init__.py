"""Files of feature statistics, as the FID tools write them."""
