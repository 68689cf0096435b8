"""`vft app`: a local page over the same code as the commands. `command.py` starts it; a file per tab."""
