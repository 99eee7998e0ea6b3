"""Repair a recorded model with PAM:  python defense/pam.py --result_file badnet_0_1"""

import _root
from ulrl.cli import defense_main

defense_main("pam")
