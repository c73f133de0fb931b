import os

# NumPy would start threads when torch imports it, and what threads hold would be held for ever in a fork.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
