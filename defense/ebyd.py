"""Expose a recorded backdoor, then name, invert and prune it:  python defense/ebyd.py --result_file badnet_0_1"""

import _root
from ulrl.cli import defense_main

defense_main("ebyd")
