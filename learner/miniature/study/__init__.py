"""The study on the miniature: its parts, their arms, training and evaluation of each, results."""
