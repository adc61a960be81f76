"""Weights that hosts pass on to each other, piece by piece, through Ray's object stores."""
