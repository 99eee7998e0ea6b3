"""Recover the trigger that a recorded model answers to:  python defense/recover_trigger.py --result_file badnet_0_1"""

import _root
from ulrl.cli import defense_main

defense_main("recover_trigger")
