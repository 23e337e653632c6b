"""The page that `tierstore profile --report` writes."""
