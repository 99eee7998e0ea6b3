"""Train a model with an Input-aware backdoor and write its record.

python attack/inputaware.py --dataset fashion_mnist --save_folder_name my_record
"""

import _root
from ulrl.cli import attack_main

attack_main("inputaware")
