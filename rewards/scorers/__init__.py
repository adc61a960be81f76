"""Scorers: CLIP, HPSv2, class accuracy, and users' own."""
