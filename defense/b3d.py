"""Look for a backdoor by queries alone:  python defense/b3d.py --result_file badnet_0_1"""

import _root
from ulrl.cli import defense_main

defense_main("b3d")
