"""Train a model with a label-consistent (clean-label) backdoor and write its record.

python attack/lc.py --dataset fashion_mnist --save_folder_name my_record
"""

import _root
from ulrl.cli import attack_main

attack_main("lc")
