"""How well labels, qualities and decisions agree with the truth."""
