"""Repair a recorded model with FT-SAM:  python defense/ft-sam.py --result_file badnet_0_1"""

import _root
from ulrl.cli import defense_main

defense_main("ft-sam")
