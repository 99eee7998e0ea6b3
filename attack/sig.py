"""Train a model with a SIG (sinusoid, clean-label) backdoor and write its record.

python attack/sig.py --dataset fashion_mnist --save_folder_name my_record
"""

import _root
from ulrl.cli import attack_main

attack_main("sig")
