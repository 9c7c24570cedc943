"""What the user's model is: how to load it, make a batch of records, and compute one loss an example.

``registry`` and ``checkpoints`` import neither torch nor transformers, so the command line may use them.
"""
