"""Repair a recorded model with I-BAU:  python defense/i-bau.py --result_file badnet_0_1"""

import _root
from ulrl.cli import defense_main

defense_main("i-bau")
