"""torchrun, by the same arguments, without its traceback: what ends a process of a training is said by that
process."""

import logging
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main() -> None:
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        run.main()
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:  # nobody could speak then
            print(
                f"error: process {rank} was ended by signal {-failure.exitcode}; if it was 9, there may not "
                "be enough memory. The same command goes on from the newest checkpoint",
                file=sys.stderr,
            )
        raise SystemExit(failure.exitcode if failure.exitcode > 0 else 1) from None
    except SignalException as error:
        raise SystemExit(128 + error.sigval) from None


if __name__ == "__main__":
    main()
