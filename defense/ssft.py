"""Repair a recorded model with SSFT:  python defense/ssft.py --result_file badnet_0_1"""

import _root
from ulrl.cli import defense_main

defense_main("ssft")
