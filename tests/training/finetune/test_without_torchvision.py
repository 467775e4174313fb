"""Fine-tuned point networks are loaded where torchvision is not installed."""

from __future__ import annotations

import subprocess
import sys


def test_fine_tuned_networks_are_read_without_torchvision():
    code = (
        "import sys; sys.modules['torchvision'] = None; import geo_pretrain.training.finetune.network as network;"
        "import geo_pretrain.training.finetune.load; assert network._detection(None) is None"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
