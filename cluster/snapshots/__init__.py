"""The buffer of a snapshot of weights: whole or in pieces, and its checksum."""
