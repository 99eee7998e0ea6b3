"""Repair a recorded model with D3:  python defense/d3.py --result_file badnet_0_1"""

import _root
from ulrl.cli import defense_main

defense_main("d3")
