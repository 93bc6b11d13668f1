"""The loss at the hooks of trainers, one file each, imported where its trainer is: a few lines, no copy of a trainer.

Every trainer with a loop of one's own needs none of this: see the scripts in `examples/`.
"""
