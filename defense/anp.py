"""Repair a recorded model with ANP:  python defense/anp.py --result_file badnet_0_1"""

import _root
from ulrl.cli import defense_main

defense_main("anp")
