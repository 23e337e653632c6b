"""`tierstore bench exchange`: tables over ranks and daemons, beside bare exchanges and other trainers."""
