"""The miniature: real digits, five small networks and a judge, for the same program."""
