"""Official checkpoints of policies and tokenizers: named, fetched, read, loaded, exported."""
