"""Shows what memory buys, then plans for the recommended budget: python examples/profile_and_plan.py STORE TRACE...

Traces are those of `tierstore trace`: token ids of text like that which the model will see.
"""

import sys

import engram_adapter
import tierstore

path, *traces = sys.argv[1:]
profile = engram_adapter.token_profile(path, traces)  # a part of the documents is held out, and predicted
print(f"{profile.counts.tokens} tokens of {profile.counts.documents} documents")
for group in profile.curves:
    print(f"{', '.join(group.tables)}: DRAM, keys that hit, reads of NVMe a token")
    for point in group.points:
        rate, reads = point.mixed.hit_rate["all"], point.mixed.reads_per_token
        print(f"  {point.dram_bytes / 2**20:8.0f} MiB  {100 * rate:5.1f} %  {reads:5.1f}")

recommended = profile.recommended
if recommended is None:
    sys.exit("nothing was held out, so nothing is known: trace more documents")
print(f"{recommended.name}: {recommended.dram_bytes / 2**20:.0f} MiB, {recommended.why}")
plan = tierstore.plan(path, profile, dram=recommended.dram_bytes)
tierstore.place(path, plan)  # no epoch: whole tables and recent entries are the best use of so much memory
with tierstore.open(path, dram=recommended.dram_bytes) as store:
    placement = store.stats()["placement"]
    print(f"{path} opens with epoch {placement['epoch']}: {placement['static_entries']} entries in memory at once")
