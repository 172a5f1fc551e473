"""`python -m recognition.convert SOURCE OUT.safetensors`: see recognition/weights/foreign.py."""

import sys

from recognition.weights.foreign import main

if __name__ == "__main__":
    sys.exit(main())
