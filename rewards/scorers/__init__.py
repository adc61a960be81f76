"""Scorers: CLIP, HPSv2, class accuracy, and user rewards."""
