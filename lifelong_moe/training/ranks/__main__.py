"""What a rank's command runs."""

import json
import sys

from lifelong_moe.training.ranks.rank import Orders, run_rank

if __name__ == "__main__":
    run_rank(Orders(**json.loads(sys.argv[1])))
