"""What `tierstore stat` and `top` show of a running daemon."""
