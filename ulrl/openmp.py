"""Imported before torch, which loads OpenMP: its threads sleep while they wait for each other.

As OpenMP comes they spin, on cores that other processes want. What the user has set stands.
"""

import os

if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & set(os.environ):
    os.environ["OMP_WAIT_POLICY"] = "passive"
