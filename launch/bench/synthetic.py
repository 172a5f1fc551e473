"""How many synthetic faces one core draws and encodes in a second.

    python launch/bench/synthetic.py [--faces 200]

Processor time of one thread, the best of some identities: what else the machine does counts little.
Prints one JSON line. The target is 500 a second on a core of a server.
"""

import argparse
import json
import time

from data_tools.synthetic.generate import encode

_PER_IDENTITY = 25


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faces", type=int, default=200)
    args = parser.parse_args()
    encode(0, 0, 0)  # what is made once
    rates, drawn = [], 0
    while drawn < args.faces:
        images = min(_PER_IDENTITY, args.faces - drawn)
        began = time.thread_time()
        for image in range(images):
            encode(0, drawn // _PER_IDENTITY, image)
        rates.append(images / (time.thread_time() - began))
        drawn += images
    print(json.dumps({"faces": drawn, "faces_per_second": round(max(rates), 1)}))


if __name__ == "__main__":
    main()
