"""`python -m launch.plan RECIPE ...`: see launch/planner/predict.py."""

import sys

from launch.planner.predict import main

if __name__ == "__main__":
    sys.exit(main())
