"""The miniature, the default run: real digits, five small networks, and a judge."""
