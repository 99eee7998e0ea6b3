"""Train a model with a SSBA (sample-specific) backdoor and write its record.

python attack/ssba.py --dataset fashion_mnist --save_folder_name my_record
"""

import _root
from ulrl.cli import attack_main

attack_main("ssba")
