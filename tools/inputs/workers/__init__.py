"""Worker processes of `tierstore trace`: what others' libraries do with files runs here, with limits, and never in the
process that writes the trace. A worker loads only its library, not tierstore: it starts in a fraction of the time."""
