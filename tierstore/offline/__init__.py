"""The jobs behind the command line, as a library: build, verify, repair, count, profile, plan and place."""
