"""Re-plans a store from yesterday's token traces: python examples/replan_nightly.py STORE DRAM TRACE...

Processes that open the store afterwards start warm with the new placement; `tierstore swap` moves a daemon to it.
"""

import sys

import engram_adapter
import tierstore

store, dram, *traces = sys.argv[1:]
profile = engram_adapter.token_profile(store, traces)
plan = tierstore.plan(store, profile, dram=dram)
for group in plan.groups:
    low, high = group.interval(plan.interval_tokens)
    hits = ", ".join(f"{tier} {100 * share:.1f} %" for tier, share in group.hits_by_tier.items())
    print(f"{', '.join(group.tables)}: expected {hits}; in memory {100 * low['all']:.1f} to {100 * high['all']:.1f} %")
epoch = tierstore.place(store, plan)
print(f"{store} opens with epoch {epoch} from now on" if epoch else f"{store} fits in {dram} whole: nothing to place")
