"""Profiles a corpus on a Ray cluster: a task counts each trace, and the profiles of all are merged into one.

The merged profile is the one that `tierstore profile STORE TRACE... --held-out SHARE` would write, to the byte, if each
trace has 8 documents or more. Workers need tierstore, the store's catalog.mdb, their trace and the output's folder,
all under the same paths. A task whose worker dies is tried again: a part is written whole or not at all.

Example: python examples/profile_with_ray.py v41.tier day1.trace day2.trace -o both.profile
"""

import argparse
import tempfile
from pathlib import Path

import engram_adapter
import tierstore


def profile_part(store: Path, trace: Path, held_out: float, part: Path) -> Path:
    engram_adapter.token_profile(store, trace, held_out, output=part)
    return part


def arguments() -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("traces", type=Path, nargs="+", metavar="trace")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the profile to write, in a shared folder")
    parser.add_argument("--held-out", type=float, default=0.25, metavar="SHARE", help="default: %(default)s")
    parser.add_argument("--address", help="of the cluster, or auto; by default Ray is started on this host")
    parser.add_argument("--workers", type=int, help="how many, if Ray is started here; by default one a core")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    import ray  # behind the arguments, so that --help needs no Ray

    store, output = options.store.resolve(), options.output.resolve()  # workers run in folders of their own
    num_cpus = None if options.address else options.workers
    with ray.init(options.address, num_cpus=num_cpus), tempfile.TemporaryDirectory(dir=output.parent) as folder:
        count = ray.remote(num_cpus=1)(profile_part)
        tasks = [
            count.remote(store, trace.resolve(), options.held_out, Path(folder, f"{number}.profile"))
            for number, trace in enumerate(options.traces)
        ]
        parts = [engram_adapter.open_profile(store, part) for part in ray.get(tasks)]
        merged = tierstore.merge_profiles(store, parts, output=output)
    print(f"{output}: {merged.counts.tokens:,} tokens of {merged.counts.documents:,} documents, {len(parts)} parts")


if __name__ == "__main__":
    main()
