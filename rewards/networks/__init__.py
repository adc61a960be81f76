"""Networks on images: loading, checks before a run, preprocessing, features."""
