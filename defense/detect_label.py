"""Find the class that a recorded model's backdoor leads to:  python defense/detect_label.py --result_file badnet_0_1"""

import _root
from ulrl.cli import defense_main

defense_main("detect_label")
