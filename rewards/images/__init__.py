"""Sets of images on disk: folders, Parquet files, arrays; decoding and class labels."""
