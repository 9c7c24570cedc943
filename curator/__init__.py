"""curator: which of the data that just came in will help the next training run, and how do you know?"""

__version__ = "0.1.0"
