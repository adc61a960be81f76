"""How other processes find a running job and ask it for something."""
