"""Train a model with a BadNets backdoor and write its record.

python attack/badnet.py --dataset fashion_mnist --save_folder_name my_record
"""

import _root
from ulrl.cli import attack_main

attack_main("badnet")
