"""The job that trains towers and ranker on a prepared data set and measures them."""

import os

# Threads of torch that wait for each other must sleep, not spin: beside one other busy process on two cores, spinning
# made the ranker's passes thirty times slower. OpenMP reads this when torch is loaded, which is after this line.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
