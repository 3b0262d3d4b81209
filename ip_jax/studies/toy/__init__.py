"""A toy of reward hacking that trains in minutes on a CPU: digits to sort, a loophole that pays,
and prompts of four words that are understood.
"""
