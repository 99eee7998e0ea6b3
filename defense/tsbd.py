"""Repair a recorded model with TSBD:  python defense/tsbd.py --result_file badnet_0_1"""

import _root
from ulrl.cli import defense_main

defense_main("tsbd")
