"""A network of failures: dump after dump, of which nothing may be lost: `make chaos`.

Workers and drivers are killed, the S3 server is stopped, slow and full, it refuses connections, answers 500 and 503,
and breaks off in the middle of objects and requests; disks fill up; samples are broken, poison the teacher, or kill
whoever runs them. In the end each store must be the one that an undisturbed run in one process gives; docs/chaos.md.
"""

import argparse
import json
import math
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.chaos.rounds import ROUNDS, Outcome, Pace, Play, Round
from benchmarks.chaos.world import SHARD_ROWS, make_world
from benchmarks.result import write_result

SECONDS = 450.0
FAULTS = 200
LEAST_S = 15.0  # that a round is disturbed, however late it is


def chaos(
    folder: Path,
    rounds: Sequence[Round],
    *,
    num_faults: int,
    seconds: float,
    num_samples: int,
    seed: int,
    pause_s: float,
    pace: Pace,
    may_mount: bool = True,
    shard_rows: int = SHARD_ROWS,
) -> list[Outcome]:
    """Play rounds, one after the other and over again, until enough went wrong; stops where something does not hold.

    Args:
        folder: empty; holds everything, also the logs.
        rounds: at least one; each is played at least once.
        num_faults: that must hit something, in all.
        seconds: after which nothing more goes wrong; what is under way then comes to its end.
        num_samples: of the corpus.
        seed: of the corpus, the teacher and the faults.
        pause_s: seconds that the teacher takes longer for each batch.
        pace: how often something goes wrong, and how long a round may take after that.
        may_mount: whether a small disk may be mounted.
        shard_rows: rows of a shard.
    """
    generator = random.Random(seed)
    outcomes: list[Outcome] = []
    datas = {one.data for one in rounds}
    with make_world(folder, datas, num_samples, generator, pause_s, may_mount, shard_rows) as world:
        ends_at = time.monotonic() + seconds
        while True:
            number, done = len(outcomes), sum(outcome.tally.num_faults for outcome in outcomes)
            if number >= len(rounds) and (done >= num_faults or time.monotonic() > ends_at):
                return outcomes
            left = rounds[number:] or rounds[number % len(rounds) :][:1]  # later ones make good what was missed
            share = left[0].share / sum(one.share for one in left)
            play = Play(world, left[0], number, random.Random(f"{seed}/{number}"))
            quota = max(1, math.ceil((num_faults - done) * share))
            outcome = play.run(quota, max(ends_at, time.monotonic() + LEAST_S), pace)
            outcomes.append(outcome)
            _say(outcome)
            if outcome.problems:
                return outcomes


def _say(outcome: Outcome) -> None:
    held = "the same store" if not outcome.problems else "PROBLEMS"
    counts = ", ".join(f"{kind} {count}" for kind, count in sorted(outcome.tally.faults.items()))
    print(
        f"{outcome.name}: {outcome.tally.num_faults} faults in {outcome.seconds:.0f} s, {outcome.num_starts} starts: "
        f"{held} ({counts})",
        flush=True,
    )
    for problem in outcome.problems:
        print(f"  {problem}", flush=True)


def figures(outcomes: Sequence[Outcome], num_samples: int, seed: int, seconds: float) -> dict[str, Any]:
    """What is recorded of a run."""
    faults, requests = _sum(one.tally.faults for one in outcomes), _sum(one.tally.requests for one in outcomes)
    return {
        "seed": seed,
        "num_faults": faults.total(),
        "faults": dict(sorted(faults.items())),
        "requests_broken": dict(sorted(requests.items())),
        "faults_that_hit_nothing": _sum(one.tally.missed for one in outcomes).total(),
        "num_stores": len(outcomes),
        "num_stores_equal_to_an_undisturbed_run": sum(not one.problems for one in outcomes),
        "num_rows_each": num_samples,
        "num_quarantined_each": max((one.num_quarantined for one in outcomes), default=0),
        "driver_starts": sum(one.num_starts for one in outcomes),
        "worker_deaths_seen_by_drivers": sum(one.num_deaths for one in outcomes),
        "drivers_refused_beside_another": sum(one.num_refused for one in outcomes),
        "drivers_stopped_for_want_of_room": sum(one.num_stopped for one in outcomes),
        "rounds": [
            {
                "name": one.name,
                "faults": one.tally.num_faults,
                "seconds": round(one.seconds, 1),
                "content_digest": one.content_digest,
                "problems": one.problems,
            }
            for one in outcomes
        ],
        "seconds": round(seconds, 1),
    }


def _sum(counters: Iterable[Counter[str]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for counter in counters:
        total.update(counter)
    return total


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=FAULTS, help="that must hit something")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="after which nothing more goes wrong")
    parser.add_argument("--samples", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=None, help="of everything; by default another each time")
    parser.add_argument("--pause", type=float, default=0.3, help="seconds that the teacher takes for a batch")
    parser.add_argument("--every", type=float, default=Pace.request_s, help="seconds between two broken requests")
    parser.add_argument("--kill-every", type=float, default=Pace.process_s, help="seconds between two kills")
    parser.add_argument(
        "--patience", type=float, default=Pace.patience_s, help="seconds a round may take after its faults"
    )
    names = [one.name for one in ROUNDS]
    parser.add_argument("--rounds", choices=names, nargs="+", default=names)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended too
    seed = random.SystemRandom().randrange(1 << 32) if args.seed is None else args.seed
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    print(f"seed {seed}, in {folder}", flush=True)
    begun = time.perf_counter()
    outcomes = chaos(
        folder,
        [one for one in ROUNDS if one.name in args.rounds],
        num_faults=args.faults,
        seconds=args.seconds,
        num_samples=args.samples,
        seed=seed,
        pause_s=args.pause,
        pace=Pace(args.every, args.kill_every, args.patience),
    )
    found = figures(outcomes, args.samples, seed, time.perf_counter() - begun)
    if any(one.problems for one in outcomes):
        sys.exit(f"chaos: something does not hold; the seed is {seed}, and all that was there is in {folder}")
    if found["num_faults"] < args.faults:
        shutil.rmtree(folder)
        sys.exit(
            f"chaos: all held, but expected {args.faults} faults that hit something, got {found['num_faults']}: the "
            "machine is too busy; give it more time: --seconds"
        )
    if args.rounds == names:
        write_result("chaos", found)
    else:  # not the whole: nothing to keep
        print(json.dumps(found, indent=2))
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
