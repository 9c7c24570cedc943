import os

# Two cores are shared by the test, the workers it starts and the servers. It counts only for who has not imported torch
# yet: a conftest would be too late for the very process that reads it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
