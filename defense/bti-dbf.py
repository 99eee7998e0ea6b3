"""Repair a recorded model with BTI-DBF:  python defense/bti-dbf.py --result_file badnet_0_1"""

import _root
from ulrl.cli import defense_main

defense_main("bti-dbf")
