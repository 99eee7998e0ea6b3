"""Train a model with an Adaptive-Patch backdoor and write its record.

python attack/adaptive_patch.py --dataset fashion_mnist --save_folder_name my_record
"""

import _root
from ulrl.cli import attack_main

attack_main("adaptive_patch")
